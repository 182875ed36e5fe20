"""Low rank at half of the multiply-accumulates, beside tensorly with VBMF ranks and beside pruning.

VGG-16 (the form for small images) on Fashion-MNIST, and MiniLM with a classifier on 20 newsgroups. All sides start from
the same trained network and train in the same loop: the same batches in the same order, labels alone, the same
optimizer and length; for VGG-16 the learning rate is selected for each side on held-out images, from the same two.

- *penjing*: `decompose.LowRank(macs=0.5)`, its ranks, weighing and refit as they are by default.
- *tensorly*: Kim et al., ICLR 2016: VBMF ranks of every layer, all multiplied with the one factor that gives the same
  multiply-accumulates, weights by `tensorly.decomposition.partial_tucker`, linear layers by truncated SVD.
- *channels*: `prune.Channels`, at the fraction of the multiply-accumulates at which its ONNX file takes as long as that
  of *penjing* at the larger batch. It is read between the latencies of networks pruned to `FRACTIONS`, which have to
  lie on both sides.

*Untrained* is the accuracy before any training. Speed: ONNX files in ONNX Runtime, in interleaved rounds.

    python benchmarks/low_rank.py [--networks vgg16 minilm] [--target 0.5] [--epochs 0.3] [--texts 500] [--judged 400]
        [--parts files search accuracy speed]

Every finished run is written immediately; a second call resumes where the first stopped. The ONNX files stay in the
cache of the examples, so that the parts that time them can be run by themselves on a quiet machine: `files` builds what
the search for an equal latency needs, `search` times it; `accuracy` trains and judges all sides and builds their files,
`speed` times them. `--again` forgets what these parts have measured.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
THREADS = 2
UNITS = ("macs", "params")
SIDES = ("penjing", "tensorly", "channels")
FRACTIONS = (0.4, 0.55, 0.7, 0.85)  # of the multiply-accumulates: where the latency of `channels` is measured
PARTS = ("files", "search", "accuracy", "speed")
RATES = {"vgg16": (0.02, 0.002), "minilm": (1e-4,), "resnet20": (0.05, 0.005)}
BATCHES = {"vgg16": (1, 32), "minilm": (1, 16), "resnet20": (1, 32)}


def source(name, arguments):
    """The trained module and its task."""
    if name == "minilm":
        import minilm_pruning

        task, classes = minilm_pruning.prepared(arguments.judged)
        return minilm_pruning.source(task, classes, arguments.train_texts), task
    if name == "resnet20":
        from examples.fashion_mnist.network import resnet20
        from examples.fashion_mnist.task import task

        return resnet20(), task()
    import vgg

    return vgg.trained()


def decomposed(draft, task, target, seed):
    """By Penjing."""
    from penjing.decompose import LowRank
    from penjing.steps.step import Context

    return LowRank(macs=target)(draft, Context(task=task, seed=seed, source=draft.network))


def by_tensorly(draft, task, target, seed):
    """By tensorly, at VBMF ranks that are scaled to the target."""
    from penjing.analyze import meter
    from penjing.decompose.candidates import priced
    from penjing.decompose.eligible import eligible
    from penjing.numerics import vbmf
    from penjing.surgery import factorize

    layers = eligible(draft, task.call(), (), (), ("svd", "tucker"))
    by_noise = {}
    for name, place in layers.places.items():
        matrix, (form,) = place.weight, layers.forms[name]
        axes = (0,) if form == "svd" else (1, 0)
        by_noise[name] = form, [vbmf.rank(matrix.movedim(axis, 0).flatten(1).numpy()) for axis in axes]

    def at(factor):
        chosen = {}
        for name, (form, ranks) in by_noise.items():
            place = layers.places[name]
            out, inputs, _ = place.sizes
            most = (min(out, inputs),) if form == "svd" else (inputs, out)
            ranks = [min(m, max(1, round(factor * r))) for r, m in zip(ranks, most, strict=True)]
            candidate = priced(place, form, ranks, float("nan"))
            if candidate.macs < place.macs:
                chosen[name] = candidate
        return chosen

    whole = meter.amount("macs", draft.network, task.call())

    def left(chosen):
        return 1 - sum(layers.places[name].macs - c.macs for name, c in chosen.items()) / whole

    low, high = 0.02, 20.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if left(at(middle)) <= target else (low, middle)
    draft = draft.copy()
    for name, candidate in at(low).items():
        weights = tensorly_weights(layers.places[name].weight, candidate)
        factorize(draft.network, name, candidate.form, candidate.ranks, weights)
    return draft


def tensorly_weights(weight, candidate):
    """Factors of the plain weight, in the order of execution."""
    import torch
    from tensorly.decomposition import partial_tucker

    if candidate.form == "svd":
        u, s, vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        (rank,) = candidate.ranks
        shapes = [1] * (weight.dim() - 2)
        return (s[:rank, None] * vt[:rank]).reshape(rank, *weight.shape[1:]), u[:, :rank].reshape(-1, rank, *shapes)
    reduced, core = candidate.ranks
    (middle, (out, inputs)), _ = partial_tucker(weight.numpy(), rank=[core, reduced], modes=[0, 1], random_state=0)
    parts = [torch.from_numpy(part.copy()) for part in (inputs.T[:, :, None, None], middle, out[:, :, None, None])]
    used = [reduced < weight.shape[1], True, core < weight.shape[0]]
    if not used[0]:  # a square rotation is part of the convolution behind it
        parts[1] = torch.einsum("oiab,ij->ojab", parts[1], parts[0].flatten(1))
    if not used[2]:
        parts[1] = torch.einsum("oiab,po->piab", parts[1], parts[2].flatten(1))
    return [part for part, of_use in zip(parts, used, strict=True) if of_use]


def by_pruning(draft, task, target, seed, reconstruct=None):
    """By `prune.Channels`."""
    from penjing.prune import Channels
    from penjing.steps.step import Context

    step = Channels(macs=target, round_to=8, reconstruct=reconstruct)
    return step(draft, Context(task=task, seed=seed, source=draft.network))


WAYS = {"penjing": decomposed, "tensorly": by_tensorly, "channels": by_pruning}


def trained(name, network, task, rate, arguments):
    """The network after its training."""
    from pruning_accuracy import shown

    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    settings = Finetune(epochs=arguments.epochs, learning_rate=rate)
    if name == "minilm":
        epochs = arguments.texts / 32 / len(task.train)
        settings = Finetune(epochs=epochs, learning_rate=rate, optimizer="adamw", weight_decay=0.01)
    return train(network, Context(task=task, seed=0, events=shown("training")), settings).eval()


class Networks:
    """Everything of one network: its source, what is made of it, and the ONNX files, each built once."""

    def __init__(self, name, arguments):
        self.name, self.arguments = name, arguments

    @functools.cached_property
    def loaded(self):
        return source(self.name, self.arguments)

    @property
    def task(self):
        return self.loaded[1]

    @functools.cached_property
    def whole(self):
        """The captured source."""
        from penjing.network.capture import capture_network
        from penjing.steps.draft import Draft

        return Draft(capture_network(self.loaded[0], *self.task.call(), self.task.dynamic))

    def made(self, side, fraction):
        """The draft of a side; of "channels 0.4", which is only timed, nothing is fitted."""
        if side == "whole":
            return self.whole
        if side in WAYS:
            return WAYS[side](self.whole, self.task, fraction, 0)
        return by_pruning(self.whole, self.task, fraction, 0, reconstruct=False)

    def folder(self, label):
        from examples.data import cache

        return cache() / "low-rank" / f"{self.name}-{self.arguments.target:g}" / label.replace(" ", "-")

    def write(self, label, draft):
        """Its ONNX file."""
        from penjing.pipeline import building

        folder = self.folder(label)
        aside = folder.with_name(f"{folder.name}.part")
        for old in (aside, folder):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
        building.build(draft, "onnxruntime", "fp32", self.task, {"kind": "tensor"}, aside)
        aside.rename(folder)

    @functools.cached_property
    def inputs(self):
        """Arrays for the largest batch, beside the ONNX files: timing them needs nothing else."""
        import numpy as np

        path = self.folder("inputs").with_suffix(".npz")
        if not path.exists():
            call, largest = self.task.calibration[0], BATCHES[self.name][-1]
            arrays = [call["input_ids"], call["attention_mask"]] if self.name == "minilm" else [call]
            np.savez(path, *(array[:largest].numpy() for array in arrays))
        return list(np.load(path).values())

    def timed(self, labels, batches):
        """(label, batch) → its timing in ONNX Runtime, all in interleaved rounds."""
        from penjing.measure import Target, compare

        targets = [
            Target(f"{label}, batch {batch}", self.folder(label), [array[:batch] for array in self.inputs], batch)
            for label in labels
            for batch in batches
        ]
        timings = compare(targets, threads=THREADS, seconds=self.arguments.seconds)
        return {(label, batch): timings[f"{label}, batch {batch}"].latency for label in labels for batch in batches}


SEARCHED = {f"channels {fraction:g}": fraction for fraction in FRACTIONS}


def files(networks, save, data):
    """The ONNX files that are still to be timed, but for those of the sides that are trained."""
    needed = {} if "speed" in data else {"whole": 1.0}
    if "equal" not in data:
        needed |= {"penjing": networks.arguments.target, **SEARCHED}
    for label, fraction in needed.items():
        if not networks.folder(label).exists():
            start = time.perf_counter()
            networks.write(label, networks.made(label, fraction))
            print(f"{networks.name:<8}{label:<14} built in {time.perf_counter() - start:.0f} s", flush=True)
    if needed:
        assert networks.inputs


def search(networks, save, data):
    """The fraction of the multiply-accumulates at which a pruned network takes as long as `penjing`."""
    import numpy as np

    if "equal" in data:
        return
    batch = BATCHES[networks.name][-1]
    timings = networks.timed(["penjing", *SEARCHED], (batch,))
    ours, times = timings["penjing", batch], [timings[label, batch] for label in SEARCHED]
    rising = np.maximum.accumulate([each.median for each in times])
    if not rising[0] <= ours.median <= rising[-1]:
        sys.exit(f"{ours.median:.1f} ms are not between those of {FRACTIONS}: {rising[0]:.1f} to {rising[-1]:.1f} ms")
    data["search"] = {
        "batch": batch,
        "penjing": {"median_ms": ours.median, "spread": ours.spread},
        "channels": {
            f"{f:g}": {"median_ms": t.median, "spread": t.spread} for f, t in zip(FRACTIONS, times, strict=True)
        },
    }
    data["equal"] = float(np.interp(ours.median, rising, FRACTIONS))
    save("search")
    for label, row in {"LowRank": data["search"]["penjing"], **data["search"]["channels"]}.items():
        print(f"  {label:<10}{row['median_ms']:>9.3f} ms ±{row['spread'] / 2:.0%}")
    print(f"{networks.name} equal at {data['equal']:.3f} of the MACs", flush=True)


def accuracy(networks, save, data):
    """Every side untrained and trained, and its ONNX file."""
    from penjing.analyze import meter
    from penjing.tasks.outputs import numpy_predictor

    name, task = networks.name, networks.task
    if "source" not in data:
        whole = meter.amount("macs", networks.whole.network, task.call())
        data["source"] = {"accuracy": task.evaluate(numpy_predictor(networks.whole.network)), "macs": whole}
        save("accuracy")
    print(f"{name} {data['source']['accuracy']:.4f}", flush=True)
    runs = data.setdefault("runs", {})
    for side in SIDES:
        run = runs.setdefault(side, {"rates": {}})
        if "accuracy" not in run or not ("speed" in data or networks.folder(side).exists()):
            start = time.perf_counter()
            draft = networks.made(side, data["equal"] if side == "channels" else networks.arguments.target)
            run.setdefault("seconds", time.perf_counter() - start)
            networks.write(side, draft)
            _judged(networks, draft, run, lambda: save("accuracy"))
        print(f"{name:<8}{side:<10}{run['accuracy']:>8.4f} ({run['untrained']:.4f} untrained) at rate {run['rate']}"
              f"{run['macs']:>8.1%} of the MACs, {run['params']:.1%} of the parameters", flush=True)  # fmt: skip


def _judged(networks, draft, run, save):
    """What of a side's accuracies and costs is missing."""
    from penjing.analyze import meter
    from penjing.tasks.outputs import numpy_predictor

    name, task = networks.name, networks.task
    if "untrained" not in run:
        run["untrained"] = task.evaluate(numpy_predictor(draft.network))
        amounts = [[meter.amount(u, d.network, task.call()) for u in UNITS] for d in (draft, networks.whole)]
        run |= {unit: part / of for unit, part, of in zip(UNITS, *amounts, strict=True)}
        save()
    for rate in RATES[name]:
        if str(rate) not in run["rates"]:
            start = time.perf_counter()
            network = trained(name, draft.copy().network, task, rate, networks.arguments)
            judges = task.select if RATES[name][1:] else lambda _: 0.0, task.evaluate
            judged = [judge(numpy_predictor(network)) for judge in judges]
            seconds = time.perf_counter() - start
            run["rates"][str(rate)] = {"held_out": judged[0], "accuracy": judged[1], "training_s": seconds}
            save()
    run["measured"] = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
    run["rate"] = max(run["rates"], key=lambda rate: run["rates"][rate]["held_out"])
    run["accuracy"] = run["rates"][run["rate"]]["accuracy"]
    save()


