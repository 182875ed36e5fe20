"""Detectors in INT8 by tool and runtime, over several networks: which differences are more than luck?

The networks differ in the seed of their training alone; seed 0 is the file of examples/detection. All contestants of a
network see the same calibration inputs, and all are judged on the same 2,400 scenes, whose raw outputs are stored. From
them come:

- mAP@0.5:0.95, and the points lost against fp32 with a paired bootstrap over scenes: the same scenes are drawn, with
  replacement, for both, 300 times. The interval holds 95 % of the differences.
- agreement: the mAP if the boxes that fp32 itself gives a score above 0.3 are the truth. No label takes part, so a
  detector that is right by luck where fp32 is wrong gains nothing.
- noise of boxes (in the cells where fp32 sees an object) and of scores (in all), as signal-to-noise ratio; signal is
  what varies, not the mean.

    python benchmarks/detectors.py --folder DIR [--seeds 0 1 2] [--contestants NAME ...] [--calibration 1]

Weights, outputs and draws that lie in --folder are not made again. A seed whose weights are missing is trained first,
which takes some minutes. NNCF has to be importable. `--calibration 2` calibrates with the second 256 scenes of the
training, and so on: contestants of their own.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fields

from examples import stamps
from examples.detection import network as example
from examples.detection import train as training
from examples.detection.task import CALIBRATION
from examples.training import save, trained
from examples.weights import load
from penjing import measure
from penjing.tasks.metrics.boxes import suppress, to_corners
from penjing.tasks.metrics.detection import THRESHOLDS, Detections, Objects, _matched
from penjing.tasks.task import Task

CONTESTANTS = [fields.SOURCE, *(name for name in fields.CONTESTANTS if name.startswith("penjing"))]
CONTESTANTS += ["nncf accurate", "nncf default", "ort static MinMax"]
PEER = "nncf accurate"
SCENES = 2400
BATCH = 32
LEAST_SCORE, OVERLAP = 0.01, 0.65  # as pj.tasks.detection reads boxes
SEEN = 0.3  # score from which fp32's own boxes are the truth of the agreement
DRAWS = 300
RECALLS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The boxes of one class in all scenes, best score first.

    Attributes:
        scenes: (boxes,) the scene of each.
        right: (thresholds, boxes) whether it is right.
        objects: (scenes,) how many objects of the class there are.
    """

    scenes: np.ndarray
    right: np.ndarray
    objects: np.ndarray

    def average_precision(self, weights: np.ndarray) -> float:
        """Mean over the thresholds, where a scene counts as often as `weights` (scenes,) says."""
        counts = weights[self.scenes]
        given, total = np.cumsum(counts), float(weights @ self.objects)
        averages = []
        for right in self.right:
            places = np.flatnonzero(right)  # between them precision only falls
            hits = np.cumsum(counts[places])
            precision = np.maximum.accumulate((hits / np.maximum(given[places], 1))[::-1])[::-1]
            reached = np.searchsorted(hits / total, RECALLS, side="left")
            averages.append(np.append(precision, 0.0)[np.minimum(reached, len(places))].mean())
        return float(np.mean(averages))


def weights_of(seed: int, folder: Path) -> Path:
    """The file of a trained network, which is trained now if it is missing."""
    if seed == training.SETTINGS.seed:
        return example.WEIGHTS
    file = folder / f"detector-{seed}.safetensors"
    if not file.is_file():
        settings = dataclasses.replace(training.SETTINGS, seed=seed)
        save(trained(example.untrained, training.task(), settings), file)
    return file


def calibrated(part: int) -> Task:
    """The task with a part of the training's scenes to calibrate with: the first is the example's own."""
    task, count = training.task(), CALIBRATION
    images = stamps.scenes("train", stamps.TRAIN_SCENES).images[(part - 1) * count : part * count]
    batches = [stamps.normalise(images[start : start + BATCH]) for start in range(0, count, BATCH)]
    return dataclasses.replace(task, calibration=batches)


