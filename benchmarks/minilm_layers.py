"""MiniLM with three of its six layers, trained on labels alone and distilled from the full network with every loss.

The classifier of `minilm_pruning.py` (all-MiniLM-L6-v2, 20 Newsgroups), trained on `--train-texts` texts. The student
has every second layer and is trained on the same texts in the same order, with the same optimizer, learning rate and
steps. *Plain* has no teacher: layers of the published encoder, a new classifier, labels alone; once also with as many
additional texts as the teacher was trained on, since the teacher's layers carry what it has seen. All others start from
the teacher's layers (`distill.FewerLayers`, as DistilBERT): `labels` trains on labels alone, the others add the loss
they are named after. *Gap closed* is relative to the gap between the plain student and the teacher, averaged over
seeds. The test texts are read once per run. The teacher's outputs for the texts of a seed are cached for the losses
that need nothing else.

Every method is run with all seeds, those of `--once`, whose runs are long, with the first only. The best method has the
best mean on held-out training texts.

Speed: ONNX and OpenVINO files of both, batch 1 and 16, 128 tokens, timed in interleaved rounds.

    python benchmarks/minilm_layers.py [--seeds 0 1 2] [--texts 10000] [--train-texts 6000 10000]
        [--ways plain labels ...] [--once "plain, the teacher's texts besides"] [--parts accuracy speed]

Every finished run is written immediately; a second call resumes where the first stopped.
"""

import argparse
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
STACK = "model.encoder.layer"
KEPT = (0, 2, 4)  # of six; the student's layer i corresponds to the teacher's i + 1


PLAIN, LONGER = "plain", "plain, the teacher's texts besides"
UNTAUGHT = (PLAIN, LONGER, "labels")


def ways():
    """The distillation losses by name."""
    from penjing import distill

    pairs = tuple((f"{STACK}.{i}", f"{STACK}.{i + 1}") for i in KEPT)
    logits = distill.Logits()
    return {
        PLAIN: (),
        LONGER: (),
        "labels": (),
        "Logits": logits,
        "HardLabels": distill.HardLabels(),
        "DKD": distill.DKD(),
        "DIST": distill.DIST(),
        "Hints": distill.Hints(features=pairs),
        "RKD": distill.RKD(),
        "SimilarityPreserving": distill.SimilarityPreserving(features=pairs[-1:]),
        "CRD": distill.CRD(features=pairs[-1:]),
        "TinyBERT": distill.TinyBERT(hidden=pairs, attention=pairs, weight=0.05),
        "Logits and Hints": (logits, distill.Hints(features=pairs)),
    }


def cycles(arguments, count=None):
    """The cycles of the teacher's training as text."""
    return "+".join(map(str, arguments.train_texts[:count]))


def taught(arguments, task, classes):
    """Train the full classifier; every number of `--train-texts` is a learning-rate cycle (warm restart)."""
    from safetensors.torch import load_file, save_file

    from benchmarks.minilm_pruning import source, trained
    from examples.data import cache

    module = source(task, classes, arguments.train_texts[0])
    for cycle in range(2, 1 + len(arguments.train_texts)):
        path = cache() / f"minilm-20newsgroups-{cycles(arguments, cycle)}.safetensors"
        if not path.exists():
            state = cache() / f"{path.stem}-training"
            state.mkdir(exist_ok=True)
            trained(module, task, cycle - 1, arguments.train_texts[cycle - 1], f"teacher, cycle {cycle}", state)
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
        module.load_state_dict(load_file(path))
    return module.eval()


def student(module, task):
    """A draft of the network with three layers."""
    from penjing.distill import FewerLayers
    from penjing.network.capture import capture_network
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    raised = capture_network(module, *task.call(), task.dynamic)
    return FewerLayers(of=STACK, keep=KEPT)(Draft(raised), Context(task=task)), raised


