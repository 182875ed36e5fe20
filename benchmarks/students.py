"""Every distillation loss on two pairs of networks: the gain over training on labels alone.

Fashion-MNIST. `resnet`: ResNet-56 teaches ResNet-20. `mobilenet`: MobileNetV2 teaches a MobileNetV2 of `--width`. The
student starts from random weights, or, if marked *copied*, from the teacher's: ResNet-20 with the first, fourth and
seventh block of every stage (`distill.FewerLayers`), MobileNetV2 with the channels that `prune.Channels` keeps at the
MACs of the narrow one. All use the same batches in the same order, with the same optimizer, learning rate and epochs:
`labels` trains on labels alone, `Logits` is plain distillation (Hinton et al. 2015), the others add the loss they are
named after, feature losses both with and without `Logits`. *Gap closed* is relative to the gap between the student on
labels and the teacher, averaged over seeds. The test images are read once per run.

Every loss is run with all seeds. `labels` and the best of the others (by held-out training images) are trained once
more for `--long` epochs with the first seed, to approach convergence.

    python benchmarks/students.py [--pairs resnet mobilenet] [--epochs 4] [--teacher-epochs 5 6] [--seeds 0 1 2]
        [--width 0.35] [--ways labels Logits ...] [--long 12]

Teachers are trained first and cached, and so are their outputs for the images of a seed, for the losses that need
nothing else. A teacher that is retrained, on another machine or with an empty cache, is a different one: every run is
recorded with the accuracy of its own teacher, and compared with it. Every finished run is written immediately; a second
call resumes where the first stopped.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
RATE = {"resnet": 0.1, "mobilenet": 0.02}
BATCH = 64  # small, so that a few epochs have many steps
# Features of student and teacher: after each stage; after the blocks that downsample.
INSIDE = {
    "resnet": tuple((f"stages.{i}", f"stages.{i}") for i in range(3)),
    "mobilenet": tuple((f"blocks.{i}", f"blocks.{i}") for i in (2, 5, 12, 16)),
}


def networks(pair, width):
    """Teacher and student, with random weights."""
    from penjing.architectures import build

    if pair == "resnet":
        return build("resnet56", in_channels=1, classes=10), build("resnet20", in_channels=1, classes=10)
    return tuple(build("mobilenet_v2", in_channels=1, classes=10, width=w) for w in (1.0, width))


def ways(pair):
    """The distillation losses by name."""
    from penjing import distill

    inside, logits = INSIDE[pair], distill.Logits()
    return {
        "labels": (),
        "Logits": logits,
        "Logits, weight 0.25": distill.Logits(weight=0.25),
        "HardLabels": distill.HardLabels(),
        "DKD": distill.DKD(),
        "DIST": distill.DIST(),
        "DIST, temperature 4": distill.DIST(temperature=4.0),
        "Hints": distill.Hints(features=inside[1:2]),
        "Hints, every stage": distill.Hints(features=inside),
        "AttentionTransfer": distill.AttentionTransfer(features=inside, weight=5.0),
        "AttentionTransfer, last stage": distill.AttentionTransfer(features=inside[-1:], weight=5.0),
        "RKD": distill.RKD(),
        "SimilarityPreserving": distill.SimilarityPreserving(features=inside[-1:]),
        "CRD": distill.CRD(features=inside[-1:]),
        "Logits and AttentionTransfer": (logits, distill.AttentionTransfer(features=inside, weight=5.0)),
        "Logits and CRD": (logits, distill.CRD(features=inside[-1:])),
        "copied, labels": (),
        "copied, Logits": logits,
        "copied, Logits and AttentionTransfer": (logits, distill.AttentionTransfer(features=inside, weight=5.0)),
    }


def student(pair, name, arguments, task, source, seed):
    """The initial student of a method, in fp32."""
    from pruning_accuracy import macs

    from penjing import distill, prune
    from penjing.network.capture import capture_network
    from penjing.randomness import seed_everything
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    seed_everything(seed)
    teacher, narrow = networks(pair, arguments.width)
    if not name.startswith("copied"):
        return capture_network(narrow, *task.call(), task.dynamic)
    if pair == "resnet":
        steps = [distill.FewerLayers(of=f"stages.{i}", keep=3) for i in range(3)]
    else:
        steps = [prune.Channels(macs=macs(narrow, task) / macs(teacher, task))]
    draft = Draft(source)
    for step in steps:
        draft = step(draft, Context(task=task, source=source, seed=seed))
    return draft.network


def spread(values):
    """Mean and span over seeds."""
    return {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values), "seeds": len(values)}


def cycles(arguments, count=None):
    """The cycles of the teacher's training as text."""
    return "+".join(f"{epochs:g}" for epochs in arguments.teacher_epochs[:count])


