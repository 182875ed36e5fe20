"""Cost and quality of post-training quantization: time, peak memory, agreement, noise.

EfficientNet-Lite0 on unlabelled images, 30, 300 and 1,000 samples (repeated if there are fewer), Penjing's defaults
against NNCF's and ONNX Runtime's, each run in its own process, interleaved. Time runs from the fp32 network in the
tool's own format (torch module, OpenVINO model, ONNX file) to the quantized file on disk, excluding imports and image
loading. Peak memory is that of the whole process. Quality is that of the files calibrated on 300 samples (30 for ONNX
Runtime's percentile method, which stores every activation): agreement with fp32 on 496 other images, and the
signal-to-noise ratio of the logits. `int8_latency.py` measures the speed of the files.

    python benchmarks/ptq_cost.py [--repeats 3] [--samples 30 300 1000] [--out benchmarks/results/ptq_cost.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOOLS = ("penjing", "nncf", "ort-minmax", "ort-percentile")
MOST = {"ort-percentile": 30}
"""Sample limits: ONNX Runtime's percentile method stores every activation, over 12 GB for 300 images."""
THREADS = 2


def child(tool: str, samples: int, folder: Path) -> None:
    """Quantize once; writes result.json with seconds and peak memory into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task
    from penjing.measure import peak_memory_bytes, reset_peak

    task = lite0_task()
    batches = list(task.calibration)
    images = torch.cat(batches)
    images = images.repeat(-(-samples // len(images)), 1, 1, 1)[:samples]
    run = {"penjing": _penjing, "nncf": _nncf, "ort-minmax": _onnxruntime, "ort-percentile": _percentile}[tool]
    prepared = _prepare(tool, lite0(), folder)
    reset_peak()
    start = time.perf_counter()
    stages = run(prepared, images, folder)
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()} | ({"stages_s": stages} if stages else {})
    (folder / "result.json").write_text(json.dumps(result))


def _prepare(tool, network, folder):
    """The fp32 network in the format that the tool starts from."""
    import torch

    if tool == "penjing":
        return network
    path = folder / "fp32.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        network.eval(), (torch.zeros(2, 3, 224, 224),), str(path), dynamo=True, dynamic_shapes=({0: batch},),
        input_names=["x"], output_names=["output"], verbose=False, external_data=False,
    )  # fmt: skip
    if tool == "nncf":
        import openvino

        return openvino.convert_model(str(path))
    return path


def _penjing(network, images, folder):
    """Quantize, and return the seconds of every stage, of which capture and export are a large part."""
    from dataclasses import replace

    from examples.imagenet_lite0.task import task as lite0_task
    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.quantize import CoordinateRounding, Static
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    task = replace(lite0_task(), calibration=list(images.split(10)))
    capabilities = runtimes.get("openvino").capabilities(measure.machine(THREADS).instruction_sets)
    context, ends = Context(task=task, capabilities=capabilities), {"": time.perf_counter()}
    draft = Draft(capture_network(network, *task.call()))
    ends["raising"] = time.perf_counter()
    for step in (Static(samples=len(images)), CoordinateRounding()):
        draft = step(draft, context)
        ends[type(step).__name__] = time.perf_counter()
    building.build(draft, "openvino", "int8", task, {"kind": "tensor"}, folder)
    ends["export"] = time.perf_counter()
    return {name: ends[name] - before for name, before in zip(list(ends)[1:], ends.values(), strict=False)}


def _nncf(model, images, folder):
    import nncf
    import openvino

    data = nncf.Dataset([p[None].numpy() for p in images])
    quantized = nncf.quantize(model, data, subset_size=len(images))
    openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)


def _percentile(path, images, folder):
    _onnxruntime(path, images, folder, "Percentile")


def _onnxruntime(path, images, folder, method="MinMax"):
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rows = iter(images)

        def get_next(self):
            row = next(self.rows, None)
            return None if row is None else {"x": row[None].numpy()}

    ready = folder / "ready.onnx"
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(folder / "model.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
    )  # fmt: skip


def opened(tool: str, folder: Path, threads: int = THREADS):
    """`run(list of arrays)` of a quantized file in its runtime."""
    if tool == "penjing":
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)

    class Session:
        def __init__(self):
            if tool == "nncf":
                import openvino

                settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads),
                            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}  # fmt: skip
                self.compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", settings)
            else:
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                self.session = onnxruntime.InferenceSession(
                    str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
                )

        def run(self, inputs):
            if tool == "nncf":
                return [self.compiled(inputs)[0].copy()]
            return self.session.run(None, {"x": inputs[0]})

    return Session()


def quality(tool: str, folder: Path) -> dict:
    """Agreement with fp32 and logit signal-to-noise on the held-out images."""
    import numpy as np
    import torch

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    network, session, power, noise = lite0().eval(), opened(tool, folder), [], []

    def predict(x):
        out = session.run([x])[0]
        with torch.no_grad():
            reference = network(torch.from_numpy(x)).numpy()
        power.append(float((reference.astype(np.float64) ** 2).sum()))
        noise.append(float(((out - reference).astype(np.float64) ** 2).sum()))
        return out

    agreement = lite0_task().evaluate(predict)
    return {"agreement": agreement, "snr_db": 10 * float(np.log10(sum(power) / sum(noise)))}


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[30, 300, 1000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ptq_cost.json")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "SAMPLES", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        tool, samples, folder = arguments.child
        child(tool, int(samples), Path(folder))
        return
    import torch

    from penjing.measure import machine, versions

    torch.set_num_threads(THREADS)
    counts = {tool: [n for n in arguments.samples if n <= MOST.get(tool, n)] for tool in TOOLS}
    tools = [tool for tool in TOOLS if counts[tool]]
    rows = {tool: {n: [] for n in counts[tool]} for tool in tools}
    with tempfile.TemporaryDirectory() as aside:
        for repeat in range(arguments.repeats):
            for samples in arguments.samples:
                for tool in tools if repeat % 2 == 0 else tools[::-1]:
                    if samples not in counts[tool]:
                        continue
                    folder = Path(aside) / f"{tool}-{samples}"
                    folder.mkdir(exist_ok=True)
                    command = [sys.executable, __file__, "--child", tool, str(samples), str(folder)]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                    rows[tool][samples].append(json.loads((folder / "result.json").read_text()))
                    last = rows[tool][samples][-1]
                    print(
                        f"{tool} {samples}: {last['seconds']:.1f} s, {last['peak_memory_bytes'] / 1e6:.0f} MB",
                        flush=True,
                    )
        shown = {tool: 300 if 300 in counts[tool] else counts[tool][-1] for tool in tools}
        qualities = {tool: quality(tool, Path(aside) / f"{tool}-{shown[tool]}") for tool in tools}
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "repeats": arguments.repeats, "tools": {}}
    print(f"\n{'tool':<16}{'samples':>8}{'seconds':>9}{'spread':>8}{'peak MB':>9}{'agree':>8}{'SNR dB':>8}")
    for tool in tools:
        data["tools"][tool] = {
            "quality": qualities[tool],
            "quality_samples": shown[tool],
            "cost": {},
        }
        for samples, runs in rows[tool].items():
            seconds = [r["seconds"] for r in runs]
            middle, spread = statistics.median(seconds), max(seconds) - min(seconds)
            peak = statistics.median(r["peak_memory_bytes"] for r in runs)
            cost = {"seconds": middle, "spread_s": spread, "peak_memory_bytes": peak}
            if "stages_s" in runs[0]:
                cost["stages_s"] = {k: statistics.median(r["stages_s"][k] for r in runs) for k in runs[0]["stages_s"]}
            data["tools"][tool]["cost"][str(samples)] = cost
            line = f"{tool:<16}{samples:>8}{middle:>9.1f}{spread:>8.1f}{peak / 1e6:>9.0f}"
            if samples == shown[tool]:
                line += f"{qualities[tool]['agreement']:>8.4f}{qualities[tool]['snr_db']:>8.1f}"
            print(line)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
