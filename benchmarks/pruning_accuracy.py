"""Accuracy and latency at half and a quarter of the multiply-accumulates, compared with Torch-Pruning.

ResNet-20 and VGG-16 (the form for small images) on Fashion-MNIST. Both sides start from the same trained network,
prune once to the same fraction, and fine-tune in the same loop: the same batches in the same order, labels alone, the
same optimizer, learning rate and epochs. Channels are kept in multiples of 4 (ResNet-20) and 8 (VGG-16) on both sides.

Settings are selected for each side: each candidate is pruned and trained for `--select-epochs`, and the one with the
best accuracy on held-out training images is trained in full with every seed. The test images are read twice per seed,
before and after training.

Penjing: `prune.Channels(macs=..., reconstruct=True)` with several criteria and scopes; *fitted* means that the layers
that read removed channels are refitted to their original outputs, without labels. Torch-Pruning: `BasePruner` with
`iterative_steps`, stepped until the target is met, as in its own benchmarks, with several of its importances, global
and local. *Untrained* is the accuracy before any training.

Speed: ONNX and OpenVINO files of full and pruned networks, batch 32, in interleaved rounds. *Of MACs* is the measured
speed-up relative to the ratio of multiply-accumulates. `--parts widths` times a single convolution at many widths.

    python benchmarks/pruning_accuracy.py [--networks resnet20 vgg16] [--targets 0.5 0.25] [--seeds 0 1 2]
        [--epochs 2] [--select-epochs 0.2] [--parts accuracy speed widths] [--train-epochs 3]

VGG-16 is trained first (`--train-epochs`) and cached. Every finished run is written immediately; a second call resumes
where the first stopped.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
BATCH = 32
ROUND_TO = {"resnet20": 4, "vgg16": 8}
WIDTHS = (4, 8, 12, 16, 24, 32, 48, 64)
RATE = {"resnet20": 0.05, "vgg16": 0.02}
PENJING = ("taylor global fitted", "taylor layer fitted", "taylor sensitivity fitted", "l2 layer fitted")
TORCH_PRUNING = ("taylor global", "taylor local", "hessian global", "bn_scale global", "l2 global", "l2 local",
                 "lamp global")  # fmt: skip


def source(name, epochs):
    """The trained module and its task."""
    from examples.fashion_mnist.task import task

    if name == "resnet20":
        from examples.fashion_mnist.network import resnet20

        return resnet20(), task()
    return trained_vgg(task(), epochs), task()


def trained_vgg(task, epochs):
    """VGG-16 for small images, trained once with Penjing's loop and cached."""
    from safetensors.torch import load_file, save_file

    from examples.data import cache
    from penjing.architectures import build
    from penjing.randomness import seed_everything
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    path = cache() / f"vgg16_small-fashion-mnist-{epochs:g}.safetensors"
    seed_everything(0)
    network = build("vgg16_small", in_channels=1, classes=10)
    if not path.exists():
        state = cache() / f"{path.stem}-training"
        state.mkdir(exist_ok=True)
        context = Context(task=task, seed=0, folder=state, events=shown("training VGG-16"))
        train(network, context, Finetune(epochs=epochs, learning_rate=0.1, warmup=0.2))
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    network.load_state_dict(load_file(path))
    return network.eval()


def shown(label):
    """Print training progress every half minute."""
    last = [time.monotonic()]

    def show(kind, **values):
        if kind == "progress" and "loss" in values and time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"  {label}: {values['done']}/{values['total']}  loss {values['loss']:.4f}", flush=True)

    return show


def penjing(settings, name, module, task, target, seed):
    """Prune with `prune.Channels`; return the captured network."""
    from penjing.network.capture import capture_network
    from penjing.prune import Channels
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    criterion, scope, *fitted = settings.split()
    raised = capture_network(module, *task.call())
    step = Channels(macs=target, criterion=criterion, scope=scope, round_to=ROUND_TO[name], reconstruct=bool(fitted))
    return step(Draft(raised), Context(task=task, source=raised, seed=seed)).network


