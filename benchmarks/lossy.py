"""EfficientNet-Lite0 packed with loss: bytes at the same agreement, against its INT8 file packed and nncodec.

`share.Grid(agreement=...)` sees the 300 calibration pictures only (a third of them held out for its limit); its network
is written as an fp32 file for ONNX Runtime, packed, unpacked and run there. The INT8 file is what `penjing quantize`
writes for ONNX Runtime, packed. nncodec 2 codes the weights of two and more axes of the same network with its dependent
quantization at the coarsest qp whose network reaches the agreement (biases, norms and what is not a tensor are not
counted for it). Agreement is the share of equal top-1 predictions with the fp32 network on the 496 other pictures,
read once for each contestant but nncodec, whose qp is chosen by it.

    python benchmarks/lossy.py [--agreement 0.95] [--nncodec-python PYTHON] [--folder DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
QPS = (-37, -38, -39, -40, -43, -46)


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agreement", type=float, default=0.95)
    parser.add_argument("--nncodec-python", metavar="PYTHON")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-lossy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/lossy.json")
    arguments = parser.parse_args()
    import torch

    from penjing.measure import machine, versions

    torch.set_num_threads(THREADS)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, contestant in (("grid", grid), ("int8", int8), ("nncodec", nncodec)):
        if name == "nncodec" and not arguments.nncodec_python:
            continue
        start = time.perf_counter()
        row = {"name": name, **contestant(folder, arguments)}
        rows.append(row | {"seconds": time.perf_counter() - start})
        print(json.dumps(rows[-1]), flush=True)
    data = {
        "machine": vars(machine(THREADS)), "versions": versions() | {"nncodec": "2.1.3"},
        "agreement": arguments.agreement, "rows": rows,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def references(folder: Path):
    """The fp32 network's outputs for the 496 pictures."""
    import numpy as np

    file = folder / "references.npy"
    if not file.exists():
        np.save(file, np.concatenate(list(outputs(torch_predictor(network())))))
    return np.load(file)


def network():
    """EfficientNet-Lite0."""
    from examples.imagenet_lite0.network import lite0

    return lite0().eval()


def torch_predictor(module):
    """A function from NumPy to NumPy."""
    import torch

    def predict(x):
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return predict


def outputs(predict):
    """What a predictor gives for the 496 pictures, batch by batch."""
    from examples.imagenet_lite0.task import task

    listed = []
    task().evaluate(lambda x: listed.append(predict(x)) or listed[-1])
    return listed


def judged(folder: Path, predict) -> dict:
    """Agreement and noise on the 496 pictures."""
    import numpy as np

    expected, got = references(folder), np.concatenate(outputs(predict))
    noise = ((got - expected) ** 2).sum()
    return {
        "agreement": float((got.argmax(1) == expected.argmax(1)).mean()),
        "snr_db": float(10 * np.log10((expected**2).sum() / noise)),
    }


def in_onnxruntime(file: Path):
    """A predictor that runs an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def grid(folder: Path, arguments) -> dict:
    """The network with weights on grids, packed, unpacked and run."""
    from examples.imagenet_lite0.task import task as lite0_task
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.share import Grid
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.storage import packed

    task, log = lite0_task(), []

    def note(kind, **values):
        if kind == "grid":
            log.append(values)
            print(values, flush=True)

    draft = Draft(capture_network(network(), *task.call()))
    draft = Grid(agreement=arguments.agreement)(draft, Context(task=task, events=note))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        (place / "artifact").mkdir()
        building.build(draft, "onnxruntime", "fp32", task, {"kind": "tensor"}, place / "artifact")
        done = packed.pack(place / "artifact", folder / "grid.pj", force=True, threads=THREADS)
        packed.unpack(done.path, place / "again", threads=THREADS)
        (file,) = (place / "again").glob("*.onnx")
        return {"bytes": done.size_bytes, "trials": log, **judged(folder, in_onnxruntime(file))}


def int8(folder: Path, arguments) -> dict:
    """The INT8 file, packed."""
    from examples.imagenet_lite0.task import task
    from penjing.pipeline.quick import quantize_to
    from penjing.storage import packed

    file = folder / "int8.onnx"
    if not file.exists():
        quantize_to(network(), task(), file)
    done = packed.pack(file, folder / "int8.pj", force=True, threads=THREADS)
    return {"bytes": done.size_bytes, "file_bytes": file.stat().st_size, **judged(folder, in_onnxruntime(file))}


def nncodec(folder: Path, arguments) -> dict:
    """The coarsest qp that reaches the agreement."""
    import numpy as np
    import torch

    module = network()
    weights = {n: t.numpy() for n, t in module.state_dict().items() if t.dim() > 1}
    np.savez(folder / "weights.npz", **weights)
    tried = []
    for qp in QPS:
        script = ROOT / "benchmarks/peers/nncodec_lossy.py"
        done = subprocess.run(
            [arguments.nncodec_python, str(script), str(folder), str(qp)], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        with np.load(folder / "decoded.npz") as decoded:
            state = {n: torch.from_numpy(decoded[n].reshape(w.shape)) for n, w in weights.items()}
        module.load_state_dict(module.state_dict() | state)
        size = int(done.stdout.split()[-1])
        tried.append({"qp": qp, "bytes": size, **judged(folder, torch_predictor(module))})
        print(tried[-1], flush=True)
        if tried[-1]["agreement"] >= arguments.agreement:
            break
    return {**tried[-1], "trials": tried}


if __name__ == "__main__":
    main()
