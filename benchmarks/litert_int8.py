"""EfficientNet-Lite0 in INT8 in LiteRT, from Penjing's ranges and from LiteRT's own quantizers.

Every method sees only 300 images; the 496 others are evaluated once, at the end, in the runtime. Agreement is the share
of top-1 predictions equal to the fp32 network's in torch, with a 95 % bootstrap interval over 10,000 resamples of the
images; noise is logit power over error power. Peers, with their documented settings and the same images:
ai-edge-quantizer's static recipe (`recipe.static_wi8_ai8`, from the file that `litert_torch.convert` writes), and
litert-torch's PT2E path (`PT2EQuantizer` with `get_symmetric_quantization_config(is_per_channel=True)`). Latency is
measured side by side, one image a call, each file in a process of its own.

    python benchmarks/litert_int8.py [--only NAME ...] [--folder DIR]

A contestant that is already in --folder is not built again.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
STATIC, ROUNDING = {"quantize.Static": {}}, {"quantize.CoordinateRounding": {}}
RECIPES = {
    "fp32": None,
    "Static": [STATIC],
    "Static + BiasCorrection": [STATIC, {"quantize.BiasCorrection": {}}],
    "Static + CoordinateRounding": [STATIC, ROUNDING],
    "Best": [{"quantize.Best": {}}],
}
CONTESTANTS = {
    **{f"penjing {name}": ("penjing", name) for name in RECIPES},
    "ai-edge-quantizer static_wi8_ai8": ("ai-edge-quantizer", ""),
    "litert-torch PT2E": ("pt2e", ""),
}


def make(name: str, folder: Path) -> None:
    """Write the contestant's model.tflite and `made.json` with its seconds into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    task, network = lite0_task(), lite0().eval()
    kind, how = CONTESTANTS[name]
    images = torch.cat(list(task.calibration))
    start = time.perf_counter()
    if kind == "penjing":
        penjing_file(task, network, RECIPES[how], folder)
    elif kind == "pt2e":
        pt2e_file(network, images, folder)
    else:
        quantizer_file(network, images, folder)
    seconds = time.perf_counter() - start
    (folder / "made.json").write_text(json.dumps({"seconds": seconds}))


def penjing_file(task, network, recipe, folder: Path) -> None:
    """The artifact of a recipe, or fp32."""
    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.recipes.recipe import Recipe
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    capabilities = runtimes.get("litert").capabilities(measure.machine(THREADS).instruction_sets)
    raised = capture_network(network, *task.call())
    draft = Draft(raised)
    for step in Recipe.from_data(recipe or []):
        draft = step(draft, Context(task=task, capabilities=capabilities, source=raised))
    building.build(draft, "litert", "int8" if recipe else "fp32", task, {"kind": "tensor"}, folder)


def quantizer_file(network, images, folder: Path) -> None:
    """ai-edge-quantizer 0.10: its README's static quantization."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    path = folder / "float.tflite"
    litert_torch.convert(network, (images[:1],)).export(str(path))
    tool = quantizer.Quantizer(str(path))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    samples = [{"args_0": image[None].numpy()} for image in images]  # it is read twice
    calibrated = tool.calibrate({"serving_default": samples}, num_threads=THREADS)
    tool.quantize(calibrated).export_model(str(folder / "model.tflite"))
    path.unlink()


def pt2e_file(network, images, folder: Path) -> None:
    """litert-torch 0.10: the PT2E quantization of its documentation."""
    import litert_torch
    import torch
    from litert_torch.quantize import pt2e_quantizer, quant_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    settings = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
    quantizer = pt2e_quantizer.PT2EQuantizer().set_global(settings)
    model = torch.export.export(network, (images[:1],)).module()
    model = prepare_pt2e(model, quantizer)
    with torch.no_grad():
        for image in images:
            model(image[None])
    model = convert_pt2e(model, fold_quantize=False)
    config = quant_config.QuantConfig(pt2e_quantizer=quantizer)
    litert_torch.convert(model, (images[:1],), quant_config=config).export(str(folder / "model.tflite"))


def open_folder(folder, threads):
    """Open a session that runs a list of arrays, one image a call, for the latency workers."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(Path(folder) / "model.tflite"), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def quantized(x):  # PT2E's files take integers and give them
        scale, zero = given["quantization"]
        limits = np.iinfo(given["dtype"])
        return np.clip(np.round(x / scale) + zero, limits.min, limits.max).astype(given["dtype"])

    class Session:
        def run(self, inputs):
            outputs = []
            for image in inputs[0]:
                x = image[None]
                interpreter.set_tensor(given["index"], x if given["dtype"] is np.float32 else quantized(x))
                interpreter.invoke()
                outputs.append(interpreter.get_tensor(result["index"]))
            y = np.concatenate(outputs)
            if result["dtype"] is not np.float32:
                scale, zero = result["quantization"]
                y = (y.astype(np.float32) - zero) * np.float32(scale)
            return [y]

    return Session()


