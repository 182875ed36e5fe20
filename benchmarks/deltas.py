"""Updates after a little more training: bytes of `penjing delta` against bsdiff, zstd --patch-from and nncodec.

ResNet-20 after one epoch on Fashion-MNIST from its trained weights (the defaults of `penjing.Finetune`), and MiniLM
after 100 steps that bring the beginnings of 20 Newsgroups' posts near to their continuations (AdamW, 2e-5). Forms: all
weights in fp32 and in bf16; weights of two and more axes rounded to 8 bits (symmetric, per output channel) as a
.safetensors file; and the INT8 file for ONNX Runtime that `penjing quantize --fast` writes of each version. bsdiff,
zstd and Penjing get both files. nncodec 2 has no lossless mode for floats, so it gets every tensor of the new version
as integers (of floats their bit patterns, ordered) in its incremental mode: the differences, alone and with the old
values as temporal context, of which the smaller counts; nothing is added for what is not a tensor. Everything comes
back equal to the bit, or the run ends. Seconds are of one run each. bsdiff, which takes minutes and seventeen times the
file in memory, gets files of up to 30 MB.

    python benchmarks/deltas.py [--nncodec-python PYTHON] [--only resnet20] [--folder DIR]

nncodec wants numpy<2: PYTHON is of an environment of its own with nncodec 2.1.3. Networks that were trained before are
taken from --folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
STEPS = 100  # of MiniLM
BSDIFF_BYTES = 30_000_000


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncodec-python", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=("resnet20", "minilm"), default=["resnet20", "minilm"])
    parser.add_argument("--tools", nargs="+", help="measure these again, and take the others from --out")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-deltas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/deltas.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # nncodec's part, in its own environment
    arguments = parser.parse_args()
    if arguments.work:
        return nncodec_work(arguments.work)
    sys.path.insert(0, str(ROOT))
    import torch

    from penjing.measure import machine, versions

    torch.set_num_threads(THREADS)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"{'network':<10}{'form':<16}{'tool':<12}{'bytes':>12}{'share':>8}{'there s':>9}{'back s':>9}")
    for name in arguments.only:
        for form, (old, new) in pairs(name, arguments.folder).items():
            with tempfile.TemporaryDirectory() as folder:  # the loops are compiled before they are timed
                penjing_there(old, new, Path(folder) / "update")
                penjing_back(old, Path(folder) / "update", Path(folder) / "again")
            for row in measured(old, new, arguments.nncodec_python, arguments.tools):
                rows.append({"network": name, "form": form, "file_bytes": new.stat().st_size, **row})
                times = f"{row['there_s']:>9.2f}{row['back_s']:>9.2f}"
                share = row["bytes"] / new.stat().st_size
                print(f"{name:<10}{form:<16}{row['tool']:<12}{row['bytes']:>12,}{share:>8.1%}{times}", flush=True)
    if arguments.tools:
        rows = merged(json.loads(arguments.out.read_text(encoding="utf-8"))["rows"], rows)
    zstd = subprocess.run(["zstd", "--version"], capture_output=True, text=True).stdout.split()
    extra = {"zstd": next((w for w in zstd if w.startswith("v")), "").strip("v,"), "nncodec": "2.1.3"}
    data = {"machine": vars(machine(THREADS)), "versions": versions() | extra, "rows": rows}
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"\n{arguments.out}")


def merged(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows with those that were measured again in their places."""
    key = lambda row: (row["network"], row["form"], row["tool"])  # noqa: E731
    again = {key(row): row for row in after}
    return [again.get(key(row), row) for row in before]


