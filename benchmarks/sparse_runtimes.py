"""Cost and gain of sparse weights: unstructured 50 to 90 %, N:M and blocks.

The trained ResNet-20 on Fashion-MNIST and the sentence encoder all-MiniLM-L6-v2, pruned in one shot without further
training, by `prune.Magnitude`, `prune.Wanda` and `prune.SparseGPT`:

- `accuracy`: of ResNet-20 on the test images; for MiniLM the mean cosine similarity of its sentence embeddings to
  those of the dense network, on texts outside the calibration set.
- `bytes`: the ONNX file, uncompressed and compressed (DEFLATE in a zip, LZMA in an xz), written, read back and
  compared. The same for OpenVINO's INT8 files.
- `latency`: ONNX Runtime, OpenVINO and torch, dense and sparse files in interleaved rounds; OpenVINO's INT8 with and
  without its option for sparse weights; torch's own sparse matrices.

In the parts `bytes` and `latency` the zeros come from `prune.Magnitude`: only their number and pattern matter there.

    python benchmarks/sparse_runtimes.py [--parts accuracy bytes latency] [--networks resnet20 minilm]
        [--repeats 7] [--seconds 1] [--texts 128] [--folder DIR]

Parts and networks that are not named keep their figures in the JSON. Built files are stored in `--folder`.
"""

import argparse
import functools
import hashlib
import json
import lzma
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
THREADS = 2
PATTERNS = {
    "dense": None,
    "unstructured 50 %": {"sparsity": 0.5},
    "unstructured 70 %": {"sparsity": 0.7},
    "unstructured 80 %": {"sparsity": 0.8},
    "unstructured 90 %": {"sparsity": 0.9},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "blocks 4x4, 50 %": {"sparsity": 0.5, "pattern": "4x4"},
}
METHODS = ("Magnitude", "Wanda", "SparseGPT")
BATCHES = {"resnet20": (1, 32), "minilm": (1, 16)}
METRICS = {"resnet20": "accuracy", "minilm": "cosine"}
INTEGER = (
    "dense",
    "unstructured 50 %",
    "unstructured 80 %",
    "unstructured 90 %",
    "2:4",
)  # the patterns that are also measured in INT8
CSR = (
    "unstructured 50 %",
    "unstructured 80 %",
    "unstructured 90 %",
)  # and those measured with torch's sparse matrices
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"


@functools.cache
def subject(name):
    """The captured network, its task, and the original module."""
    from penjing.network.capture import capture_network

    if name == "resnet20":
        from examples.fashion_mnist.network import resnet20
        from examples.fashion_mnist.task import task as fashion

        model, task = resnet20(), fashion()
    else:
        import minilm_int8

        from penjing.tasks.task import Task

        texts = [text for s in minilm_int8.SETS for text in minilm_int8.labelled(s, "train", 64)[0]]
        calibration = minilm_int8.tokens(texts)
        task = Task(
            example={k: v[:2] for k, v in calibration[0].items()},
            calibration=calibration,
            dynamic={k: {0: "batch", 1: "length"} for k in calibration[0]},
        )
        model = minilm_int8.encoder()
    return capture_network(model, *task.call(), task.dynamic), task, model


def pruned(name, pattern, method="Magnitude"):
    """The sparse network as a draft; None if the method does not support the pattern."""
    from penjing import prune
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    network, task, _ = subject(name)
    settings = PATTERNS[pattern]
    if settings is None:
        return Draft(network)
    if method == "SparseGPT" and "x" in settings.get("pattern", ""):
        return None
    return getattr(prune, method)(**settings)(Draft(network), Context(task=task, source=network))


def zeros(draft):
    """The share of zeros among the pruned weights."""
    weights = [draft.network.get_parameter(name) for name in draft.sparse]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


# --- accuracy ---------------------------------------------------------------------------------------------------


def judge(name, texts):
    """network → its figure."""
    import torch

    from penjing.tasks.outputs import numpy_predictor

    network, task, _ = subject(name)
    if name == "resnet20":
        return lambda some: task.evaluate(numpy_predictor(some))
    import minilm_int8

    batches = [b for s in minilm_int8.SETS for b in minilm_int8.tokens(minilm_int8.labelled(s, "test", texts)[0])]

    def vectors(some):
        with torch.no_grad():
            return torch.cat([some(**b) for b in batches])

    exact = vectors(network)
    return lambda some: float((vectors(some) * exact).sum(1).mean())


def accuracy(name, rows, options, save):
    """The figure of every pattern and method."""
    figure = judge(name, options.texts)
    print(f"\n{name}: {METRICS[name]}\n{'':<20}{'zeros':>8}" + "".join(f"{m:>12}" for m in METHODS))
    for pattern in PATTERNS:
        row = rows.setdefault(pattern, {})
        row[METRICS[name]] = figures = {}
        if pattern == "dense":
            row["zeros"] = 0.0
            figures["dense"] = figure(subject(name)[0])
        else:
            for method in METHODS:
                draft = pruned(name, pattern, method)
                figures[method] = None if draft is None else figure(draft.network.eval())
                if method == "Magnitude":
                    row["zeros"] = zeros(draft)
        cells = "".join(f"{'' if v is None else f'{v:.4f}':>12}" for v in figures.values())
        print(f"{pattern:<20}{row['zeros']:>8.1%}{cells}", flush=True)
        save()


