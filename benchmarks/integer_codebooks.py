"""Weights of few integers: ResNet-20 on Fashion-MNIST in INT8, with all integers and with 16 or 8 in every tensor.

All have INT8 activations and run with the same INT8 kernels of ONNX Runtime. "rounded" is `quantize.Static` and
`quantize.CoordinateRounding`, from unlabelled images; "trained" is `quantize.Static` and `quantize.QAT`, of the scales,
the weights and the integers. Beside them weights of 4 and 3 bits, whose integers are neighbours. Accuracy is that of
the artifact in ONNX Runtime on the 10,000 test images, noise that of its outputs there beside the fp32 network's; bytes
are those of model.onnx and of its packed file; latencies are interleaved, one image, one thread.

    python benchmarks/integer_codebooks.py [--epochs 0.5] [--rate 0.01] [--seconds 2] [--folder DIR]

Rows that are finished are kept in the folder: a second call goes on where the first stopped.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 1
WEIGHTS = {
    "all": {}, "16": {"weight_entries": 16}, "4 bits": {"weight_bits": 4}, "8": {"weight_entries": 8},
    "3 bits": {"weight_bits": 3},
}  # fmt: skip


def rows():
    """Name → what weights may be, and whether they are trained."""
    listed = {"all, rounded": ({}, False)}
    for name, settings in WEIGHTS.items():
        if settings:
            listed |= {f"{name}, rounded": (settings, False), f"{name}, trained": (settings, True)}
    return listed


def built(settings, trained, context, arguments, folder):
    """Build the artifact in `folder`; its accuracy, and bytes plain and packed."""
    from penjing import quantize
    from penjing.pipeline import building
    from penjing.records.manifest import read_manifest
    from penjing.runtimes import isolated
    from penjing.runtimes.artifact import predictor
    from penjing.steps.draft import Draft
    from penjing.storage import packed
    from penjing.train.finetune import Finetune

    draft = quantize.Static(**settings)(Draft(context.source), context)
    learn = Finetune(epochs=arguments.epochs, learning_rate=arguments.rate, weight_decay=1e-4)
    draft = (quantize.QAT(finetune=learn) if trained else quantize.CoordinateRounding())(draft, context)
    folder.mkdir(parents=True)
    building.build(draft, "onnxruntime", "int8", context.task, {"kind": "tensor"}, folder)
    predict = predictor(isolated.open_artifact(folder, THREADS), read_manifest(folder))
    small = packed.pack(folder / "model.onnx", folder.with_suffix(".pj"), force=True)
    return {
        "accuracy": context.task.evaluate(predict),
        "file_bytes": (folder / "model.onnx").stat().st_size,
        "packed_bytes": small.size_bytes,
    }


def snr_db(source, task, folder):
    """The artifact's outputs for the test images beside the source's."""
    import numpy as np

    from penjing.records.manifest import read_manifest
    from penjing.runtimes import isolated
    from penjing.runtimes.artifact import predictor
    from penjing.tasks.outputs import numpy_predictor

    def outputs(predict):
        listed = []
        task.evaluate(lambda x: listed.append(predict(x)) or listed[-1])
        return np.concatenate(listed)

    expected = outputs(numpy_predictor(source))
    got = outputs(predictor(isolated.open_artifact(folder, THREADS), read_manifest(folder)))
    return float(10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum()))


def main():
    """Run all rows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-integer-codebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/integer_codebooks.json")
    arguments = parser.parse_args()
    import torch

    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task as fashion_mnist
    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.steps.step import Context
    from penjing.tasks.outputs import numpy_predictor

    torch.set_num_threads(THREADS)
    task = fashion_mnist()
    source = capture_network(resnet20().eval(), *task.call())
    capabilities = runtimes.get("onnxruntime").capabilities(measure.machine(THREADS).instruction_sets)
    context = Context(task=task, source=source, capabilities=capabilities)
    data = {
        "machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "epochs": arguments.epochs,
        "rate": arguments.rate, "source": task.evaluate(numpy_predictor(source)), "rows": {},
    }  # fmt: skip
    targets, image = [], task.example[:1].numpy()
    for name, (settings, trained) in rows().items():
        folder = arguments.folder / name.replace(", ", "-").replace(" ", "-")
        figures = folder.with_suffix(".json")
        if not figures.exists():
            figures.parent.mkdir(parents=True, exist_ok=True)
            row = built(settings, trained, context, arguments, folder)
            figures.write_text(json.dumps(row | {"snr_db": snr_db(source, task, folder)}))
        data["rows"][name] = json.loads(figures.read_text())
        print(name, data["rows"][name], flush=True)
        targets.append(measure.Target(name, folder, [image], 1))
    timings = measure.compare(targets, threads=THREADS, seconds=arguments.seconds)
    for name, row in data["rows"].items():
        row["latency_ms"] = vars(timings[name].latency)
        print(f"{name:<20}{row['accuracy']:>8.2%}{row['packed_bytes']:>10,}{row['latency_ms']['median']:>8.3f} ms")
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
