"""How well latencies of networks are predicted that nobody measured, in ONNX Runtime, fp32 and int8.

    python benchmarks/latency_predictor.py --part build|layers|networks|judge [--folder DIR]

Three sources (ResNet-20 at 28×28, MobileNetV2 and MobileNetV3 at 32×32) and variants of them: channels pruned, layers
as products of smaller ones, blocks removed. `build` makes all files; `layers` times the probes of the sources' layers
and of thinner ones; `networks` times the networks, in turns in one process; both want a quiet machine. `judge` predicts
the 30 held-out variants: after the source alone was measured, and after the first trials of a search were. Beside it
stand the time of the source in proportion to multiply-accumulates, and the power law of the search, both with the same
measurements.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS, BATCH, RUNTIME, PRECISIONS = 1, 1, "onnxruntime", ("fp32", "int8")
SOURCES = {"resnet20": (1, 28, 1.0), "mobilenet_v2": (3, 32, 0.5), "mobilenet_v3_small": (3, 32, 1.0)}
SEEN = {
    "resnet20": [
        ("none", 1.0, 0), ("channels", 0.5, 0), ("channels", 0.25, 0), ("low rank", 0.5, 0), ("low rank", 0.25, 0),
        ("none", 1.0, 2), ("channels", 0.5, 2),
    ],
    **dict.fromkeys(
        ("mobilenet_v2", "mobilenet_v3_small"),
        [("none", 1.0, 0), ("channels", 0.5, 0), ("low rank", 0.5, 0), ("none", 1.0, 2)],
    ),
}  # fmt: skip
HELD_OUT = {
    "resnet20": [
        *(("channels", keep, 0) for keep in (0.85, 0.7, 0.6, 0.4, 0.3, 0.2)),
        *(("low rank", keep, 0) for keep in (0.85, 0.7, 0.6, 0.4, 0.3)),
        ("none", 1.0, 1), ("channels", 0.7, 1), ("channels", 0.5, 1), ("channels", 0.3, 2), ("channels", 0.85, 2),
        ("low rank", 0.5, 1), ("low rank", 0.6, 2),
    ],
    **dict.fromkeys(
        ("mobilenet_v2", "mobilenet_v3_small"),
        [
            ("channels", 0.7, 0), ("channels", 0.4, 0), ("channels", 0.3, 0), ("low rank", 0.6, 0), ("none", 1.0, 1),
            ("channels", 0.6, 1),
        ],
    ),
}  # fmt: skip


def source(name: str):
    """The network in eval mode and its task."""
    import torch

    from penjing.architectures import build
    from penjing.tasks.task import Task

    channels, size, width = SOURCES[name]
    torch.manual_seed(0)
    if name == "resnet20":
        from examples.fashion_mnist.network import resnet20

        model = resnet20()
    else:
        model = build(name, in_channels=channels, classes=10, width=width).eval()
    images = torch.randn(16, channels, size, size)
    return model, Task(example=images[:2], calibration=list(images.split(8)))


def variant(network, task, capabilities, choice):
    """The draft of a choice, and its integers."""
    from penjing.quantize import Static
    from penjing.search.choice import Learning, recipe
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    draft, context = Draft(network), Context(task=task, capabilities=capabilities)
    for step in recipe(choice, Learning(labels=False)):
        draft = step(draft, context)
    return draft, Static()(draft, context)


def build(folder: Path) -> None:
    """Make the files of all networks and probes; what is there stays."""
    import numpy as np

    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.search.choice import Choice
    from penjing.search.layer_probes import EMPTY, built
    from penjing.search.layer_shapes import layer_shapes
    from penjing.search.layer_table import around

    capabilities = runtimes.get(RUNTIME).capabilities(measure.machine(THREADS).instruction_sets)
    for name in SOURCES:
        model, task = source(name)
        network = capture_network(model, *task.call())
        np.save(
            folder / f"{name}.npy",
            task.example[0][:1].numpy() if isinstance(task.example, tuple) else task.example[:1].numpy(),
        )
        for technique, keep, blocks in SEEN[name] + HELD_OUT[name]:
            place = folder / "networks" / f"{name} {technique} {keep} {blocks}"
            if (place / "layers.json").exists():
                continue
            shutil.rmtree(place, ignore_errors=True)
            choice = Choice(technique=technique, keep=keep, blocks=blocks)
            floats, integers = variant(network, task, capabilities, choice)
            for precision, draft in zip(PRECISIONS, (floats, integers), strict=True):
                (place / precision).mkdir(parents=True)
                building.build(draft, RUNTIME, precision, task, {"kind": "tensor"}, place / precision)
            layers = [s.row() for s in layer_shapes(floats.network, task.call(), capabilities.fuses)]
            (place / "layers.json").write_text(json.dumps(layers))
            print(place.name, flush=True)
        shapes = (EMPTY, *around(layer_shapes(network, task.call(), capabilities.fuses)))
        (folder / f"{name}.json").write_text(json.dumps([shape.row() for shape in shapes]))
        for shape in shapes:
            place = folder / "probes" / "-".join(map(str, shape.row()))
            if (place / "probe.json").exists():
                continue
            shutil.rmtree(place, ignore_errors=True)
            start = time.monotonic()
            targets = built(shape, RUNTIME, PRECISIONS, BATCH, place)
            rows = {p: [Path(t.folder).name, list(t.inputs[0].shape)] for p, t in targets.items()}
            seconds = time.monotonic() - start
            data = {"shape": shape.row(), "targets": rows, "seconds": seconds}
            (place / "probe.json").write_text(json.dumps(data))
            print(place.name, f"{seconds:.1f} s", flush=True)


def time_layers(folder: Path, seconds: float) -> None:
    """Time the probes."""
    import numpy as np

    from penjing.measure import Target
    from penjing.search.layer_probes import timed
    from penjing.search.layer_shapes import LayerShape

    probes = {}
    wanted = {tuple(row) for name in SOURCES for row in json.loads((folder / f"{name}.json").read_text())}
    for path in sorted(folder.glob("probes/*/probe.json")):
        data = json.loads(path.read_text())
        if tuple(data["shape"]) not in wanted:
            continue
        probes[LayerShape.of_row(data["shape"])] = {
            precision: Target(
                name, path.parent / name, [np.random.default_rng(0).standard_normal(sizes, dtype=np.float32)], BATCH
            )
            for precision, (name, sizes) in data["targets"].items()
        }
    start = time.monotonic()
    table = timed(probes, PRECISIONS, threads=THREADS, seconds=seconds)
    spent = time.monotonic() - start
    rows = {p: [[*shape.row(), ms] for shape, ms in row.items()] for p, row in table.items()}
    (folder / "layers.json").write_text(json.dumps({"seconds": spent, "times": rows}))
    print(f"{len(probes)} probes in {spent:.0f} s")


def time_networks(folder: Path, seconds: float) -> None:
    """Time the networks."""
    import numpy as np

    from penjing.measure import Target
    from penjing.measure.series import series
    from penjing.search.layer_probes import steady

    images = {name: np.load(folder / f"{name}.npy") for name in SOURCES}
    targets = [
        Target(f"{place.name} {precision}", place / precision, [images[place.name.split()[0]]], BATCH)
        for place in sorted((folder / "networks").iterdir())
        for precision in PRECISIONS
    ]
    start = time.monotonic()
    rounds = series(targets, threads=THREADS, seconds=seconds, rounds=9)
    spent = time.monotonic() - start
    rows = {t.name: {"ms": steady(row), "rounds": row} for t, row in zip(targets, rounds, strict=True)}
    (folder / "networks.json").write_text(json.dumps({"seconds": spent, "times": rows}))
    print(f"{len(targets)} networks in {spent:.0f} s")


def judge(folder: Path) -> dict:
    """Predict the held-out networks in every way."""
    from penjing.search.layer_shapes import LayerShape

    table = json.loads((folder / "layers.json").read_text())
    measured = json.loads((folder / "networks.json").read_text())
    layers = {
        path.parent.name: [LayerShape.of_row(row) for row in json.loads(path.read_text())]
        for path in folder.glob("networks/*/layers.json")
    }
    rows = []
    own = {name: [LayerShape.of_row(r) for r in json.loads((folder / f"{name}.json").read_text())] for name in SOURCES}
    for precision in PRECISIONS:
        times = {LayerShape.of_row(row[:-1]): row[-1] for row in table["times"][precision]}
        for name in SOURCES:
            of_source = {s: times[s] for s in own[name] if s in times}
            rows += predictions(name, precision, of_source, layers, measured["times"])
    seconds = {}
    for path in folder.glob("probes/*/probe.json"):
        probe = json.loads(path.read_text())
        seconds[LayerShape.of_row(probe["shape"])] = probe["seconds"]
    timed = table["seconds"] / len({shape for shapes in own.values() for shape in shapes})
    filling = {n: {"probes": len(o), "seconds": sum(seconds[s] + timed for s in o)} for n, o in own.items()}
    return {"rows": rows, "summary": summary(rows), "filling": filling}


def predictions(name, precision, times, layers, measured) -> list[dict]:
    """Every held-out variant of a source, in each way."""
    from penjing.search.beliefs import Beliefs, Observation
    from penjing.search.choice import Choice
    from penjing.search.predictor import Predictor

    def label(choice):
        return f"{name} {choice[0]} {choice[1]} {choice[2]}"

    def ms(choice):
        return measured[f"{label(choice)} {precision}"]["ms"]

    def as_choice(choice):
        integers = "corrected" if precision == "int8" else "none"
        return Choice(technique=choice[0], keep=choice[1], blocks=choice[2], integers=integers)

    def macs(choice):
        return sum(s.macs for s in layers[label(choice)])

    artifact, rows = f"{RUNTIME}-{precision}", []
    for known in ("source", "first trials"):
        seen = SEEN[name][: 1 if known == "source" else None]
        predictor = Predictor(times, [(layers[label(c)], ms(c)) for c in seen])
        beliefs = Beliefs(
            [Observation(choice=as_choice(c), artifact=artifact, figures={"latency_ms": ms(c)}) for c in seen]
        )
        share = sum(ms(c) * macs(c) for c in seen) / sum(macs(c) ** 2 for c in seen)
        for choice in HELD_OUT[name]:
            predicted = predictor.predict(layers[label(choice)])
            believed = beliefs.figure("latency_ms", as_choice(choice), artifact)
            rows.append({
                "source": name, "precision": precision, "known": known, "variant": label(choice), "ms": ms(choice),
                "layers": predicted.ms, "layers sd": predicted.sd / predicted.ms,
                "power law": believed.value, "power law sd": believed.sd, "macs": share * macs(choice),
            })  # fmt: skip
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Rank correlation (Spearman) over all held-out networks, its least within a source, and mean errors."""
    import numpy as np
    from scipy.stats import spearmanr

    told = []
    for precision in PRECISIONS:
        for known in ("source", "first trials"):
            of = [r for r in rows if r["precision"] == precision and r["known"] == known]
            for way in ("macs", "power law", "layers"):
                ms, predicted = np.array([r["ms"] for r in of]), np.array([r[way] for r in of])
                errors = np.abs(predicted / ms - 1)
                within = []
                for name in SOURCES:
                    mine = [i for i, r in enumerate(of) if r["source"] == name]
                    within.append(float(spearmanr(ms[mine], predicted[mine]).statistic))
                entry = {
                    "precision": precision, "known": known, "way": way, "networks": len(of),
                    "rank": float(spearmanr(ms, predicted).statistic),
                    "rank within": dict(zip(SOURCES, within, strict=True)),
                    "error": float(errors.mean()), "largest": float(errors.max()),
                }  # fmt: skip
                if way != "macs":
                    sds = np.array([r[f"{way} sd"] for r in of])
                    entry["within two sd"] = float((np.abs(np.log(predicted / ms)) <= 2 * sds).mean())
                    entry["sd"] = float(sds.mean())
                told.append(entry)
    return told


def main() -> None:
    """Do one part; `judge` prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["build", "layers", "networks", "judge"], required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "latency_predictor")
    parser.add_argument("--seconds", type=float, default=0.15, help="timed seconds of each artifact")
    parser.add_argument("--note", default="", help="what the table says of the conditions")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/latency_predictor.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.part == "build":
        build(arguments.folder)
    elif arguments.part == "layers":
        time_layers(arguments.folder, arguments.seconds)
    elif arguments.part == "networks":
        time_networks(arguments.folder, arguments.seconds)
    else:
        from penjing.measure import machine, versions

        data = {"machine": vars(machine(THREADS)), "versions": versions(), "note": arguments.note}
        data |= judge(arguments.folder)
        for row in data["summary"]:
            print(
                f"{row['precision']:<5} {row['known']:<13} {row['way']:<10} rank {row['rank']:.3f} "
                f"({', '.join(f'{v:.2f}' for v in row['rank within'].values())})  error {row['error']:.1%} "
                f"(largest {row['largest']:.0%})  within 2 sd {row.get('within two sd', float('nan')):.0%}"
            )
        for name, row in data["filling"].items():
            print(f"{name}: {row['probes']} probes in {row['seconds']:.0f} s")
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