def operators(folder: Path) -> dict:
    """How many operators of the file compute in integers, and how many in floating point."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(Path(folder) / "model.tflite"), experimental_op_resolver_type=resolver)
    types = {tensor["index"]: tensor["dtype"] for tensor in interpreter.get_tensor_details()}
    counts = {"integer": 0, "float": 0}
    for row in interpreter._get_ops_details():
        if row["op_name"] not in ("QUANTIZE", "DEQUANTIZE"):
            counts["integer" if types[row["outputs"][0]] is np.int8 else "float"] += 1
    return counts


def judge(folder: Path) -> dict:
    """Evaluate the 496 images once."""
    import numpy as np
    import torch

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    torch.set_num_threads(THREADS)
    known = folder.parent / "reference.npz"  # the fp32 network's answers, computed once
    stored = dict(np.load(known)) if known.exists() else {}
    network, session = lite0().eval(), open_folder(folder, THREADS)
    signal, noise, same = [], [], []

    def predict(x):
        outputs = session.run([x])[0]
        key = str(len(signal))
        if key not in stored:
            with torch.no_grad():
                stored[key] = network(torch.from_numpy(x)).numpy()
        reference = stored[key]
        signal.append((reference.astype(np.float64) ** 2).sum(1))
        noise.append(((outputs - reference).astype(np.float64) ** 2).sum(1))
        same.append(outputs.argmax(1) == reference.argmax(1))
        return outputs

    accuracy = lite0_task().evaluate(predict)
    np.savez(known, **stored)
    signal, noise, same = (np.concatenate(x) for x in (signal, noise, same))
    draws = np.random.default_rng(0).integers(0, len(same), (10_000, len(same)))
    low, high = np.percentile(same[draws].mean(1), [2.5, 97.5])
    return {
        "metric": float(accuracy),
        "agreement": float(same.mean()),
        "agreement_interval": [float(low), float(high)],
        "snr_db": float(10 * np.log10(signal.sum() / max(noise.sum(), 1e-30))),
        "size_bytes": (folder / "model.tflite").stat().st_size,
        "operators": operators(folder),
    }


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-litert-int8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/litert_int8.json")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.folder)
        return
    import torch

    from examples.imagenet_lite0.task import task as lite0_task
    from penjing.measure import Target, compare, machine, versions

    torch.set_num_threads(THREADS)
    rows = {}
    for name in arguments.only:
        folder = arguments.folder / name
        if not (folder / "judged.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--make", name, "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            (folder / "judged.json").write_text(json.dumps(judge(folder)))
        row = rows[name] = json.loads((folder / "judged.json").read_text())
        row |= json.loads((folder / "made.json").read_text())
        low, high = row["agreement_interval"]
        print(
            f"{name:<36} {row['agreement']:.3f} [{low:.3f}, {high:.3f}] {row['snr_db']:6.1f} dB "
            f"{row['size_bytes'] / 1e6:6.2f} MB {row['operators']} {row['seconds']:6.1f} s",
            flush=True,
        )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    image = next(iter(lite0_task().calibration))[:1].numpy()
    targets = [Target(n, arguments.folder / n, [image], 1) for n in rows]
    timings = compare(targets, threads=THREADS, seconds=arguments.seconds, opener="litert_int8:open_folder")
    for name in sorted(rows, key=lambda n: timings[n].latency.median):
        latency = timings[name].latency
        rows[name]["latency_ms"] = vars(latency)
        print(f"  {name:<36}{latency.median:>8.2f} ms  spread {latency.spread:.0%}", flush=True)
    own = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")
    known = versions() | {name: importlib.metadata.version(name) for name in own}
    data = {"machine": vars(machine(THREADS)), "versions": known, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
