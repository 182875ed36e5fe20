"""Binary and ternary ResNet-20 on Fashion-MNIST: accuracy after a few epochs, and the artifact beside ORT's fp32.

The source is the example's trained network. The first and the last layer and the projections of shortcuts stay in
floating point; in the binary network their weights are whole multiples of a step, of a byte each. Accuracy is of the
test images, which no setting was chosen on.

    python benchmarks/binary_resnet20.py [--parts binary ternary artifact] [--epochs 4] [--work runs/binary]

Training resumes where it was stopped.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BATCH = 64  # samples that threads share
RESULTS = ROOT / "benchmarks" / "results" / "binary_resnet20.json"


def prepared():
    """Captured network and task."""
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task
    from penjing.network.capture import capture_network

    told = task()
    return capture_network(resnet20(), *told.call(), told.dynamic), told


def trained(step, options, name):
    """Train with a step, or take what was trained before; write its accuracy."""
    from dataclasses import replace

    import torch

    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.storage import checkpoint
    from penjing.tasks.outputs import numpy_predictor

    torch.set_num_threads(options.threads)
    network, task = prepared()
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    step = replace(step, finetune=replace(step.finetune, epochs=options.epochs))
    draft = step(Draft(network), Context(task=task, source=network, seed=0, folder=folder, events=shown))
    saved = options.work / f"{name}-checkpoint"
    saved.mkdir(exist_ok=True)
    checkpoint.save(draft, saved)
    accuracy = task.evaluate(numpy_predictor(draft.network))
    source = task.evaluate(numpy_predictor(network))
    row = {"accuracy": accuracy, "source": source, "epochs": options.epochs, "seconds": time.time() - start}
    print(name, row, flush=True)
    return row


def shown(kind, **values):
    """Print the progress of the training now and then."""
    if kind == "progress" and values["done"] % 40 == 0:
        print(values["label"], values["done"], values["total"], flush=True)


def binary(options):
    from penjing import quantize

    return trained(quantize.Binary(rest="bytes"), options, "binary")


def ternary(options):
    from penjing import quantize

    return trained(quantize.Ternary(), options, "ternary")


def artifact(options):
    """The binary network in the runtime of kernels, beside the fp32 source in ONNX Runtime: size, latency, accuracy."""
    import gc

    import numpy as np
    import torch
    from binary_kernels import timed

    from penjing import measure, runtimes
    from penjing.kernels.network import described
    from penjing.pipeline import building
    from penjing.runtimes.artifact import predictor
    from penjing.steps.draft import Draft
    from penjing.storage import checkpoint
    from penjing.tasks.outputs import numpy_predictor

    torch.set_num_threads(options.threads)
    network, task = prepared()
    draft = checkpoint.load(options.work / "binary-checkpoint", network)
    image = next(iter(task.calibration))
    expected = numpy_predictor(draft.network)(image.numpy())
    row, sessions = {}, {}
    for name, built in {"fp16": draft, "fp32": draft, "source": Draft(network)}.items():
        folder = options.work / f"artifact-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        runtime, precision = ("onnxruntime", "fp32") if name == "source" else ("kernels", name)
        manifest = building.build(built, runtime, precision, task, {"kind": "tensor"}, folder)
        sessions[name] = runtimes.open_artifact(folder, 1)
        row["instructions"] = manifest.settings.get("instructions", row.get("instructions"))
        answers = sessions[name].run([image.numpy()])[0]
        row[name] = {
            "size_bytes": measure.size_bytes(folder, manifest.files()),
            "folder_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
            "accuracy": task.evaluate(predictor(sessions[name], manifest)),
            "snr_db": float(10 * np.log10((expected**2).sum() / ((answers - expected) ** 2).sum())),
        }
    weights = [draft.network.get_submodule(name).weight.numel() for name in binary_layers(draft)]
    row["bits_bytes"] = sum(weights) // 8
    arrays = [
        (o.kind, name, a) for o in described(draft.network, (1, 28, 28)).operations for name, a in o.arrays.items()
    ]
    row["numbers_bytes"] = sum(
        a.size * (1 if a.dtype == np.int8 else 2) for kind, name, a in arrays if (kind, name) != ("binary", "weights")
    )
    one = image[:1].numpy()
    two = runtimes.open_artifact(options.work / "artifact-source", 2)
    sides = {"binary": sessions["fp16"], "onnxruntime fp32, 1 threads": sessions["source"]}
    sides |= {"onnxruntime fp32, 2 threads": two}
    gc.collect()
    row["sides"] = timed({name: lambda s=session: s.run([one]) for name, session in sides.items()}, options.seconds)
    batch = np.repeat(one, BATCH, 0)
    opened = {n: runtimes.open_artifact(options.work / "artifact-fp16", n) for n in (1, 2)}
    for session in opened.values():
        session.run([one])  # from which it knows how much work a sample is
    threads = {f"{n} threads": lambda s=session: s.run([batch]) for n, session in opened.items()}
    row["batch"] = {"samples": BATCH, "sides": timed(threads, options.seconds)}
    print(row, flush=True)
    return row


def binary_layers(draft):
    """The binary layers of a draft."""
    return [name for edit in draft.edits if edit["edit"] == "sign_inputs" for name in edit["layers"]]


PARTS = {"binary": binary, "ternary": ternary, "artifact": artifact}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "binary")
    options = parser.parse_args()
    from penjing import measure

    for part in options.parts:
        row = PARTS[part](options)
        written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        written[part] = row
        written["machine"] = {"processor": measure.machine(options.threads).processor, "threads": options.threads}
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
