"""Bits of every layer chosen, against the same bits in all: what the answers and the packed file are like.

ResNet-20 (Fashion-MNIST) and EfficientNet-Lite0. Both sides are rounded by `AdaRound` on the same calibration data and
run in ONNX Runtime, where weights of fewer bits are stored in 8 and compute to the bit; size is that of the packed
file. Noise and the metric are read on held-out data.

    python benchmarks/mixed_precision.py [--networks resnet20 lite0] [--bits 8 6 5 4 3]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
CHOICES = (8, 6, 5, 4, 3, 2)


def source(name: str):
    """Network and task."""
    if name == "lite0":
        from examples.imagenet_lite0.network import lite0
        from examples.imagenet_lite0.task import task

        return lite0().eval(), task()
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task

    return resnet20(), task()


def judged(draft, task, network, folder: Path) -> dict:
    """The draft's file in its runtime."""
    import numpy as np
    import torch

    from penjing import building, measure, runtimes
    from penjing.runtimes.artifact import predictor, read_manifest

    manifest = building.build(draft, "onnxruntime", "int8", task, {"kind": "tensor"}, folder)
    predict = predictor(runtimes.open_artifact(folder, THREADS), read_manifest(folder))
    signal, noise = [], []

    def seen(x):
        found = predict(x)
        with torch.no_grad():
            wanted = network(torch.from_numpy(x)).numpy().astype(np.float64)
        signal.append((wanted**2).sum())
        noise.append(((found - wanted) ** 2).sum())
        return found

    metric = task.evaluate(seen)
    return {
        "metric": metric,
        "snr_db": float(10 * np.log10(sum(signal) / sum(noise))),
        "packed_bytes": measure.packed_bytes([folder / name for name in manifest.files()]),
    }


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "lite0"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mixed_precision.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure, runtimes
    from penjing.draft import Draft
    from penjing.network import raise_network
    from penjing.quantize import AdaRound, MixedPrecision, Static
    from penjing.step import Context

    torch.set_num_threads(THREADS)
    accelerates = runtimes.get("onnxruntime").accelerates(measure.machine(THREADS).instruction_sets)
    data = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "networks": {}}
    if arguments.out.exists():
        data["networks"] = json.loads(arguments.out.read_text())["networks"]
    for name in arguments.networks:
        network, task = source(name)
        raised = raise_network(network, *task.call())
        context = Context(task=task, accelerates=accelerates, source=raised)
        rows = data["networks"][name] = []
        print(f"\n{name}\n{'':<10}{'bits':>6}{'metric':>9}{'SNR dB':>8}{'packed kB':>11}")
        for bits in arguments.bits:
            kinds = {"uniform": (Static(weight_bits=bits), AdaRound())}
            if bits < 8:
                kinds["mixed"] = (MixedPrecision(average_bits=bits, weight_bits=CHOICES),)
            for kind, steps in kinds.items():
                start = time.perf_counter()
                draft = Draft(raised)
                for step in steps:
                    draft = step(draft, context)
                weights = {e: v for e, v in draft.plan.entries.items() if e.endswith(":weight")}
                sizes = {e: draft.network.get_submodule(e.removesuffix(":weight")).weight.numel() for e in weights}
                mean = sum(v.spec.bits * sizes[e] for e, v in weights.items()) / sum(sizes.values())
                with tempfile.TemporaryDirectory() as aside:
                    row = judged(draft, task, network, Path(aside))
                rows.append({"kind": kind, "bits": mean, "seconds": time.perf_counter() - start} | row)
                line = f"{kind:<10}{mean:>6.2f}{row['metric']:>9.4f}{row['snr_db']:>8.1f}"
                print(f"{line}{row['packed_bytes'] / 1e3:>11.0f}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
