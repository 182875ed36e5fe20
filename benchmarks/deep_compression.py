"""Deep Compression on VGG-16 and Fashion-MNIST: bytes and accuracy after each stage, prune, share, code.

Han et al., "Deep Compression", ICLR 2016, reach 49 times on VGG-16 and ImageNet. Here the network is
benchmarks/vgg.py. A row is a way to prune, a sparsity and a number of bits: pruning with training (`prune.Gradual`, or
`prune.Magnitude` and then `Finetune`, with the same number of epochs), more training of what is left, `share.Codebook`,
training through the codebook. After each stage the network is exported for ONNX Runtime; accuracy is that of the
artifact on the 10,000 test images, bytes are those of model.onnx and of its packed file, which unpacks to it to the
bit. The rate is the fp32 file over the packed one. A row without bits ends with its pruning, for comparison.

    python benchmarks/deep_compression.py [--width 32] [--rows "Gradual 0.95 4" ...]
        [--epochs 2] [--retrain 3] [--through 0.5]

Stages and rows that are finished are kept in the cache of the examples: a second call goes on where the first stopped.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
ROWS = ("Magnitude 0.95", "Gradual 0.95 4", "Gradual 0.95 3", "Gradual 0.95 2")
RATE, THROUGH_RATE = 0.05, 0.005


def steps(row, arguments):
    """The steps of each stage."""
    import penjing as pj

    way, sparsity, *bits = row.split()
    training = pj.Finetune(epochs=arguments.epochs, learning_rate=RATE)
    zeros = pj.prune.Magnitude(sparsity=float(sparsity))
    pruned = (pj.prune.Gradual(step=zeros, finetune=training),) if way == "Gradual" else (zeros, training)
    stages = {"pruned": pruned}
    if bits:
        stages["retrained"] = (pj.Finetune(epochs=arguments.retrain, learning_rate=RATE),)
        stages["shared"] = (pj.share.Codebook(bits=int(bits[0])),)
        stages["trained through"] = (pj.Finetune(epochs=arguments.through, learning_rate=THROUGH_RATE),)
    return stages


def measured(draft, task):
    """Accuracy of the artifact in ONNX Runtime, and bytes of its file, plain and packed."""
    from penjing.pipeline import building
    from penjing.records.manifest import read_manifest
    from penjing.runtimes import isolated
    from penjing.runtimes.artifact import predictor
    from penjing.storage import packed

    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "artifact"
        folder.mkdir()
        building.build(draft, "onnxruntime", "fp32", task, {"kind": "tensor"}, folder)
        small = packed.pack(folder / "model.onnx", Path(aside) / "model.pj")
        (again,) = packed.unpack(Path(aside) / "model.pj", Path(aside) / "unpacked")
        assert again.read_bytes() == (folder / "model.onnx").read_bytes()
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        return {
            "accuracy": task.evaluate(predict),
            "file_bytes": (folder / "model.onnx").stat().st_size,
            "packed_bytes": small.size_bytes,
        }


def stage(draft, some, context, folder):
    """The draft after some steps, and its figures; taken from `folder` if they were finished before."""
    from dataclasses import replace

    from penjing.storage import checkpoint

    figures = folder / "figures.json"
    if figures.exists():
        return checkpoint.load(folder, context.source), json.loads(figures.read_text())
    if (folder / checkpoint.EDITS).exists():
        draft = checkpoint.load(folder, context.source)
    else:
        for number, step in enumerate(some):
            state = folder / f"step-{number}"
            state.mkdir(parents=True, exist_ok=True)
            draft = step(draft, replace(context, folder=state))
        checkpoint.save(draft, folder)
    figures.write_text(json.dumps(measured(draft, context.task)))
    return draft, json.loads(figures.read_text())


def main():
    """Run all rows, and write the table."""
    from pruning_accuracy import shown
    from vgg import Settings, trained

    from examples.data import cache
    from penjing.measure import machine, versions
    from penjing.network.capture import capture_network
    from penjing.randomness import seed_everything
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=Settings.width, help="channels of the first stage")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--epochs", type=float, default=2.0, help="of the training while or after pruning")
    parser.add_argument("--retrain", type=float, default=3.0, help="epochs of the training behind that")
    parser.add_argument("--through", type=float, default=0.5, help="epochs of the training through the codebook")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "deep_compression.json")
    arguments = parser.parse_args()
    settings = Settings(width=arguments.width)
    network, task = trained(settings)
    source = capture_network(network, *task.call(), task.dynamic)
    asked = {"base": vars(settings), "rate": RATE, "through rate": THROUGH_RATE}
    asked |= {name: getattr(arguments, name) for name in ("epochs", "retrain", "through")}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    data = {"settings": asked, "parameters": sum(p.numel() for p in source.parameters()), "rows": {}}
    data["source"] = measured(Draft(source), task)
    print(f"{'source':<40}{data['source']}", flush=True)
    for row in arguments.rows:
        seed_everything(0)
        draft, stages = Draft(source), {}
        for name, some in steps(row, arguments).items():
            context = Context(task=task, source=source, events=shown(f"{row}, {name}"))
            # Rows that differ in their bits alone have pruning in common.
            of = row if name in ("shared", "trained through") else " ".join(row.split()[:2])
            draft, figures = stage(draft, some, context, cache() / f"deep-compression-{digest}" / of / name)
            stages[name] = figures
            rate = data["source"]["file_bytes"] / figures["packed_bytes"]
            print(f"{row + ', ' + name:<40}{rate:8.1f}×  {figures}", flush=True)
        data["rows"][row] = stages
        data |= {"machine": vars(machine(1)), "versions": versions()}
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