# --- files ------------------------------------------------------------------------------------------------------


def built(name, pattern, runtime, precision, folder):
    """The folder of the artifact, built if it is missing."""
    from penjing import measure, runtimes
    from penjing.pipeline import building
    from penjing.quantize import Static
    from penjing.steps.step import Context

    artifact = folder / name / f"{runtime} {precision}" / pattern.replace(":", "of")
    if (artifact / "manifest.json").exists():
        return artifact
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.mkdir(parents=True)
    network, task, _ = subject(name)
    draft = pruned(name, pattern)
    if precision.startswith("int8"):
        capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
        step = Static(exclude=("*/add#*",)) if name == "minilm" else Static()
        draft = step(draft, Context(task=task, capabilities=capabilities, source=network))
    building.build(draft, runtime, precision, task, {"kind": "tensor"}, artifact)
    return artifact


def packed(files, aside):
    """Sizes of files uncompressed, in a zip and as xz; each is written, read back, and compared."""
    plain = {path.name: path.read_bytes() for path in files}
    archive = aside / "packed.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for entry, content in plain.items():
            target.writestr(entry, content)
    with zipfile.ZipFile(archive) as target:
        _same(plain, {entry: target.read(entry) for entry in target.namelist()})
    sizes = {"file": sum(map(len, plain.values())), "zip": archive.stat().st_size, "xz": 0}
    for entry, content in plain.items():
        path = aside / f"{entry}.xz"
        with lzma.open(path, "wb", preset=6) as target:
            target.write(content)
        with lzma.open(path) as target:
            _same({entry: content}, {entry: target.read()})
        sizes["xz"] += path.stat().st_size
    return sizes


def _same(before, after):
    digests = [{k: hashlib.sha256(v).hexdigest() for k, v in each.items()} for each in (before, after)]
    if digests[0] != digests[1]:
        raise SystemExit("a packed file is not what was packed")


def sizes(name, rows, options, save):
    """Sizes of the files, compressed and uncompressed."""
    from penjing.records.manifest import read_manifest

    print(f"\n{name}: bytes\n{'':<36}{'file':>12}{'zip':>12}{'xz':>12}")
    kinds = [("onnxruntime", "fp32", "bytes", tuple(PATTERNS)), ("openvino", "int8", "int8_bytes", INTEGER)]
    for runtime, precision, key, patterns in kinds:
        for pattern in patterns:
            artifact = built(name, pattern, runtime, precision, options.folder)
            files = [artifact / f for f in read_manifest(artifact).files()]
            with tempfile.TemporaryDirectory() as aside:
                totals = packed(files, Path(aside))
            rows.setdefault(pattern, {})[key] = totals
            print(f"{precision + ', ' + pattern:<36}" + "".join(f"{v:>12,}" for v in totals.values()), flush=True)
            save()


# --- latency ----------------------------------------------------------------------------------------------------


def inputs(name, batch):
    """The arrays of a call."""
    import numpy as np

    if name == "resnet20":
        return [np.random.default_rng(0).standard_normal((batch, 1, 28, 28), dtype=np.float32)]
    import minilm_int8

    some = minilm_int8.tokens(minilm_int8.labelled(minilm_int8.SETS[0], "test", batch)[0], batch)[0]
    return [some["input_ids"].numpy(), some["attention_mask"].numpy()]


def timed(name, folders, options, opener=None):
    """Contestant → batch → latency and speed-up over the first contestant, in interleaved rounds."""
    from penjing.measure import Target, compare, ratio

    latencies = {key: {} for key in folders}
    more = {} if opener is None else {"opener": opener}
    for batch in BATCHES[name]:
        targets = [Target(key, folder, inputs(name, batch), batch) for key, folder in folders.items()]
        timings = compare(targets, threads=THREADS, seconds=options.seconds, rounds=options.repeats, **more)
        first = timings[next(iter(folders))]
        for key, timing in timings.items():
            latencies[key][str(batch)] = vars(timing.latency) | {"speedup": ratio(first, timing)}
            print(
                f"  {key:<28} batch {batch:<3}{timing.latency.median:>9.3f} ms  spread {timing.latency.spread:>4.0%}"
                f"  {ratio(first, timing):.2f}x",
                flush=True,
            )
    return latencies


def latency(name, rows, options, save):
    """Time every runtime's files in interleaved rounds."""
    for runtime in ("onnxruntime", "openvino", "torch"):
        print(f"\n{name}, {runtime} fp32")
        folders = {p: built(name, p, runtime, "fp32", options.folder) for p in PATTERNS}
        for pattern, by_batch in timed(name, folders, options).items():
            rows.setdefault(pattern, {}).setdefault("latency_ms", {})[runtime] = by_batch
        save()


