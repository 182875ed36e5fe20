"""Mixed precision against uniform bit widths: noise, metric, size and latency.

ResNet-20 (Fashion-MNIST) and EfficientNet-Lite0, in two parts. Noise and metric are measured on held-out data.

`bits`: both sides are rounded by `CoordinateRounding` on the same calibration data and run in ONNX Runtime, where
weights of fewer bits are stored in 8 without further error; size is that of the packed file.

`latency`: in OpenVINO, with budgets between the latencies of the all-integer and the all-bfloat16 network; the step
chooses whether the rest is computed in fp32 or in bfloat16. All files, and NNCF's INT8, are measured again in
interleaved rounds at the end, and compared with the budgets; budgets and latencies are relative to the integer latency
of the same round, since the speed of a machine varies.

    python benchmarks/mixed_precision.py [--networks resnet20 lite0] [--parts bits latency] [--bits 8 6 5 4 3]
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
CHOICES = (8, 6, 5, 4, 3, 2)
INTEGER = "int8"
SHARES = (0.25, 0.5, 0.75)  # fractions of the way from the integer latency to that of bfloat16


def source(name: str):
    """Network and task."""
    if name == "lite0":
        from examples.imagenet_lite0.network import lite0
        from examples.imagenet_lite0.task import task

        return lite0().eval(), task()
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task

    return resnet20(), task()


def judged(folder: Path, task, network) -> dict:
    """Evaluate an artifact in its runtime."""
    import numpy as np
    import torch

    if folder.name == "nncf":
        session = open_folder(folder, THREADS)

        def predict(x):
            return session.run([x])[0]
    else:
        from penjing import runtimes
        from penjing.records.manifest import read_manifest
        from penjing.runtimes.artifact import predictor

        predict = predictor(runtimes.open_artifact(folder, THREADS), read_manifest(folder))
    signal, noise = [], []

    def seen(x):
        outputs = predict(x)
        with torch.no_grad():
            reference = network(torch.from_numpy(x)).numpy().astype(np.float64)
        signal.append((reference**2).sum())
        noise.append(((outputs - reference) ** 2).sum())
        return outputs

    metric = task.evaluate(seen)
    return {"metric": metric, "snr_db": float(10 * np.log10(sum(signal) / max(sum(noise), 1e-30)))}


def open_folder(folder, threads):
    """What the latency workers call."""
    if Path(folder).name == "nncf":
        import int8_latency

        return int8_latency.open_folder(folder, threads)
    from penjing.runtimes import open_artifact

    return open_artifact(folder, threads)


def by_bits(raised, network, task, bit_widths) -> list[dict]:
    """Uniform and mixed bits in weights."""
    from penjing import measure, runtimes
    from penjing.pipeline import building
    from penjing.quantize import CoordinateRounding, MixedPrecision, Static
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.storage.packed import packed_bytes

    capabilities = runtimes.get("onnxruntime").capabilities(measure.machine(THREADS).instruction_sets)
    context = Context(task=task, capabilities=capabilities, source=raised)
    rows = []
    print(f"{'':<10}{'bits':>6}{'metric':>9}{'SNR dB':>8}{'packed kB':>11}")
    for bits in bit_widths:
        kinds = {"uniform": (Static(weight_bits=bits), CoordinateRounding())}
        if bits < 8:
            kinds["mixed"] = (MixedPrecision(average_bits=bits, weight_bits=CHOICES),)
        for kind, steps in kinds.items():
            start = time.perf_counter()
            draft = Draft(raised)
            for step in steps:
                draft = step(draft, context)
            weights = {e: v for e, v in draft.plan.entries.items() if e.endswith(":weight")}
            sizes = {e: draft.network.get_submodule(e.removesuffix(":weight")).weight.numel() for e in weights}
            row = {
                "kind": kind,
                "bits": sum(v.spec.bits * sizes[e] for e, v in weights.items()) / sum(sizes.values()),
                "seconds": time.perf_counter() - start,
            }
            with tempfile.TemporaryDirectory() as aside:
                folder = Path(aside)
                manifest = building.build(draft, "onnxruntime", "int8", task, {"kind": "tensor"}, folder)
                row |= judged(folder, task, network)
                row["packed_bytes"] = packed_bytes(folder, manifest.files())
            rows.append(row)
            line = f"{kind:<10}{row['bits']:>6.2f}{row['metric']:>9.4f}{row['snr_db']:>8.1f}"
            print(f"{line}{row['packed_bytes'] / 1e3:>11.0f}", flush=True)
    return rows


def by_latency(raised, network, task, seconds: float) -> list[dict]:
    """Uniform formats, and mixed ones with budgets between them."""
    import torch

    from penjing import measure, runtimes
    from penjing.pipeline import building
    from penjing.pipeline.trial import Trial
    from penjing.quantize import CoordinateRounding, MixedPrecision, Static
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    capabilities = runtimes.get("openvino").capabilities(measure.machine(THREADS).instruction_sets)
    images = torch.cat([x if isinstance(x, torch.Tensor) else x[0] for x in task.calibration])
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        variants: dict[str, dict] = {}

        def build(name, draft, precision, **values):
            (folder / name).mkdir()
            building.build(draft, "openvino", precision, task, {"kind": "tensor"}, folder / name)
            variants[name] = values

        draft = Draft(raised)
        build("fp32", draft, "fp32")
        trial = Trial(
            runtime="openvino", source=raised, stored=folder / "fp32", task=task, threads=THREADS, batch=1,
            seconds=seconds,
        )  # fmt: skip
        context = Context(
            task=task, capabilities=capabilities, source=raised, latency=trial.latency, profile=trial.profile
        )
        integer = CoordinateRounding()(Static()(draft, context), context)
        build(INTEGER, integer, "int8")
        build("bf16", draft, "bf16")
        peer(network, images, folder / "nncf")
        variants["nncf"] = {}
        ends = timed(folder, (INTEGER, "bf16"), task, seconds)
        fast, slow = sorted((1.0, measure.ratio(ends["bf16"], ends[INTEGER])))
        for share in SHARES:
            budget = fast + share * (slow - fast)
            start = time.perf_counter()
            mixed = MixedPrecision(latency_ratio=budget)(draft, context)
            back = sum(reason == "mixed precision" for reason in mixed.plan.floats.values())
            name = f"mixed, {share:.0%}"
            values = {"budget": budget, "seconds": time.perf_counter() - start}
            build(name, mixed, mixed.plan.precision, floats=back, rest=mixed.plan.precision, **values)
        timings = timed(folder, variants, task, seconds)
        rows = []
        print(f"{'':<20}{'budget':>9}{'latency':>9}{'ms':>8}{'metric':>9}{'SNR dB':>8}{'floats':>8}  precision")
        for name, values in variants.items():
            latency = timings[name].latency
            row = {"name": name, **values, "latency": measure.ratio(timings[name], timings[INTEGER])}
            row["latency_ms"] = vars(latency)
            row |= judged(folder / name, task, network)
            rows.append(row)
            budget = f"{row['budget']:.3f}" if "budget" in row else ""
            print(
                f"{name:<20}{budget:>9}{row['latency']:>9.3f}{latency.median:>8.3f}{row['metric']:>9.4f}"
                f"{row['snr_db']:>8.1f}{row.get('floats', ''):>8}  {row.get('rest', '')}",
                flush=True,
            )
    return rows


def timed(folder: Path, names, task, seconds: float) -> dict:
    """Latencies at batch 1 in interleaved rounds."""
    from penjing import measure

    inputs = [task.call()[0][0][:1].numpy()]
    targets = [measure.Target(name, folder / name, inputs, 1) for name in names]
    return measure.compare(targets, threads=THREADS, seconds=seconds, rounds=15, opener="mixed_precision:open_folder")


def peer(network, images, folder: Path) -> None:
    """NNCF's file with its default preset."""
    import nncf
    import openvino
    import torch

    folder.mkdir()
    path = folder / "fp32.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        network.eval(), (images[:2],), str(path), dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"],
        output_names=["output"], verbose=False, external_data=False,
    )  # fmt: skip
    data = nncf.Dataset([p[None].numpy() for p in images])
    quantized = nncf.quantize(openvino.convert_model(str(path)), data, subset_size=min(300, len(images)))
    openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "lite0"])
    parser.add_argument("--parts", nargs="+", default=["bits", "latency"], choices=["bits", "latency"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mixed_precision.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure
    from penjing.network.capture import capture_network

    torch.set_num_threads(THREADS)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    where = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions()}
    where["versions"]["nncf"] = importlib.metadata.version("nncf")
    data = {"networks": {}}
    if arguments.out.exists():
        data["networks"] = json.loads(arguments.out.read_text())["networks"]
    for name in arguments.networks:
        network, task = source(name)
        raised = capture_network(network, *task.call())
        entry = data["networks"].setdefault(name, {})
        for part in arguments.parts:
            print(f"\n{name}, {part}")
            if part == "bits":
                entry[part] = by_bits(raised, network, task, arguments.bits)
            else:
                entry[part] = by_latency(raised, network, task, arguments.seconds)
            entry[f"{part} measured on"] = where
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