def pairs(name: str, folder: Path) -> dict:
    """Form → files of the old and the new version."""
    import torch
    from safetensors.torch import load_file, save_file

    before, after = (folder / f"{name}-{version}.safetensors" for version in ("old", "new"))
    if not (before.exists() and after.exists()):
        start = time.perf_counter()
        old, new = (resnet20 if name == "resnet20" else minilm)(folder)
        save_file(old, before)
        save_file(new, after)
        print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    forms = {"fp32": (before, after)}
    old, new = load_file(before), load_file(after)
    for form in ("bf16", "int8 weights"):
        files = tuple(folder / f"{name}-{version}-{form.replace(' ', '-')}.safetensors" for version in ("old", "new"))
        for tensors, file in zip((old, new), files, strict=True):
            if form == "bf16":
                save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}, file)
            else:
                save_file({n: rounded(t) for n, t in tensors.items() if t.dim() > 1}, file)
        forms[form] = files
    if name == "resnet20":
        from examples.fashion_mnist.network import untrained
        from examples.fashion_mnist.task import task
        from penjing.pipeline.quick import quantize_to

        files = tuple(folder / f"{name}-{version}.onnx" for version in ("old", "new"))
        for tensors, file in zip((old, new), files, strict=True):
            if not file.exists():
                network = untrained()
                network.load_state_dict(tensors)
                quantize_to(network.eval(), task(), file, fast=True)
        forms["INT8 artifact"] = files
    assert all(torch.isfinite(t).all() for t in new.values())
    return forms


def rounded(weight):
    """Weights in 8 bits: symmetric, the largest magnitude of an output channel exact."""
    import torch

    step = weight.float().abs().flatten(1).amax(1).clamp(min=1e-12) / 127
    return (weight / step.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)


def resnet20(folder: Path) -> tuple[dict, dict]:
    """The example's weights, and these after one more epoch."""
    from examples.fashion_mnist.network import resnet20 as trained
    from examples.fashion_mnist.task import task as fashion_mnist
    from penjing.network.capture import capture_network
    from penjing.randomness import seed_everything
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune

    task, source = fashion_mnist(), trained()
    seed_everything(0)
    context = Context(task=task, seed=0, events=lambda *a, **k: None)
    network = Finetune(epochs=1)(Draft(capture_network(source, *task.call())), context).network
    state = network.state_dict()
    return {n: t.contiguous() for n, t in source.state_dict().items()}, {
        n: state[n].contiguous() for n in source.state_dict()
    }


def minilm(folder: Path) -> tuple[dict, dict]:
    """MiniLM, and after some steps of contrastive training (InfoNCE within a batch of 16)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from examples import data
    from examples.embeddings.task import halves

    torch.manual_seed(0)
    network, tokenizer = AutoModel.from_pretrained(data.minilm()), AutoTokenizer.from_pretrained(data.minilm())
    old = {n: t.clone().contiguous() for n, t in network.state_dict().items()}
    firsts, rests = halves(data.texts("20newsgroups")["train"][0], 16 * STEPS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-5)
    network.train()

    def embedded(texts):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        hidden, mask = network(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    for step in range(STEPS):
        some = slice(16 * step, 16 * step + 16)
        likeness = embedded(firsts[some]) @ embedded(rests[some]).T / 0.05
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(likeness, torch.arange(len(likeness))).backward()
        optimizer.step()
    return old, {n: t.detach().clone().contiguous() for n, t in network.state_dict().items()}


def measured(old: Path, new: Path, nncodec_python: str | None, tools: list[str] | None) -> list[dict]:
    """A row for every tool."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tool, there, back in (
            ("penjing", penjing_there, penjing_back),
            ("bsdiff", bsdiff_there, bsdiff_back),
            ("zstd", zstd_there, zstd_back),
        ):
            large = tool == "bsdiff" and new.stat().st_size > BSDIFF_BYTES
            if large or tool not in (tools or [tool]):
                continue
            start = time.perf_counter()
            there(old, new, folder / "update")
            middle = time.perf_counter()
            back(old, folder / "update", folder / "again")
            end = time.perf_counter()
            if (folder / "again").read_bytes() != new.read_bytes():
                raise SystemExit(f"{tool} does not give back {new}")
            size = (folder / "update").stat().st_size
            rows.append({"tool": tool, "bytes": size, "there_s": middle - start, "back_s": end - middle})
        if nncodec_python and "nncodec" in (tools or ["nncodec"]):
            rows.append(nncodec(old, new, nncodec_python, folder))
    return rows


def penjing_there(old: Path, new: Path, update: Path) -> None:
    """`penjing.storage.delta`."""
    from penjing.storage import delta

    delta.delta(old, new, update, threads=THREADS, force=True)