def sparse_kernels(name, entry, options, save):
    """The runtimes' support for sparsity: OpenVINO's option for INT8, torch's sparse matrices."""
    print(f"\n{name}, openvino int8")
    folders = {}
    for pattern in INTEGER:
        folders[pattern] = built(name, pattern, "openvino", "int8", options.folder)
        folders[f"{pattern}, {RATE}"] = _with_option(folders[pattern])
    entry["openvino_int8"] = timed(name, folders, options)
    save()
    entry["torch_sparse"] = torch_sparse(name, options)
    save()


def _with_option(folder):
    """A copy of the artifact with OpenVINO's option to compress weights of which more than 40 % are zero."""
    copy = folder.with_name(f"{folder.name} packed")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"][RATE] = "0.4"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def torch_sparse(name, options):
    """Torch's own sparse matrices as linear layers' weights; a text where torch has none."""
    import torch
    from safetensors.torch import save_file

    weight = pruned(name, "2:4").network.get_parameter(pruned(name, "2:4").sparse[-1]).detach()
    try:
        torch.sparse.to_sparse_semi_structured(weight.flatten(1))
        semi = "runs"
    except (RuntimeError, NotImplementedError) as error:
        semi = " ".join(str(error).split())
    if name == "resnet20":
        csr = "not tried: torch has no convolution that takes a sparse weight, and one layer of 22 is linear"
        return {"semi_structured": semi, "csr": csr}
    print(f"\n{name}, torch modules")
    folders = {}
    for key in ("dense", *(f"{p}{kind}" for p in CSR for kind in ("", ", CSR"))):
        folders[key] = folder = options.folder / name / "modules" / key
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(pruned(name, key.removesuffix(", CSR")).network.named_parameters())
        save_file({k: v.detach().contiguous() for k, v in state.items()}, folder / "weights.safetensors")
    return {"semi_structured": semi, "csr": timed(name, folders, options, opener="sparse_runtimes:open_modules")}


def open_modules(folder, threads):
    """MiniLM as its original modules, with CSR weights in linear layers if the folder's name says so."""
    import minilm_int8
    import torch
    from safetensors.torch import load_file

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    folder = Path(folder)
    model = minilm_int8.encoder()
    if unknown := model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False).unexpected_keys:
        raise KeyError(unknown)  # only the unused pooler is missing

    class Sparse(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias.detach()

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    if folder.name.endswith("CSR"):
        for module in list(model.modules()):
            for child, inner in list(module.named_children()):
                if isinstance(inner, torch.nn.Linear):
                    setattr(module, child, Sparse(inner))

    class Session:
        @torch.no_grad()  # sparse matrices do not support inference mode
        def run(self, arrays):
            return [model(*map(torch.from_numpy, arrays)).numpy()]

    return Session()


def notes():
    """Notes needed to interpret the figures."""
    import openvino

    from penjing import measure

    supported = RATE in openvino.Core().get_property("CPU", "SUPPORTED_PROPERTIES")
    amx = any(s.startswith("amx") for s in measure.machine(THREADS).instruction_sets)
    return {
        RATE: f"{'accepted' if supported else 'unknown'} by openvino {openvino.__version__}; its kernel is one of "
        f"Intel's AMX, which this processor {'has' if amx else 'does not have'}",
        "packed": "zip: DEFLATE level 9 (zipfile); xz: LZMA2 preset 6 (lzma); this Python has no zstd",
        "speedup": "median over the rounds of dense latency / sparse latency",
    }


def main() -> None:
    """Run the parts, print tables, merge them into the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "bytes", "latency"])
    parser.add_argument("--networks", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=7, help="turns of every file")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed seconds of every file")
    parser.add_argument("--texts", type=int, default=128, help="of each of two sets, that MiniLM is judged on")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-sparse-runtimes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sparse_runtimes.json")
    options = parser.parse_args()
    import psutil
    import torch

    from penjing.errors import MissingDependency
    from penjing.measure import machine, versions

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
    path = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))  # workers open modules with this file
    data = json.loads(options.out.read_text()) if options.out.exists() else {"networks": {}}
    data |= {"machine": vars(machine(THREADS)), "versions": versions(), "notes": notes()}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save():
        options.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for name in options.networks:
        entry = data["networks"].setdefault(name, {"metric": METRICS[name], "rows": {}})
        try:
            subject(name)
        except (MissingDependency, ImportError) as error:
            print(f"{name}: left out, its weights are not installed ({error})")
            if not entry["rows"]:
                entry["left_out"] = str(error)
            save()
            continue
        entry.pop("left_out", None)
        if "accuracy" in options.parts:
            entry["texts"] = 2 * options.texts if name == "minilm" else None
            accuracy(name, entry["rows"], options, save)
        if "bytes" in options.parts:
            sizes(name, entry["rows"], options, save)
        if "latency" in options.parts:
            entry["latency_settings"] = {
                "rounds": options.repeats,
                "seconds": options.seconds,
                "threads": THREADS,
                "others": psutil.cpu_percent(interval=3) / 100,  # share of the processor that others use
            }
            latency(name, entry["rows"], options, save)
            sparse_kernels(name, entry, options, save)
    save()
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