def taught(pair, arguments, task):
    """The teacher, trained once with Penjing's loop and cached.

    Every number of `--teacher-epochs` is a learning-rate cycle (warm restarts, Loshchilov & Hutter 2017); earlier
    cycles are kept.
    """
    from pruning_accuracy import shown
    from safetensors.torch import load_file, save_file

    from examples.data import cache
    from penjing.randomness import seed_everything
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    seed_everything(0)
    teacher, _ = networks(pair, arguments.width)
    path = None
    for cycle in range(1, 1 + len(arguments.teacher_epochs)):
        before, path = path, cache() / f"teacher-{pair}-fashion-mnist-{cycles(arguments, cycle)}-{BATCH}.safetensors"
        if path.exists():
            continue
        if before is not None:
            teacher.load_state_dict(load_file(before))
        state = cache() / f"{path.stem}-training"
        state.mkdir(exist_ok=True)
        context = Context(task=task, seed=cycle - 1, folder=state, events=shown(f"teacher of {pair}, cycle {cycle}"))
        train(teacher, context, Finetune(epochs=arguments.teacher_epochs[cycle - 1], learning_rate=RATE[pair]))
        save_file({k: v.contiguous() for k, v in teacher.state_dict().items()}, path)
    teacher.load_state_dict(load_file(path))
    return teacher.eval()


def measured(pair, arguments, task, data, save):
    """Train the student with every loss."""
    from pruning_accuracy import macs, shown

    from examples.data import cache
    from penjing.distill import TeacherCache
    from penjing.network.capture import capture_network
    from penjing.steps.step import Context
    from penjing.tasks.outputs import numpy_predictor
    from penjing.train.finetune import Finetune, train

    entry = data["pairs"].setdefault(pair, {})
    teacher = taught(pair, arguments, task)
    source = capture_network(teacher, *task.call(), task.dynamic)
    reached = task.evaluate(numpy_predictor(teacher))
    print(f"{pair}: teacher {reached:.4f}", flush=True)
    every = {name: way for name, way in ways(pair).items() if name in (arguments.ways or ways(pair))}

    def asked(losses, seed, epochs):
        """The teacher's cached outputs if a loss needs nothing else; None is the source."""
        losses = losses if isinstance(losses, tuple) else (losses,)
        if not losses or any(getattr(loss, "features", ()) for loss in losses):
            return None
        return TeacherCache(cache() / f"answers-{pair}-{cycles(arguments)}-{epochs:g}-{seed}", teacher)

    def ran(name, seed, epochs=arguments.epochs):
        key = f"{pair} {arguments.width:g} {name} epochs {epochs:g} of {cycles(arguments)} seed {seed}"
        if key not in data["runs"]:
            start = time.perf_counter()
            begun = student(pair, name, arguments, task, source, seed)
            answers = asked(every[name], seed, epochs)
            settings = Finetune(epochs=epochs, learning_rate=RATE[pair], distill=every[name], teacher=answers)
            context = Context(task=task, source=source, seed=seed, events=shown(key))
            predict = numpy_predictor(train(begun, context, settings).eval())
            data["runs"][key] = {
                "held_out": task.select(predict), "accuracy": task.evaluate(predict), "macs": macs(begun, task),
                "teacher": reached, "seconds": time.perf_counter() - start,
            }  # fmt: skip
            save()
        row = data["runs"][key]
        print(f"{key:<78}{row['held_out']:>8.4f}{row['accuracy']:>8.4f}{row['seconds']:>7.0f} s", flush=True)
        return row

    runs = {name: [] for name in every}
    for seed in arguments.seeds:
        for name in every:
            runs[name].append(ran(name, seed))
    others = [name for name in every if name not in ("labels", "Logits")]
    best = max(others, key=lambda n: statistics.mean(row["held_out"] for row in runs[n]), default="Logits")
    entry["teacher"] = spread({row["teacher"] for rows in runs.values() for row in rows}) | {
        "macs": macs(teacher, task), "student_macs": macs(networks(pair, arguments.width)[1], task),
    }  # fmt: skip
    entry["best"], entry["accuracy"] = best, {}
    for name, rows in runs.items():
        entry["accuracy"][name] = spread([row["accuracy"] for row in rows]) | {"epochs": arguments.epochs}
    if "labels" in runs:
        plain = entry["accuracy"]["labels"]["mean"]
        for name, row in entry["accuracy"].items():
            gaps = [(run["accuracy"] - plain) / (run["teacher"] - plain) for run in runs[name]]
            row["gap_closed"] = round(statistics.mean(gaps), 6) + 0.0  # never -0.0
            print(f"  {name:<38}{row['mean']:>8.4f} ({row['lowest']:.4f} to {row['highest']:.4f}, "
                  f"{row['seeds']} seeds)  gap closed {row['gap_closed']:+.2f}")  # fmt: skip
    if arguments.long:
        longer = {name: ran(name, arguments.seeds[0], arguments.long)["accuracy"] for name in ("labels", best)}
        entry["long"] = {"epochs": arguments.long, "accuracy": longer}
    save()


def main() -> None:
    """Run all that is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["resnet", "mobilenet"], choices=list(RATE))
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--teacher-epochs", type=float, nargs="+", default=[5.0, 6.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long", type=float)
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/students.json")
    arguments = parser.parse_args()
    import torch

    from examples.fashion_mnist.task import task as fashion_mnist
    from penjing import measure

    torch.set_num_threads(arguments.threads)
    task = fashion_mnist(BATCH)
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}, "pairs": {}}

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for pair in arguments.pairs:
        measured(pair, arguments, task, data, save)
        where = {"machine": vars(measure.machine(arguments.threads)), "versions": measure.versions()}
        data["pairs"][pair]["measured on"] = where
        save()
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
