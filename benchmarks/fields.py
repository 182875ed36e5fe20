"""The examples of the fields in INT8, by tool and runtime: each by its metric, on data never seen.

Every tool gets the same calibration inputs and no labels, and each artifact is judged by the task's own metric on the
same test data, in the runtime that it is for. Where the data is by construction there are several test sets, and the
row has the metric of each; the noise is that of the outputs against the fp32 network, over the first set. Peers as
their documentation recommends: NNCF with its default and with its accurate bias correction and mixed preset, told that
a transformer is one; ONNX Runtime's static quantization (pre-processed, QDQ, per channel), MinMax and Entropy, and for
transformers its dynamic one. Penjing: what `compress` tries first.

    python benchmarks/fields.py [--only text] [--contestants NAME ...] [--train detection]

A contestant that stands in the JSON already is not run again. NNCF has to be importable. `--train` times one epoch of
an example's training, by the clock and by the processor's time; the weights are thrown away.
"""

import argparse
import contextlib
import dataclasses
import importlib
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

import field_tests

from examples.training import trained
from penjing import measure
from penjing.tasks.call import as_call, to_tensors
from penjing.tasks.opening import open_task
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
NETWORKS = {  # field → the function of its network.py
    "detection": "detector",
    "segmentation": "unet",
    "text": "transformer",
    "tagging": "tagger",
    "keywords": "spotter",
    "recommendation": "neumf",
    "embeddings": "minilm",
}
TRANSFORMERS = ("text", "embeddings")
NO_NOISE = ("detection",)  # pixels and scores in one tensor have no noise in common
Predict = Callable[..., np.ndarray]
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(THREADS)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a contestant is given: a field's network and task, and a folder for its files."""

    field: str
    network: torch.nn.Module
    task: Task
    folder: Path


def named(args: tuple, kwargs: dict) -> dict[str, np.ndarray]:
    """The inputs by the names that the ONNX file has."""
    return kwargs or {f"x{i}": array for i, array in enumerate(args)}


def source(case: Case) -> Path:
    """The fp32 network as ONNX, from which the peers start."""
    path = case.folder / "fp32.onnx"
    args, kwargs = case.task.call()
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    shapes = {name: batch for name in kwargs} or tuple(batch for _ in args)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            case.network, tuple(torch.cat([x, x])[:2] for x in args), str(path),
            kwargs={name: torch.cat([x, x])[:2] for name, x in kwargs.items()}, dynamo=True, dynamic_shapes=shapes,
            input_names=list(named(args, kwargs)), output_names=["output"], verbose=False, external_data=False,
        )  # fmt: skip
    return path


def samples(task: Task) -> list[dict[str, np.ndarray]]:
    """The calibration inputs one by one, by name."""
    rows = []
    for batch in task.calibration:
        args, kwargs = to_tensors(as_call(batch))
        arrays = {name: array.numpy() for name, array in named(args, kwargs).items()}
        rows += [
            {name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(next(iter(arrays.values()))))
        ]
    return rows


def torch_fp32(case: Case) -> Predict:
    """The source network."""
    return numpy_predictor(case.network)


def penjing(runtime: str) -> Callable[[Case], Predict]:
    """Penjing's INT8 in a runtime."""

    def make(case: Case) -> Predict:
        from penjing import runtimes
        from penjing.network.capture import capture_network
        from penjing.pipeline import building
        from penjing.pipeline.order import default_recipe
        from penjing.runtimes import open_artifact
        from penjing.runtimes.artifact import predictor
        from penjing.steps.draft import Draft
        from penjing.steps.step import Context

        capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
        captured = capture_network(case.network, *case.task.call())
        draft = Draft(captured)
        context = Context(task=case.task, capabilities=capabilities, source=captured)
        for step in default_recipe():
            draft = step(draft, context)
        manifest = building.build(draft, runtime, "int8", case.task, {"kind": "tensor"}, case.folder)
        return predictor(open_artifact(case.folder, THREADS), manifest)

    return make


def nncf(accurate: bool) -> Callable[[Case], Predict]:
    """NNCF's INT8 in OpenVINO."""

    def make(case: Case) -> Predict:
        import nncf
        import openvino

        rows = samples(case.task)
        settings = {"fast_bias_correction": False, "preset": nncf.QuantizationPreset.MIXED} if accurate else {}
        if case.field in TRANSFORMERS:
            settings["model_type"] = nncf.ModelType.TRANSFORMER
        model = openvino.convert_model(str(source(case)))
        quantized = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), **settings)
        compiled = openvino.Core().compile_model(quantized, "CPU", PRECISE)
        return lambda *args, **kwargs: compiled(named(args, kwargs))[0].copy()

    return make


