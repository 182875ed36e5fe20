"""Packed files against general compressors: bytes, and seconds both ways, of the weights of real networks.

ResNet-20, EfficientNet-Lite0 and MiniLM: weights of two and more axes, rounded to 8 and to 4 bits (symmetric, per
output channel, the largest magnitude exact), 8 bits with the smallest 80 % of each tensor set to 0, bfloat16 and
float32. Two blocks of SmolLM2-135M, whose weights have been of 4 bits, as bfloat16 and float32. Every form is one
.safetensors file, which all contestants get; 4-bit values take a byte each in it, as they do in memory. `entropy` is
that of every tensor's own distribution, which a coder without contexts can't go below; `huffman` is a Huffman code of
every tensor without its table. For floats they are not told. nncodec and the library constriction code integers alone;
the header that the file needs is not counted for nncodec. Seconds are those of the whole command or call on a warm
file: median of the repeats, interleaved; nncodec runs in a process that has been started before.

    python benchmarks/packing.py [--repeats 3] [--only resnet20] [--nncodec-python PATH]
"""

import argparse
import importlib.util
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
FORMS = ("int8", "int4", "int8, 80 % zeros", "bf16", "fp32")
NETWORKS = ("resnet20", "lite0", "minilm", "smollm2")


def network(name: str):
    """The trained network."""
    if name == "resnet20":
        from examples.fashion_mnist.network import resnet20

        return resnet20()
    if name == "lite0":
        from examples.imagenet_lite0.network import lite0

        return lite0()
    from transformers import AutoModel

    from examples import data

    return AutoModel.from_pretrained(data.minilm())


def state(name: str) -> dict:
    """The weights of two and more axes of a trained network."""
    if name == "smollm2":
        import gguf
        import torch

        from examples import data

        blocks = [t for t in gguf.GGUFReader(data.smollm2()).tensors if t.name.startswith(("blk.0.", "blk.1."))]
        listed = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in blocks}
    else:
        listed = network(name).state_dict()
    return {key: tensor.detach().float() for key, tensor in listed.items() if tensor.dim() > 1}


def tensors(weights: dict, form: str) -> dict:
    """The weights in one form."""
    import torch

    if form in ("bf16", "fp32"):
        dtype = torch.bfloat16 if form == "bf16" else torch.float32
        return {name: weight.to(dtype).contiguous().clone() for name, weight in weights.items()}
    top = 7 if form == "int4" else 127
    rounded = {}
    for name, weight in weights.items():
        step = weight.abs().flatten(1).amax(1).clamp(min=1e-12) / top
        values = (weight / step.view(-1, *[1] * (weight.dim() - 1))).round()
        if "zeros" in form:
            values[weight.abs() <= weight.abs().flatten().kthvalue(int(0.8 * weight.numel())).values] = 0
        rounded[name] = values.to(torch.int8).contiguous()
    return rounded


def huffman_bytes(weights: dict) -> float | None:
    """Bytes of all tensors in Huffman codes of their own, without these; None for floats."""
    import heapq

    import numpy as np

    total = 0
    for weight in weights.values():
        if weight.dtype.is_floating_point:
            return None
        nodes = np.unique(weight.numpy(), return_counts=True)[1].tolist()
        heapq.heapify(nodes)
        while len(nodes) > 1:
            joined = heapq.heappop(nodes) + heapq.heappop(nodes)
            total += joined
            heapq.heappush(nodes, joined)
    return total / 8


def entropy_bytes(weights: dict) -> float | None:
    """Bytes of all tensors at the entropy of their own distributions; None for floats."""
    import numpy as np

    total = 0.0
    for weight in weights.values():
        if weight.dtype.is_floating_point:
            return None
        _, counts = np.unique(weight.numpy(), return_counts=True)
        total -= float((counts * np.log2(counts / counts.sum())).sum()) / 8
    return total


class Penjing:
    """`penjing.storage.packed`."""

    def there(self, file: Path, folder: Path) -> Path:
        from penjing.storage import packed

        return packed.pack(file, folder / "net.pj", threads=THREADS, force=True).path

    def back(self, small: Path, folder: Path) -> bytes:
        from penjing.storage import packed

        shutil.rmtree(folder / "back", ignore_errors=True)
        (file,) = packed.unpack(small, folder / "back", threads=THREADS)
        return file.read_bytes()


class Zstd:
    """The command `zstd -19`, with as many threads."""

    def there(self, file: Path, folder: Path) -> Path:
        small = folder / "net.zst"
        subprocess.run(["zstd", "-q", "-f", "-19", f"-T{THREADS}", str(file), "-o", str(small)], check=True)
        return small

    def back(self, small: Path, folder: Path) -> bytes:
        subprocess.run(["zstd", "-q", "-f", "-d", str(small), "-o", str(folder / "back.zstd")], check=True)
        return (folder / "back.zstd").read_bytes()


class Xz:
    """Python's lzma, preset 9."""

    def there(self, file: Path, folder: Path) -> Path:
        small = folder / "net.xz"
        small.write_bytes(lzma.compress(file.read_bytes(), preset=9))
        return small

    def back(self, small: Path, folder: Path) -> bytes:
        return lzma.decompress(small.read_bytes())