def torch_pruning(settings, name, module, task, target, seed):
    """Prune with Torch-Pruning; return the module."""
    import torch
    import torch_pruning as tp

    from penjing.randomness import seed_everything

    seed_everything(seed)
    model, example = copy.deepcopy(module), task.example[:1]
    word, scope = settings.split()
    importance = {
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "l2": tp.importance.GroupMagnitudeImportance,
        "lamp": tp.importance.LAMPImportance,
    }[word]()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=scope == "global",
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,  # like Penjing's `min_keep`: a tenth of every group is kept
        iterative_steps=400,
        ignored_layers=[model.classifier],
        round_to=ROUND_TO[name],
    )
    whole, _ = tp.utils.count_ops_and_params(model, example)
    if word == "taylor":
        for _, (x, y) in zip(range(20), task.train, strict=False):
            task.loss(model(x), y).backward()
    elif word == "hessian":
        x, y = next(iter(task.train))
        losses = torch.nn.functional.cross_entropy(model(x[:128]), y[:128], reduction="none")
        importance.zero_grad()
        for loss in losses:
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
    for _ in range(400):
        if tp.utils.count_ops_and_params(model, example)[0] <= target * whole:
            break
        pruner.step()
    model.zero_grad()
    return model


def macs(network, task):
    """Multiply-accumulates of one sample."""
    from penjing.analyze.cost import cost, totals
    from penjing.network.capture import capture_network

    return totals(cost(capture_network(network, *task.call()), task.call())).macs


def finetuned(network, name, task, seed, epochs, label):
    """Train the network as on both sides."""
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    settings = Finetune(epochs=epochs, learning_rate=RATE[name])
    return train(network, Context(task=task, seed=seed, events=shown(label)), settings)


SIDES = {"penjing": (penjing, PENJING), "torch-pruning": (torch_pruning, TORCH_PRUNING)}


def accuracies(arguments, name, data, save):
    """Select the settings of both sides, train them, and record the test accuracy."""
    from penjing.tasks.outputs import numpy_predictor

    module, task = source(name, arguments.train_epochs)
    entry = data["networks"].setdefault(name, {})
    trained = arguments.train_epochs if name == "vgg16" else None  # ResNet-20 comes trained
    if entry.get("source", {}).get("epochs") != trained:  # results of another source network are not part of the table
        entry.clear()
        data["runs"] = {key: row for key, row in data["runs"].items() if not key.startswith(f"{name} ")}
    if "source" not in entry:
        entry["source"] = {"accuracy": task.evaluate(numpy_predictor(module)), "macs": macs(module, task)}
        entry["source"] |= {"epochs": trained} if trained else {}

    def ran(side, settings, target, epochs, seed, judge):
        key = f"{name} macs {target:g} {side} {settings} epochs {epochs:g} seed {seed} {judge}"
        if key not in data["runs"]:
            start = time.perf_counter()
            network = SIDES[side][0](settings, name, module, task, target, seed)
            pruned_s, share = time.perf_counter() - start, macs(network, task) / entry["source"]["macs"]
            untrained = getattr(task, judge)(numpy_predictor(network.eval()))
            network = finetuned(network, name, task, seed, epochs, key)
            accuracy = getattr(task, judge)(numpy_predictor(network.eval()))
            seconds = time.perf_counter() - start
            data["runs"][key] = {
                "accuracy": accuracy, "untrained": untrained, "macs": share, "prune_s": pruned_s, "seconds": seconds,
            }  # fmt: skip
            save()
        row = data["runs"][key]
        print(f"{key:<84}{row['accuracy']:>8.4f}{row['macs']:>8.1%}{row['seconds']:>7.0f} s", flush=True)
        return row

    for target in arguments.targets:
        table = entry.setdefault("accuracy", {}).setdefault(f"{target:g}", {})
        for side, (_, every) in SIDES.items():
            chosen = max(every, key=lambda s: ran(side, s, target, arguments.select_epochs, 0, "select")["accuracy"])
            rows = [ran(side, chosen, target, arguments.epochs, seed, "evaluate") for seed in arguments.seeds]
            values = [row["accuracy"] for row in rows]
            table[side] = {
                "settings": chosen,
                "epochs": arguments.epochs,
                "accuracy": statistics.median(values),
                "mean": statistics.mean(values),
                "lowest": min(values),
                "highest": max(values),
                "macs": max(row["macs"] for row in rows),
                "untrained": statistics.median(row["untrained"] for row in rows),
            }
            save()


