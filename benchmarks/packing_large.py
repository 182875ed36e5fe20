"""Packing a network of 1 GB: seconds both ways, and the memory that it takes.

Random weights in the forms that networks have (a long table, square and oblong matrices, convolutions, vectors), by
share of the bytes: a quarter each of int8, int4 (a byte each), bfloat16 and float32. Packing and unpacking run in
processes of their own; their memory is the largest anonymous resident size, sampled (pages of the mapped file are the
system's, which drops them when it wants to). Linux only.

    python benchmarks/packing_large.py [--gigabytes 1]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
SHAPES = ((16000, 2048), (2048, 2048), (2048, 8192), (8192, 2048), (512, 512, 3, 3), (2048,))


def write(path: Path, gigabytes: float) -> None:
    """The network as a .safetensors file."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for form in ("int8", "int4", "bf16", "fp32"):
        left, number = gigabytes * 1e9 / 4, 0
        while left > 0:
            weight = torch.randn(SHAPES[number % len(SHAPES)])
            scale = torch.rand(len(weight), *[1] * (weight.dim() - 1)) + 0.5
            if form in ("int8", "int4"):
                top = 127 if form == "int8" else 7
                tensor = (weight * scale * top / 5).round().clamp(-top, top).to(torch.int8)
            else:
                tensor = (weight * scale * 0.03).to(torch.bfloat16 if form == "bf16" else torch.float32)
            tensors[f"{form}.{number}"] = tensor[: max(1, int(left // (tensor.nbytes / len(tensor))))].clone()
            left -= tensor.numel() * tensor.element_size()
            number += 1
    save_file(tensors, path)


def watched(action: str, source: str, out: str) -> None:
    """Run one action in this process and print seconds and memory."""
    import numpy as np

    from penjing.numerics import entropy, scaled_integers
    from penjing.storage import packed

    scaled_integers.decode(scaled_integers.encode(np.arange(5), 5), 5, 5)  # loads the loops
    entropy.decode_floats(entropy.encode_floats(np.arange(5), 5, 8, 7), 5, 5, 8, 7)
    largest, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal largest
        while not ended.wait(0.02):
            largest = max(largest, anonymous())

    before = anonymous()
    threading.Thread(target=sample, daemon=True).start()
    start = time.perf_counter()
    (packed.pack if action == "pack" else packed.unpack)(source, out, threads=THREADS)
    seconds = time.perf_counter() - start
    ended.set()
    print(json.dumps({"seconds": seconds, "memory_bytes": largest - before}))


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def main() -> None:
    """Run both, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--watched", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/packing_large.json")
    arguments = parser.parse_args()
    if arguments.watched:
        watched(*arguments.watched)
        return
    from penjing.measure import machine, versions

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.safetensors"
        write(file, arguments.gigabytes)
        size = file.stat().st_size
        for action, source, out in (
            ("pack", file, f"{folder}/net.pj"),
            ("unpack", f"{folder}/net.pj", f"{folder}/back"),
        ):
            command = [sys.executable, __file__, "--watched", action, str(source), out]
            rows[action] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row = rows[action]
            print(
                f"{action:<8}{row['seconds']:>8.1f} s{size / 1e6 / row['seconds']:>8.0f} MB/s"
                f"{row['memory_bytes'] / 1e6:>8.0f} MB of memory",
                flush=True,
            )
        if (Path(folder) / "back" / file.name).read_bytes() != file.read_bytes():
            raise SystemExit("the network does not come back")
        rows["bytes"], rows["packed_bytes"] = size, Path(folder, "net.pj").stat().st_size
    print(f"{rows['packed_bytes']:,} of {rows['bytes']:,} bytes: {rows['packed_bytes'] / rows['bytes']:.1%}")
    data = {"machine": vars(machine(THREADS)), "versions": versions(), **rows}
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
