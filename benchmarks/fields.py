"""The examples of the fields in INT8, by tool and runtime: each by its metric, on data never seen.

Every tool gets the same calibration inputs and no labels, and each artifact is judged by the task's own metric on the
same test data, in the runtime that it is for: 256 and 600 scenes for detector and segmenter. Peers as their
documentation recommends: NNCF with its default and with its accurate bias correction and mixed preset; ONNX Runtime's
static quantization (pre-processed, QDQ, per channel), MinMax and Entropy. Penjing: Static and CoordinateRounding, what
`compress` tries first.

    python benchmarks/fields.py [--only detection] [--contestants NAME ...]

A contestant that stands in the JSON already is not run again. NNCF has to be importable.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from penjing import measure
from penjing.tasks.opening import open_task
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
FIELDS = {
    "detection": "detector",
    "segmentation": "unet",
    "text": "transformer",
    "tagging": "tagger",
    "keywords": "spotter",
}
Predict = Callable[[np.ndarray], np.ndarray]
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(THREADS)}


def source(network: torch.nn.Module, task: Task, folder: Path) -> Path:
    """The fp32 network as ONNX, from which the peers start."""
    path = folder / "fp32.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    like = task.call()[0][0]
    example = torch.zeros(2, *like.shape[1:], dtype=like.dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            network, (example,), str(path), dynamo=True, dynamic_shapes=({0: batch},),
            input_names=["x"], output_names=["output"], verbose=False, external_data=False,
        )  # fmt: skip
    return path


def images(task: Task) -> np.ndarray:
    """The calibration images, one array."""
    return np.concatenate([np.asarray(batch) for batch in task.calibration])


def torch_fp32(network: torch.nn.Module, task: Task, folder: Path) -> Predict:
    """The source network."""
    return numpy_predictor(network)


def penjing(runtime: str) -> Callable[..., Predict]:
    """Penjing's INT8 in a runtime."""

    def make(network: torch.nn.Module, task: Task, folder: Path) -> Predict:
        from penjing import runtimes
        from penjing.network.capture import capture_network
        from penjing.pipeline import building
        from penjing.quantize import CoordinateRounding, Static
        from penjing.runtimes import open_artifact
        from penjing.steps.draft import Draft
        from penjing.steps.step import Context

        capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
        captured = capture_network(network, *task.call())
        draft = Draft(captured)
        context = Context(task=task, capabilities=capabilities, source=captured)
        for step in (Static(outliers="mitigate"), CoordinateRounding()):
            draft = step(draft, context)
        building.build(draft, runtime, "int8", task, {"kind": "tensor"}, folder)
        session = open_artifact(folder, THREADS)
        return lambda x: session.run([x])[0]

    return make


def nncf(accurate: bool) -> Callable[..., Predict]:
    """NNCF's INT8 in OpenVINO."""

    def make(network: torch.nn.Module, task: Task, folder: Path) -> Predict:
        import nncf
        import openvino

        data = nncf.Dataset([image[None] for image in images(task)])
        settings = {"fast_bias_correction": False, "preset": nncf.QuantizationPreset.MIXED} if accurate else {}
        model = openvino.convert_model(str(source(network, task, folder)))
        quantized = nncf.quantize(model, data, subset_size=len(images(task)), **settings)
        compiled = openvino.Core().compile_model(quantized, "CPU", PRECISE)
        return lambda x: compiled([x])[0].copy()

    return make


def onnxruntime(method: str) -> Callable[..., Predict]:
    """ONNX Runtime's static quantization in ONNX Runtime."""

    def make(network: torch.nn.Module, task: Task, folder: Path) -> Predict:
        import onnxruntime
        import ptq_cost

        with contextlib.redirect_stdout(io.StringIO()):
            ptq_cost._onnxruntime(source(network, task, folder), torch.from_numpy(images(task)), folder, method)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]

    return make


CONTESTANTS = {
    "torch fp32": torch_fp32,
    "penjing in onnxruntime": penjing("onnxruntime"),
    "penjing in openvino": penjing("openvino"),
    "ort static MinMax": onnxruntime("MinMax"),
    "ort static Entropy": onnxruntime("Entropy"),
    "nncf default": nncf(accurate=False),
    "nncf accurate": nncf(accurate=True),
}


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIELDS, default=["detection", "segmentation"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fields.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results |= {
        "machine": dataclasses.asdict(measure.machine(THREADS)),
        "versions": measure.versions() | {"nncf": importlib.metadata.version("nncf")},
    }
    for field in arguments.only:
        folder = ROOT / "examples" / field
        task = open_task(f"{folder / 'task.py'}:task")
        module = __import__(f"examples.{field}.network", fromlist=["network"])
        network = getattr(module, FIELDS[field])()
        rows = results.setdefault(field, {"metric_name": task.metric_name, "rows": {}})["rows"]
        for name in arguments.contestants:
            if name not in rows:
                with tempfile.TemporaryDirectory() as aside:
                    start = time.perf_counter()
                    predict = CONTESTANTS[name](network, task, Path(aside))
                    seconds = time.perf_counter() - start
                    rows[name] = {"metric": task.evaluate(predict), "seconds": seconds}
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")
            loss = 100 * (rows["torch fp32"]["metric"] - rows[name]["metric"]) if "torch fp32" in rows else float("nan")
            print(f"{field:<14} {name:<26} {task.metric_name} {rows[name]['metric']:.4f}  lost {loss:5.2f} points",
                  flush=True)  # fmt: skip
    print(arguments.out)


if __name__ == "__main__":
    main()