def accuracies(arguments, module, task, data, save):
    """Train the student with every loss."""
    from benchmarks.minilm_pruning import RATE, TRAIN_BATCH, classifier, macs, shown
    from examples.data import cache
    from penjing import measure
    from penjing.distill import TeacherCache
    from penjing.randomness import seed_everything
    from penjing.steps.step import Context
    from penjing.tasks.outputs import numpy_predictor
    from penjing.train.finetune import Finetune, train

    if data.get("teacher", {}).get("texts") != cycles(arguments):
        accuracy = task.evaluate(numpy_predictor(module))
        data["teacher"] = {"accuracy": accuracy, "macs": macs(module, task), "texts": cycles(arguments)}
        save()
    print(f"teacher {data['teacher']['accuracy']:.4f}", flush=True)
    every = {name: way for name, way in ways().items() if name in (arguments.ways or ways())}

    def asked(losses, source, seed):
        """The teacher's cached outputs if a loss needs nothing else; None is the source."""
        losses = losses if isinstance(losses, tuple) else (losses,)
        if not losses or any(getattr(loss, "features", ()) for loss in losses):
            return None
        return TeacherCache(cache() / f"answers-minilm-{cycles(arguments)}-{arguments.texts}-{seed}", source)

    def ran(name, seed):
        texts = arguments.texts + (sum(arguments.train_texts) if name == LONGER else 0)
        key = f"{name}, {arguments.texts} texts of {cycles(arguments)}, seed {seed}"
        if key not in data["runs"]:
            start = time.perf_counter()
            seed_everything(seed)
            begun = classifier(module.classifier.out_features) if name in (PLAIN, LONGER) else module
            draft, source = student(begun, task)
            settings = Finetune(
                epochs=texts / TRAIN_BATCH / len(task.train), learning_rate=RATE, optimizer="adamw",
                weight_decay=0.01, distill=every[name], teacher=asked(every[name], source, seed),
            )  # fmt: skip
            context = Context(task=task, source=source, seed=seed, events=shown(key))
            predict = numpy_predictor(train(draft.network, context, settings).eval())
            data["runs"][key] = {
                "held_out": task.select(predict), "accuracy": task.evaluate(predict),
                "seconds": time.perf_counter() - start,
            }  # fmt: skip
            save()
        row = data["runs"][key]
        print(f"{key:<60}{row['held_out']:>8.4f}{row['accuracy']:>8.4f}{row['seconds']:>7.0f} s", flush=True)
        return row

    seeds = {name: arguments.seeds[: 1 if name in arguments.once else None] for name in every}
    rows = {name: [ran(name, seed) for seed in seeds[name]] for name in every}
    others = [name for name in rows if name not in UNTAUGHT]
    data["best"] = max(others, key=lambda name: statistics.mean(row["held_out"] for row in rows[name]), default=None)
    data["accuracy"] = {}
    for name, runs in rows.items():
        values = [row["accuracy"] for row in runs]
        data["accuracy"][name] = {
            "mean": statistics.mean(values), "lowest": min(values), "highest": max(values), "seeds": len(values),
            "texts": arguments.texts,
        }  # fmt: skip
    data |= {"machine": vars(measure.machine(arguments.threads)), "versions": measure.versions()}
    plain, teacher = data["accuracy"][PLAIN]["mean"], data["teacher"]["accuracy"]
    for row in data["accuracy"].values():
        row["gap_closed"] = (row["mean"] - plain) / (teacher - plain)
    save()


def speeds(arguments, module, task, data, save):
    """Time teacher and student in both runtimes in interleaved rounds."""
    from benchmarks.minilm_pruning import BATCHES
    from penjing import measure
    from penjing.measure import Target, compare
    from penjing.pipeline import building
    from penjing.steps.draft import Draft

    fewer, whole = student(module, task)
    with tempfile.TemporaryDirectory() as aside:
        targets = []
        for label, draft in (("teacher", Draft(whole)), ("student", fewer)):
            for runtime in ("onnxruntime", "openvino"):
                folder = Path(aside) / f"{label} {runtime}"
                folder.mkdir()
                building.build(draft, runtime, "fp32", task, {"kind": "tensor"}, folder)
                for batch in BATCHES:
                    call = {k: v[:batch].numpy() for k, v in task.calibration[0].items()}
                    inputs = [call["input_ids"], call["attention_mask"]]
                    targets.append(Target(f"{folder.name}, batch {batch}", folder, inputs, batch))
        timings = compare(targets, threads=arguments.threads, seconds=arguments.seconds)
    where = {"machine": vars(measure.machine(arguments.threads)), "versions": measure.versions()}
    data["speed"] = {"rows": {}, "measured on": where}
    for target in targets:
        latency = timings[target.name].latency
        before = timings[target.name.replace("student", "teacher")].latency
        times = before.median / latency.median
        data["speed"]["rows"][target.name] = {"median_ms": latency.median, "spread": latency.spread, "speedup": times}
        print(f"{target.name:<34}{latency.median:>9.2f} ms  spread {latency.spread:>4.0%}  {times:.2f}x", flush=True)
    save()


def main() -> None:
    """Run all that is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=10000)
    parser.add_argument("--train-texts", type=int, nargs="+", default=[6000, 10000])
    parser.add_argument("--judged", type=int, default=7528)
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--once", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "speed"], choices=["accuracy", "speed"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/minilm_layers.json")
    arguments = parser.parse_args()
    import torch

    from benchmarks.minilm_pruning import prepared

    torch.set_num_threads(arguments.threads)
    task, classes = prepared(arguments.judged)
    module = taught(arguments, task, classes)
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for part in arguments.parts:
        {"accuracy": accuracies, "speed": speeds}[part](arguments, module, task, data, save)
    print(f"\nteacher {data['teacher']['accuracy']:.4f}")
    for name, row in data.get("accuracy", {}).items():
        print(f"{name:<24}{row['mean']:>8.4f} ({row['lowest']:.4f} to {row['highest']:.4f})  "
              f"gap closed {row['gap_closed']:.2f}")  # fmt: skip
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