def speed(networks, save, data):
    """Latencies of all sides at both batches."""
    if "speed" not in data:
        timings = networks.timed(["whole", *SIDES], BATCHES[networks.name])
        data["speed"] = {
            f"{side}, batch {batch}": {
                "median_ms": latency.median,
                "spread": latency.spread,
                "speedup": timings["whole", batch].median / latency.median,
            }
            for (side, batch), latency in timings.items()
        }
        save("speed")
    for label, row in data["speed"].items():
        print(f"  {label:<24}{row['median_ms']:>9.3f} ms ±{row['spread'] / 2:.0%}{row['speedup']:>8.2f}×")


def forget(networks, part, data):
    """What a part has measured; after a new search `channels` is another network."""
    for key in {"files": ["search", "equal"], "search": ["search", "equal"], "accuracy": ["runs"]}.get(part, [part]):
        data.pop(key, None)
    if part == "files":
        shutil.rmtree(networks.folder("whole").parent, ignore_errors=True)
    if "equal" not in data:
        data.get("runs", {}).pop("channels", None)
        shutil.rmtree(networks.folder("channels"), ignore_errors=True)


def main() -> None:
    """Run all that is missing, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vgg16", "minilm"], choices=list(BATCHES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--again", action="store_true", help="measure these parts anew")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=0.3, help="of Fashion-MNIST")
    parser.add_argument("--train-texts", type=int, default=3000, help="that MiniLM's classifier is trained on")
    parser.add_argument("--texts", type=int, default=500, help="of the training behind the decomposition")
    parser.add_argument("--judged", type=int, default=400, help="at most so many test texts")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch; timings have two")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/low_rank.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure

    torch.set_num_threads(arguments.threads)
    data = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "target": arguments.target}
    data["versions"]["tensorly"] = importlib.metadata.version("tensorly")
    data |= {"epochs": arguments.epochs, "texts": arguments.texts, "networks": {}}
    if arguments.out.exists():
        data["networks"] = json.loads(arguments.out.read_text())["networks"]

    for name in arguments.networks:
        of_network = data["networks"].setdefault(name, {})

        def save(part, of_network=of_network):
            of_network.setdefault("measured", {})[part] = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

        networks = Networks(name, arguments)
        for part in arguments.parts if arguments.again else ():
            forget(networks, part, of_network)
        for part in (part for part in PARTS if part in arguments.parts):
            WORK[part](networks, save, of_network)
    print(f"\n{arguments.out}")


WORK = {"files": files, "search": search, "accuracy": accuracy, "speed": speed}

if __name__ == "__main__":
    main()