def speeds(arguments, name, data, save):
    """Time full and pruned networks in the runtimes in interleaved rounds."""
    import torch

    from penjing.measure import Target, compare
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.steps.draft import Draft
    from penjing.tasks.outputs import to_numpy

    module, task = source(name, arguments.train_epochs)
    entry = data["networks"].setdefault(name, {})
    whole = macs(module, task)
    with tempfile.TemporaryDirectory() as aside:
        targets, shares = [], {}
        image = to_numpy(torch.cat([task.calibration[0]] * 2)[:BATCH])
        for target in (1.0, *arguments.targets):
            for side, (prune, every) in SIDES.items():
                if target == 1 and side != "penjing":
                    continue
                known = entry.get("accuracy", {}).get(f"{target:g}", {}).get(side, {})
                settings = known.get("settings", every[0])
                network = module if target == 1 else prune(settings, name, module, task, target, 0)
                raised = capture_network(network, *task.call(), task.dynamic)
                label = "whole" if target == 1 else f"{side} {target:g}"
                shares[label] = macs(network, task) / whole
                for runtime in ("onnxruntime", "openvino"):
                    folder = Path(aside) / f"{label} {runtime}"
                    folder.mkdir()
                    building.build(Draft(raised), runtime, "fp32", task, {"kind": "tensor"}, folder)
                    targets.append(Target(folder.name, folder, [image], BATCH))
        timings = compare(targets, threads=THREADS, seconds=arguments.seconds)
    rows = {}
    for target in targets:
        label, _, runtime = target.name.rpartition(" ")
        latency, before = timings[target.name].latency, timings[f"whole {runtime}"].latency
        speedup = before.median / latency.median
        rows[target.name] = {
            "median_ms": latency.median, "spread": latency.spread, "macs": shares[label], "speedup": speedup,
            "of_macs": speedup * shares[label],
        }  # fmt: skip
        print(f"{name} {target.name:<40}{latency.median:>9.2f} ms  spread {latency.spread:>4.0%}", end="")
        print(f"  macs {shares[label]:>6.1%}  {speedup:.2f}x  of MACs {speedup * shares[label]:.2f}", flush=True)
    entry["speed"] = rows
    save()


def widths(arguments, name, data, save):
    """Time a single 3x3 convolution at many widths: what removing a channel saves in each runtime."""
    import torch

    from penjing.measure import Target, compare
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.steps.draft import Draft
    from penjing.tasks.task import Task

    pixels, targets = 28, []
    with tempfile.TemporaryDirectory() as aside:
        for width in WIDTHS:
            image = torch.randn(BATCH, width, pixels, pixels)
            task = Task(example=image[:2], calibration=[image])
            network = torch.nn.Sequential(torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU())
            raised = capture_network(network, *task.call(), task.dynamic)
            for runtime in ("onnxruntime", "openvino"):
                folder = Path(aside) / f"{width} {runtime}"
                folder.mkdir()
                building.build(Draft(raised), runtime, "fp32", task, {"kind": "tensor"}, folder)
                targets.append(Target(folder.name, folder, [image.numpy()], BATCH))
        timings = compare(targets, threads=THREADS, seconds=arguments.seconds)
    table = data["widths"] = {"batch": BATCH, "pixels": pixels, "rows": {}}
    for width in WIDTHS:
        macs = BATCH * pixels**2 * 9 * width**2
        row = {runtime: timings[f"{width} {runtime}"].latency for runtime in ("onnxruntime", "openvino")}
        table["rows"][str(width)] = {
            runtime: {"median_ms": t.median, "spread": t.spread, "gmacs_per_s": macs / t.median / 1e6}
            for runtime, t in row.items()
        }
        print(
            f"{width:>4} channels", {k: f"{v['gmacs_per_s']:.1f} GMAC/s" for k, v in table["rows"][str(width)].items()}
        )
    save()


PARTS = {"accuracy": accuracies, "speed": speeds, "widths": widths}


def main() -> None:
    """Run all that is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg16"], choices=list(ROUND_TO))
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--select-epochs", type=float, default=0.2)
    parser.add_argument("--train-epochs", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "speed"], choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pruning_accuracy.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure

    torch.set_num_threads(THREADS)
    where = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions()}
    where["versions"]["torch-pruning"] = importlib.metadata.version("torch-pruning")
    data = {"runs": {}, "networks": {}}
    if arguments.out.exists():
        data |= json.loads(arguments.out.read_text())

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for name in arguments.networks:
        for part in arguments.parts:
            PARTS[part](arguments, name, data, save)
            (data["widths"] if part == "widths" else data["networks"][name])[f"{part} measured on"] = where
            save()
    for name, entry in data["networks"].items():
        print(f"\n{name}, whole {entry['source']['accuracy']:.4f}")
        for target, sides in entry.get("accuracy", {}).items():
            for side, row in sides.items():
                print(f"  macs {target:>5} {side:<15}{row['settings']:<20}{row['accuracy']:>8.4f} "
                      f"({row['lowest']:.4f} to {row['highest']:.4f}), macs {row['macs']:.1%}")  # fmt: skip
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