def penjing_back(old: Path, update: Path, again: Path) -> None:
    """`penjing.storage.delta`."""
    from penjing.storage import delta

    delta.patch(old, update, again, threads=THREADS, force=True)


def bsdiff_there(old: Path, new: Path, update: Path) -> None:
    """The package bsdiff4."""
    import bsdiff4

    bsdiff4.file_diff(str(old), str(new), str(update))


def bsdiff_back(old: Path, update: Path, again: Path) -> None:
    """The package bsdiff4."""
    import bsdiff4

    bsdiff4.file_patch(str(old), str(again), str(update))


def zstd_there(old: Path, new: Path, update: Path) -> None:
    """The command `zstd -19 --patch-from`, with a window that holds both files."""
    command = ["zstd", "-q", "-f", "-19", "--long=28", "--single-thread", f"--patch-from={old}", str(new)]
    subprocess.run([*command, "-o", str(update)], check=True, stderr=subprocess.DEVNULL)


def zstd_back(old: Path, update: Path, again: Path) -> None:
    """The command `zstd -d --patch-from`."""
    command = ["zstd", "-q", "-f", "-d", "--long=28", f"--patch-from={old}", str(update), "-o", str(again)]
    subprocess.run(command, check=True)


def nncodec(old: Path, new: Path, python: str, folder: Path) -> dict:
    """Nncodec's part: tensors as integers, coded in its own environment."""
    import numpy as np

    for name, file in (("old", old), ("new", new)):
        np.savez(folder / f"{name}.npz", **integers(file))
    command = [python, __file__, "--work", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {"tool": "nncodec", **json.loads(done.stdout.splitlines()[-1])}


def integers(file: Path) -> dict:
    """Every tensor of a file as 32-bit integers: floats as their bit patterns, of which negative ones are turned."""
    import numpy as np

    from penjing.storage import number_types
    from penjing.storage.regions import BITS, regions

    content = np.memmap(file, np.uint8, "r")
    tensors = {}
    for region in regions(file, content):
        part = np.ascontiguousarray(content[region.offset : region.offset + region.size])
        values = number_types.numbers(part, region.dtype)
        if region.dtype in number_types.FLOATS:
            sign = 1 << (BITS[region.dtype] - 1)
            values = np.where(values >= sign, sign - values, values)
        tensors[region.name] = values.astype(np.int32).reshape(region.shape or (1,))
    return tensors


def nncodec_work(folder: Path) -> None:
    """Code the differences, alone and with the old values as temporal context; print the smaller as JSON."""
    import copy

    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import nncodec_imports  # noqa: F401  before nncodec
    import numpy as np
    from nncodec import nnc

    old, new = ({n: f[n] for n in f.files} for f in (np.load(folder / "old.npz"), np.load(folder / "new.npz")))
    # A tensor of another shape is sent as it is.
    old = {n: old[n] if n in old and old[n].shape == t.shape else np.zeros_like(t) for n, t in new.items()}
    change = {n: t - old[n] for n, t in new.items()}
    rows = []
    for context in (False, True):
        base = {"parameters": {}, "put_node_depth": {}, "device_id": 0, "parameter_id": {}} if context else None
        if context:
            first = nnc.compress(old, bitstream_path=None, return_bitstream=True)
            nnc.decompress(first, approx_param_base=base, update_base_param=True)
        options = (
            {"tca": True, "compress_differences": True, "approx_param_base": copy.deepcopy(base)} if context else {}
        )
        start = time.perf_counter()
        bits = nnc.compress(
            change, bitstream_path=None, return_bitstream=True, row_skipping=True, use_dq=True, **options
        )
        middle = time.perf_counter()
        again = nnc.decompress(bits, approx_param_base=base)
        end = time.perf_counter()
        # What did not change is not told.
        if any((np.reshape(again.get(n, np.zeros_like(t)), t.shape) != t).any() for n, t in change.items()):
            raise SystemExit("nncodec does not give back the changes")
        rows.append({"bytes": len(bits), "there_s": middle - start, "back_s": end - middle, "context": context})
    print(json.dumps(min(rows, key=lambda row: row["bytes"])))


if __name__ == "__main__":
    main()
