"""Low rank at half of the multiply-accumulates, beside tensorly with VBMF ranks and beside pruning.

VGG-16 (the form for small images) on Fashion-MNIST, and MiniLM with a classifier on 20 newsgroups. All sides start from
the same trained network and train in the same loop: the same batches in the same order, labels alone, the same
optimizer and length; for VGG-16 the learning rate is selected for each side on held-out images, from the same two.

- *penjing*: `decompose.LowRank(macs=0.5)`, its ranks, weighing and refit as they are by default.
- *tensorly*: Kim et al., ICLR 2016: VBMF ranks of every layer, all multiplied with the one factor that gives the same
  multiply-accumulates, weights by `tensorly.decomposition.partial_tucker`, linear layers by truncated SVD.
- *channels*: `prune.Channels`, at the fraction of the multiply-accumulates at which its ONNX file takes as long as that
  of *penjing*.

*Untrained* is the accuracy before any training. Speed: ONNX files in ONNX Runtime, in interleaved rounds.

    python benchmarks/low_rank.py [--networks vgg16 minilm] [--target 0.5] [--epochs 0.3] [--texts 500] [--judged 400]

Every finished run is written immediately; a second call resumes where the first stopped.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
THREADS = 2
UNITS = ("macs", "params")
SIDES = ("penjing", "tensorly", "channels")
FRACTIONS = (0.4, 0.55, 0.75)  # of the multiply-accumulates: where the latency of `channels` is measured
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


def by_pruning(draft, task, target, seed):
    """By `prune.Channels`."""
    from penjing.prune import Channels
    from penjing.steps.step import Context

    return Channels(macs=target, round_to=8)(draft, Context(task=task, seed=seed, source=draft.network))


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


@contextlib.contextmanager
def built(name, drafts, task):
    """Side → folder of its ONNX file."""
    from penjing.pipeline import building

    with tempfile.TemporaryDirectory() as aside:
        folders = {}
        for side, draft in drafts.items():
            folders[side] = Path(aside) / side.replace(" ", "-")
            folders[side].mkdir()
            building.build(draft, "onnxruntime", "fp32", task, {"kind": "tensor"}, folders[side])
        yield folders


def timed(name, drafts, task, batches, seconds):
    """(side, batch) → its timing in ONNX Runtime, all in interleaved rounds."""
    from penjing.measure import Target, compare

    def inputs(batch):
        if name == "minilm":
            call = {k: v[:batch].numpy() for k, v in task.calibration[0].items()}
            return [call["input_ids"], call["attention_mask"]]
        return [task.calibration[0][:batch].numpy()]

    with built(name, drafts, task) as folders:
        targets = [
            Target(f"{side}, batch {batch}", folder, inputs(batch), batch)
            for side, folder in folders.items()
            for batch in batches
        ]
        timings = compare(targets, threads=THREADS, seconds=seconds)
    return {(side, batch): timings[f"{side}, batch {batch}"].latency for side in folders for batch in batches}


def equal_fraction(name, draft, task, penjing, arguments):
    """The fraction of the multiply-accumulates at which a pruned network takes as long as `penjing`, batch 1."""
    import numpy as np

    batch = BATCHES[name][-1]
    drafts = {f"channels {f:g}": by_pruning(draft, task, f, 0) for f in FRACTIONS}
    timings = timed(name, {"penjing": penjing, **drafts}, task, (batch,), arguments.seconds)
    times = np.maximum.accumulate([timings[f"channels {f:g}", batch].median for f in FRACTIONS])
    return float(np.interp(timings["penjing", batch].median, times, FRACTIONS))


def measured(name, arguments, save, data):
    """Everything of one network that is missing."""
    from penjing.analyze import meter
    from penjing.network.capture import capture_network
    from penjing.steps.draft import Draft
    from penjing.tasks.outputs import numpy_predictor

    module, task = source(name, arguments)
    draft = Draft(capture_network(module, *task.call(), task.dynamic))
    whole = meter.amount("macs", draft.network, task.call())
    if "source" not in data:
        data["source"] = {"accuracy": task.evaluate(numpy_predictor(draft.network)), "macs": whole}
        save()
    print(f"{name} {data['source']['accuracy']:.4f}", flush=True)
    drafts, runs = {}, data.setdefault("runs", {})
    for side in SIDES:
        start = time.perf_counter()
        fraction = arguments.target
        if side == "channels":
            fraction = data.get("equal") or equal_fraction(name, draft, task, drafts["penjing"], arguments)
            data["equal"] = fraction
            save()
        drafts[side] = WAYS[side](draft, task, fraction, 0)
        seconds = time.perf_counter() - start
        run = runs.setdefault(side, {"seconds": seconds, "rates": {}})
        if "untrained" not in run:
            run["untrained"] = task.evaluate(numpy_predictor(drafts[side].network))
            print(f"{name:<8}{side:<10} untrained {run['untrained']:.4f} after {seconds:.0f} s", flush=True)
            amounts = [[meter.amount(u, d.network, task.call()) for u in UNITS] for d in (drafts[side], draft)]
            run |= {unit: part / of for unit, part, of in zip(UNITS, *amounts, strict=True)}
        for rate in RATES[name]:
            if str(rate) not in run["rates"]:
                start = time.perf_counter()
                network = trained(name, drafts[side].copy().network, task, rate, arguments)
                judges = task.select if RATES[name][1:] else lambda _: 0.0, task.evaluate
                judged = [judge(numpy_predictor(network)) for judge in judges]
                seconds = time.perf_counter() - start
                run["rates"][str(rate)] = {"held_out": judged[0], "accuracy": judged[1], "training_s": seconds}
                save()
        run["rate"] = max(run["rates"], key=lambda rate: run["rates"][rate]["held_out"])
        run["accuracy"] = run["rates"][run["rate"]]["accuracy"]
        save()
        print(f"{name:<8}{side:<10}{run['accuracy']:>8.4f} ({run['untrained']:.4f} untrained) at rate {run['rate']}"
              f"{run['macs']:>8.1%} of the MACs, {run['params']:.1%} of the parameters", flush=True)  # fmt: skip
    if "speed" not in data:
        timings = timed(name, {"whole": draft, **drafts}, task, BATCHES[name], arguments.seconds)
        data["speed"] = {
            f"{side}, batch {batch}": {
                "median_ms": latency.median,
                "spread": latency.spread,
                "speedup": timings["whole", batch].median / latency.median,
            }
            for (side, batch), latency in timings.items()
        }
        save()
    for label, row in data["speed"].items():
        print(f"  {label:<24}{row['median_ms']:>9.3f} ms ±{row['spread'] / 2:.0%}{row['speedup']:>8.2f}×")


def main() -> None:
    """Run all that is missing, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vgg16", "minilm"], choices=list(BATCHES))
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

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for name in arguments.networks:
        measured(name, arguments, save, data["networks"].setdefault(name, {}))
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