def onnxruntime(method: str) -> Callable[[Case], Predict]:
    """ONNX Runtime's quantization in ONNX Runtime: static by a method of calibration, or dynamic."""

    def make(case: Case) -> Predict:
        import onnxruntime
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready, path = case.folder / "ready.onnx", case.folder / "model.onnx"
        rows = iter(samples(case.task))

        class Reader:  # of the form of its CalibrationDataReader
            def get_next(self):
                return next(rows, None)

        with contextlib.redirect_stdout(io.StringIO()):
            quant_pre_process(str(source(case)), str(ready), skip_symbolic_shape=True)
            if method == "dynamic":
                quantization.quantize_dynamic(
                    str(ready), str(path), per_channel=True, weight_type=quantization.QuantType.QInt8
                )
            else:
                quantization.quantize_static(
                    str(ready), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True, activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    calibrate_method=quantization.CalibrationMethod[method],
                )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda *args, **kwargs: session.run(None, named(args, kwargs))[0]

    return make


SOURCE = "torch fp32"
CONTESTANTS = {
    SOURCE: torch_fp32,
    "penjing in onnxruntime": penjing("onnxruntime"),
    "penjing in openvino": penjing("openvino"),
    "ort static MinMax": onnxruntime("MinMax"),
    "ort static Entropy": onnxruntime("Entropy"),
    "ort dynamic": onnxruntime("dynamic"),
    "nncf default": nncf(accurate=False),
    "nncf accurate": nncf(accurate=True),
}


class Listening:
    """A contestant's `predict`, whose first outputs are compared with the fp32 network's, call by call."""

    def __init__(self, predict: Predict, answers: list[np.ndarray] | None) -> None:
        self.predict, self.answers, self.outputs = predict, answers, []

    def __call__(self, *args: np.ndarray, **kwargs: np.ndarray) -> np.ndarray:
        output = self.predict(*args, **kwargs)
        self.outputs.append(output)
        return output

    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of all outputs."""
        if self.answers is None:
            return None
        pairs = [(a.astype(np.float64), b) for a, b in zip(self.answers, self.outputs, strict=True)]
        power, noise = sum(float((a**2).sum()) for a, _ in pairs), sum(float(((a - b) ** 2).sum()) for a, b in pairs)
        return 10 * float(np.log10(power / max(noise, 1e-30)))


def judged(case: Case, predict: Predict, answers: list[np.ndarray] | None) -> tuple[dict, list[np.ndarray]]:
    """The row of a contestant, and its outputs on the first test set."""
    listening = Listening(predict, answers)
    metrics = [case.task.evaluate(listening)]
    snr_db = listening.snr_db()
    metrics += [evaluate(predict) for evaluate in field_tests.more(case.field)]
    row = {"metric": float(np.mean(metrics)), "metrics": metrics}
    return row | ({} if snr_db is None else {"snr_db": snr_db}), listening.outputs


def opened(field: str) -> tuple[torch.nn.Module, Task]:
    """An example's trained network and its task."""
    network = getattr(importlib.import_module(f"examples.{field}.network"), NETWORKS[field])()
    return network, open_task(f"{ROOT / 'examples' / field / 'task.py'}:task")


def training(field: str) -> dict:
    """Seconds of an example's training, from those of one epoch."""
    script, task = importlib.import_module(f"examples.{field}.train"), opened(field)[1]
    clock, processor = time.perf_counter(), time.process_time()
    trained(script.untrained, task, dataclasses.replace(script.SETTINGS, epochs=1))
    epoch = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return {
        "epochs": script.SETTINGS.epochs,
        "epoch": epoch,
        "processor_seconds": script.SETTINGS.epochs * epoch["processor_seconds"],
        "threads": THREADS,
        "remark": "one epoch was timed; others used the machine, so the processor's seconds are the training's own",
    }


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--train", nargs="+", choices=[*NETWORKS][:-1], default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fields.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results |= {
        "machine": dataclasses.asdict(measure.machine(THREADS)),
        "versions": measure.versions() | {"nncf": importlib.metadata.version("nncf")},
    }

    def write() -> None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    for field in arguments.train:
        results.setdefault("training", {})[field] = training(field)
        print(field, results["training"][field], flush=True)
        write()
    for field in arguments.only if not arguments.train else ():
        network, task = opened(field)
        rows, answers = results.setdefault(field, {"metric_name": task.metric_name, "rows": {}})["rows"], None
        for name in arguments.contestants:
            if name in rows or (name == "ort dynamic" and field not in TRANSFORMERS):
                continue
            with tempfile.TemporaryDirectory() as aside:
                case = Case(field, network, task, Path(aside))
                if answers is None and not (field in NO_NOISE and SOURCE in rows):
                    rows[SOURCE], answers = judged(case, torch_fp32(case), None)
                if name == SOURCE:
                    continue
                start = time.perf_counter()
                try:
                    predict = CONTESTANTS[name](case)
                    seconds = time.perf_counter() - start
                    row, _ = judged(case, predict, None if field in NO_NOISE else answers)
                    rows[name] = row | {"seconds": seconds}
                except Exception as error:  # a peer's file that its runtime does not open
                    if name.startswith("penjing"):
                        raise
                    rows[name] = {"error": " ".join(str(error).split())[-300:]}
            write()
            print(field, name, rows[name], flush=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
