"""Time and memory of the coupling analysis by depth, compared with Torch-Pruning's dependency graph.

ResNets for 32×32 images from 20 to 200 layers, and DenseNet-201, where every layer reads all previous layers of its
block. Each network and tool runs in its own process, in interleaved rounds; the median of the repeats. Capturing
(torch.export) is reported separately, since it is done once for everything. Memory is the increase of the process's
peak during the analysis.

    python benchmarks/coupling_cost.py [--repeats 3] [--out benchmarks/results/coupling_cost.json]
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
NETWORKS = ("resnet-20", "resnet-56", "resnet-110", "resnet-200", "densenet201")
LIMIT_S = 600


def built(name):
    import torch

    from penjing.architectures import build
    from penjing.architectures.resnet import BasicBlock, ResNet

    if name == "densenet201":
        return build(name).eval(), torch.randn(2, 3, 64, 64)
    blocks = (int(name.partition("-")[2]) - 2) // 6
    network = ResNet(BasicBlock, (blocks,) * 3, in_channels=3, classes=10, width=16, small=True)
    return network.eval(), torch.randn(2, 3, 32, 32)


def child(side, name):
    """Print one JSON line: seconds and bytes."""
    import torch

    from penjing.measure import peak_memory_bytes, reset_peak

    torch.set_num_threads(THREADS)
    model, example = built(name)
    figures = {}
    if side == "penjing":
        from penjing.analyze.coupling import couple
        from penjing.network.capture import capture_network

        start = time.perf_counter()
        network = capture_network(model, (example,))
        figures["raise_s"] = time.perf_counter() - start
    else:
        import torch_pruning as tp
    reset_peak()
    before, start = peak_memory_bytes(), time.perf_counter()
    if side == "penjing":
        coupling = couple(network, ((example,), {}))
        figures["groups"] = len(coupling.groups)
    else:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
        figures["groups"] = sum(1 for _ in graph.get_all_groups(ignored_layers=[model.classifier]))
    figures |= {"seconds": time.perf_counter() - start, "bytes": peak_memory_bytes() - before}
    print(json.dumps(figures))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "coupling_cost.json")
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    from penjing import measure

    runs = {}
    for name in NETWORKS:
        for _ in range(arguments.repeats):
            for side in ("penjing", "torch-pruning"):
                command = [sys.executable, __file__, "--child", side, name]
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                runs.setdefault(name, {}).setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
        for side, rows in runs[name].items():
            median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            spread = max(r["seconds"] for r in rows) - min(r["seconds"] for r in rows)
            runs[name][side] = median | {"range_s": spread}
        mine, theirs = runs[name]["penjing"], runs[name]["torch-pruning"]
        print(
            f"{name:12s} penjing {mine['seconds']:6.2f} s {mine['bytes'] / 1e6:6.0f} MB {mine['groups']:4.0f} groups "
            f"(raise {mine['raise_s']:5.1f} s) | torch-pruning {theirs['seconds']:6.2f} s "
            f"{theirs['bytes'] / 1e6:6.0f} MB {theirs['groups']:4.0f} groups",
            flush=True,
        )
    data = {
        "networks": runs,
        "machine": vars(measure.machine(THREADS)),
        "versions": measure.versions() | {"torch-pruning": importlib.metadata.version("torch-pruning")},
    }
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