class Constriction:
    """The library constriction: range asymmetric numeral systems, a table of frequencies for every tensor."""

    def there(self, file: Path, folder: Path) -> Path:
        import constriction
        import numpy as np
        from safetensors.numpy import load_file

        coded = []
        for tensor in load_file(file).values():
            symbols = tensor.reshape(-1).astype(np.int32) + 128
            counts = np.bincount(symbols, minlength=256).astype(np.uint32)
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(symbols, self._model(counts))
            words = coder.get_compressed()
            coded.append(lzma.compress(counts.tobytes()) + len(words).to_bytes(4, "little") + words.tobytes())
        small, header = folder / "net.ans", file.read_bytes()
        small.write_bytes(header[: 8 + int.from_bytes(header[:8], "little")] + b"".join(coded))
        return small

    def back(self, small: Path, folder: Path) -> bytes:
        import constriction
        import numpy as np

        content = small.read_bytes()
        place = 8 + int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8:place])
        header, parts = content[:place], []
        for entry in sorted(tensors.values(), key=lambda entry: entry["data_offsets"]):
            unpacker = lzma.LZMADecompressor()
            counts = np.frombuffer(unpacker.decompress(content[place:]), np.uint32)
            rest = unpacker.unused_data
            length = int.from_bytes(rest[:4], "little")
            coder = constriction.stream.stack.AnsCoder(np.frombuffer(rest, np.uint32, length, 4))
            first, last = entry["data_offsets"]
            parts.append((coder.decode(self._model(counts), last - first) - 128).astype(np.int8).tobytes())
            place = len(content) - len(rest) + 4 + 4 * length
        return header + b"".join(parts)

    def _model(self, counts):
        import constriction

        return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)


class Nncodec:
    """nncodec in an environment of its own, by `benchmarks/peers/nncodec_coder.py`."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).parent / "peers" / "nncodec_coder.py"
        self.folder = tempfile.TemporaryDirectory()  # it writes a file of its own where it works
        self.process = subprocess.Popen(
            [Path(python).absolute(), script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder.name,
        )

    def _ask(self, *words: str) -> None:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "\n":
            raise SystemExit("nncodec failed; its error is above")

    def there(self, file: Path, folder: Path) -> Path:
        self._ask("encode", str(file), str(folder / "net.nnc"))
        return folder / "net.nnc"

    def back(self, small: Path, folder: Path) -> bytes:
        self._ask("decode", str(small), str(folder / "back.nncodec"))
        return (folder / "back.nncodec").read_bytes()


TOOLS = {"penjing": Penjing(), "zstd -19": Zstd(), "xz -9": Xz()}


def measured(name: str, weights: dict, form: str, repeats: int, folder: Path) -> list[dict]:
    """A row for every tool."""
    from safetensors.torch import save_file

    floats = form in ("bf16", "fp32")
    weights = tensors(weights, form)
    file = folder / "weights.safetensors"
    save_file(weights, file)
    contestants = [tool for tool in TOOLS if not (floats and tool in ("constriction", "nncodec"))]
    times = {tool: ([], []) for tool in contestants}
    sizes = {}
    for repeat in range(repeats):
        for tool in contestants[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            small = TOOLS[tool].there(file, folder)
            middle = time.perf_counter()
            content = TOOLS[tool].back(small, folder)
            times[tool][0].append(middle - start)
            times[tool][1].append(time.perf_counter() - middle)
            sizes[tool] = small.stat().st_size
            if content != file.read_bytes():
                raise SystemExit(f"{tool} does not give back the weights of {name}, {form}")
    entropy, huffman = entropy_bytes(weights), huffman_bytes(weights)
    return [
        {
            "network": name, "form": form, "tool": tool, "file_bytes": file.stat().st_size,
            "values": sum(weight.numel() for weight in weights.values()), "bytes": sizes[tool],
            "entropy_bytes": entropy, "huffman_bytes": huffman,
            "pack_s": statistics.median(there), "unpack_s": statistics.median(back),
        }
        for tool, (there, back) in times.items()
    ]  # fmt: skip


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--nncodec-python", help="Python of an environment with nncodec")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/packing.json")
    arguments = parser.parse_args()
    import numpy as np

    from penjing.measure import machine, versions
    from penjing.numerics import entropy, scaled_integers

    if importlib.util.find_spec("constriction"):
        TOOLS["constriction"] = Constriction()
    if arguments.nncodec_python:
        TOOLS["nncodec"] = Nncodec(arguments.nncodec_python)
    values = np.random.default_rng(0).integers(-9, 10, 6400)  # enough for every loop, which are compiled here
    for few in (values, 3 * (values // 3)):
        scaled_integers.decode(scaled_integers.encode(few, 64, 3), len(few), 64)
    entropy.decode_floats(entropy.encode_floats(np.arange(5), 5, 8, 7), 5, 5, 8, 7)
    rows = []
    titles = f"{'bytes':>12}{'share':>8}{'× entropy':>11}{'pack s':>9}{'unpack s':>9}"
    print(f"{'network':<10}{'form':<18}{'tool':<10}{titles}")
    for name in arguments.only:
        weights = state(name)
        for form in FORMS if name != "smollm2" else FORMS[-2:]:
            with tempfile.TemporaryDirectory() as folder:
                listed = measured(name, weights, form, arguments.repeats, Path(folder))
            rows += listed
            for row in listed:
                over = f"{row['bytes'] / row['entropy_bytes']:.3f}" if row["entropy_bytes"] else ""
                print(
                    f"{row['network']:<10}{row['form']:<18}{row['tool']:<10}{row['bytes']:>12,}"
                    f"{row['bytes'] / row['file_bytes']:>8.1%}{over:>11}{row['pack_s']:>9.2f}{row['unpack_s']:>9.2f}",
                    flush=True,
                )
    zstd = subprocess.run(["zstd", "--version"], capture_output=True, text=True).stdout.split()
    data = {
        "machine": vars(machine(THREADS)),
        "versions": versions() | {"zstd": next((w for w in zstd if w.startswith("v")), "").strip("v,")},
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