def outputs(file: Path, seed: int, name: str, calibration: int, images: np.ndarray) -> np.ndarray:
    """Raw outputs of a contestant on all scenes, (scenes, rows, 4 + classes), from `file` if it is there."""
    if not file.is_file():
        network = load(example.untrained(), weights_of(seed, file.parent))
        task = calibrated(calibration)
        with tempfile.TemporaryDirectory() as aside:
            predict = fields.CONTESTANTS[name](fields.Case("detection", network, task, Path(aside)))
            parts = [predict(stamps.normalise(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
        partial = file.with_suffix(".partial")
        with partial.open("wb") as opened:
            np.save(opened, np.concatenate(parts))
        partial.replace(file)
    return np.load(file)


def detections(rows: np.ndarray) -> list[Detections]:
    """Boxes of every scene, without those that overlap a better one of their class."""
    detected = []
    for scene in rows:
        cells, labels = np.nonzero(scene[:, 4:] > LEAST_SCORE)
        boxes = to_corners(scene[cells, :4], "cxcywh", (stamps.SIDE, stamps.SIDE))
        scores = scene[cells, 4 + labels].astype(np.float64)
        best = suppress(boxes, scores, labels, overlap=OVERLAP, most=len(scores))
        detected.append(Detections(boxes[best], scores[best], labels[best]))
    return detected


def rankings(detected: Iterable[Detections], truth: Iterable[Objects]) -> list[Ranking]:
    """The boxes of every class in all scenes."""
    pairs, limits, ranked = list(zip(detected, truth, strict=True)), np.asarray(THRESHOLDS), []
    for label in range(len(stamps.CLASSES)):
        matched = [_matched(boxes, objects, label, limits, 100) for boxes, objects in pairs]
        scores, right = (np.concatenate([row[part] for row in matched], axis=-1) for part in (0, 1))
        scenes = np.repeat(np.arange(len(matched)), [len(row[0]) for row in matched])
        order = np.argsort(-scores, kind="stable")
        ranked.append(Ranking(scenes[order], right[:, order], np.array([row[3] for row in matched], float)))
    return ranked


def mean_average_precision(ranked: list[Ranking], weights: np.ndarray) -> float:
    """mAP@0.5:0.95."""
    return float(np.mean([each.average_precision(weights) for each in ranked]))


def snr_db(signal: np.ndarray, noisy: np.ndarray) -> float:
    """Signal-to-noise ratio; the signal is what differs from the mean of its column."""
    power = ((signal - signal.mean(0)).astype(np.float64) ** 2).mean()
    return 10 * float(np.log10(power / max(((signal - noisy).astype(np.float64) ** 2).mean(), 1e-30)))


def noise(answers: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Of boxes, in the cells where fp32 sees an object, and of scores in all."""
    seen = answers[..., 4:].max(-1) > SEEN
    classes = answers.shape[-1] - 4
    return {
        "boxes_db": snr_db(answers[seen][:, :4], rows[seen][:, :4]),
        "scores_db": snr_db(answers[..., 4:].reshape(-1, classes), rows[..., 4:].reshape(-1, classes)),
    }


def interval(differences: np.ndarray) -> dict[str, float]:
    """What a bootstrap says of a difference."""
    low, high = np.percentile(differences, [2.5, 97.5])
    return {"low": float(low), "high": float(high), "above_0": float((differences > 0).mean())}


def drawn(count: int) -> np.ndarray:
    """How often each scene counts, (1 + draws, scenes): once in the first row."""
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.concatenate([np.ones((1, count)), draws])


def resampled(files: dict[str, Path], truth: list[Objects]) -> dict[str, dict[str, np.ndarray]]:
    """mAP and agreement of a network's contestants in every draw, (1 + draws,), stored beside their outputs."""
    stored = {name: file.with_suffix(f".{DRAWS}.npz") for name, file in files.items()}
    missing = [name for name, file in stored.items() if not file.is_file()]
    if missing:
        sure = [seen(each) for each in detections(np.load(files[fields.SOURCE]))]
        draws = drawn(len(truth))
    for name in missing:
        detected = detections(np.load(files[name]))
        truths = {"metric": truth, "agreement": sure}
        ranked = {figure: rankings(detected, objects) for figure, objects in truths.items()}
        values = {
            figure: np.array([mean_average_precision(each, weights) for weights in draws])
            for figure, each in ranked.items()
        }
        np.savez(stored[name], **values)
        print(name, {figure: float(each[0]) for figure, each in values.items()}, flush=True)
    return {name: dict(np.load(file)) for name, file in stored.items()}


def seen(detected: Detections) -> Objects:
    """The boxes that fp32 is sure of, as a truth."""
    rows = detected.scores > SEEN
    return Objects(detected.boxes[rows], detected.labels[rows])


def of_network(files: dict[str, Path], draws: dict[str, dict[str, np.ndarray]]) -> dict:
    """What the JSON says of a network's contestants."""
    table: dict = {}
    answers, source = np.load(files[fields.SOURCE]), draws[fields.SOURCE]["metric"]
    for name, file in files.items():
        table[name] = {figure: float(each[0]) for figure, each in draws[name].items()}
        if name != fields.SOURCE:
            lost = source - draws[name]["metric"]
            table[name] |= {"lost": float(lost[0]), "bootstrap": interval(lost[1:])} | noise(answers, np.load(file))
    return table


def over_networks(tables: dict[str, dict], draws: dict[str, dict[str, dict[str, np.ndarray]]]) -> dict:
    """Means over the networks, and how far every contestant is above NNCF's accurate mode."""
    shared = [name for name in next(iter(tables.values())) if all(name in table for table in tables.values())]
    summary: dict = {}
    for name in shared:
        if name == fields.SOURCE:
            continue
        parts = [table[name] for table in tables.values()]
        figures = ("lost", "agreement", "boxes_db", "scores_db")
        summary[name] = {key: float(np.mean([part[key] for part in parts])) for key in figures}
        lost = np.mean([each[fields.SOURCE]["metric"] - each[name]["metric"] for each in draws.values()], axis=0)
        summary[name]["bootstrap"] = interval(lost[1:])
        for figure in ("metric", "agreement") if name != PEER and PEER in shared else ():
            above = np.array([each[name][figure] - each[PEER][figure] for each in draws.values()])
            summary[name][f"{figure}_above_peer"] = {
                "mean": float(above[:, 0].mean()),
                "networks": above[:, 0].tolist(),
            } | interval(above[:, 1:].mean(axis=0))
    return summary


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--calibration", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/detectors.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(fields.THREADS)
    first = stamps.SELECT_SCENES
    scenes = stamps.scenes("test", first + SCENES).part(first, first + SCENES)
    truth = [Objects(rows[rows[:, 4] >= 0, :4], rows[rows[:, 4] >= 0, 4].astype(int)) for rows in scenes.boxes]
    for seed in arguments.seeds:
        for name in arguments.contestants:
            title = name
            if arguments.calibration > 1 and name != fields.SOURCE:
                title += f", calibration {arguments.calibration}"
            outputs(arguments.folder / f"{seed} {title}.npy", seed, name, arguments.calibration, scenes.images)
            print(seed, title, flush=True)
    tables, draws = {}, {}
    for seed in arguments.seeds:
        every = {file.stem.partition(" ")[2]: file for file in arguments.folder.glob(f"{seed} *.npy")}
        order = sorted(every, key=lambda title: (CONTESTANTS.index(title.partition(",")[0]), title))
        files = {title: every[title] for title in order}
        draws[str(seed)] = resampled(files, truth)
        tables[str(seed)] = of_network(files, draws[str(seed)])
    results = {
        "machine": dataclasses.asdict(measure.machine(fields.THREADS)),
        "versions": measure.versions() | {"nncf": importlib.metadata.version("nncf")},
        "scenes": len(truth),
        "draws": DRAWS,
        "networks": tables,
        "mean": over_networks(tables, draws),
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["mean"], indent=2))
    print(arguments.out)


if __name__ == "__main__":
    main()
