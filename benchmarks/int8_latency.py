"""Latency of INT8 files of Penjing, NNCF and ONNX Runtime, in the same runtimes, in interleaved rounds.

MobileNetV2 and ResNet-50 (transformers' networks from their configurations, random weights) and EfficientNet-Lite0,
224×224. All files have a dynamic batch; a fixed shape, as OpenVINO recommends for speed, is measured for both tools.
NNCF's default preset, ONNX Runtime's static quantization with its recommended pre-processing, Penjing's `Static`.

    python benchmarks/int8_latency.py [--networks lite0 mobilenet_v2 resnet50] [--batches 1 8] [--seconds 3]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
SAMPLES = 16
OPENVINO = {"INFERENCE_NUM_THREADS": str(THREADS), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


def network(name: str):
    """The network in eval mode."""
    import torch

    torch.manual_seed(0)
    if name == "lite0":
        from examples.imagenet_lite0.network import lite0

        return lite0().eval()
    import transformers

    if name == "mobilenet_v2":
        config = transformers.MobileNetV2Config(num_labels=1000)
        model = transformers.MobileNetV2ForImageClassification(config)
    else:
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    for module in model.modules():  # as after training, so that ranges are not degenerate
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(pixel_values=x).logits

    return Logits().eval()


def build(name: str, folder: Path) -> list[str]:
    """Build every contestant's folder under `folder`; return their names."""
    import ptq_cost
    import torch

    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.quantize import Static
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.tasks.task import Task

    model = network(name)
    torch.manual_seed(1)
    images = torch.randn(SAMPLES, 3, 224, 224)
    task = Task(example=images[:2], calibration=list(images.split(4)))
    sets = measure.machine(THREADS).instruction_sets
    draft = Draft(capture_network(model, *task.call()))
    contestants = []
    for runtime in ("openvino", "onnxruntime"):
        capabilities = runtimes.get(runtime).capabilities(sets)
        for precision in capabilities.precisions:
            quantized = draft
            if precision.startswith("int8"):
                quantized = Static()(draft, Context(task=task, capabilities=capabilities))
            aside = folder / f"penjing {runtime} {precision}"
            aside.mkdir()
            building.build(quantized, runtime, precision, task, {"kind": "tensor"}, aside)
            contestants.append(aside.name)
    for peer in ("nncf", "ort-minmax"):
        aside = folder / peer
        aside.mkdir()
        run = {"nncf": ptq_cost._nncf, "ort-minmax": ptq_cost._onnxruntime}[peer]
        run(ptq_cost._prepare(peer, model, aside), images, aside)
        contestants.append(peer)
    return contestants


def open_folder(folder, threads):
    """What the latency workers call."""
    folder = Path(folder)
    name, _, fixed = folder.name.partition(" fixed ")
    if name.startswith("penjing") and not fixed:
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)
    import openvino

    class Session:
        def __init__(self):
            core = openvino.Core()
            source = folder if not fixed else folder.with_name(name)
            model = core.read_model(str(source / "model.xml"))
            if fixed:
                model.reshape({model.inputs[0]: [int(fixed), 3, 224, 224]})
            hint = "bf16" if "bf16" in name else "f32"
            self.request = core.compile_model(
                model, "CPU", OPENVINO | {"INFERENCE_PRECISION_HINT": hint}
            ).create_infer_request()

        def run(self, inputs):
            return [self.request.infer(inputs, share_inputs=True, share_outputs=True)[0].copy()]

    if name == "ort-minmax":
        import ptq_cost

        return ptq_cost.opened(name, folder, threads)
    return Session()


def main() -> None:
    """Run all, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["lite0", "mobilenet_v2", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/int8_latency.json")
    arguments = parser.parse_args()
    import numpy as np

    from penjing.measure import Target, compare, machine, versions

    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")  # the workers open the files with this module
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "networks": {}}
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as aside:
            contestants = build(name, Path(aside))
            for batch in arguments.batches:
                image = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
                names = [*contestants, *(f"{n} fixed {batch}" for n in contestants if n == "nncf" or " openvino " in n)]
                for extra in names[len(contestants) :]:
                    (Path(aside) / extra).mkdir(exist_ok=True)
                targets = [Target(n, Path(aside) / n, [image], batch) for n in names]
                timings = compare(
                    targets, threads=THREADS, seconds=arguments.seconds, opener="int8_latency:open_folder"
                )
                rows = {n: vars(timings[n].latency) for n in names}
                data["networks"].setdefault(name, {})[str(batch)] = rows
                print(f"\n{name}, batch {batch}")
                for n in sorted(rows, key=lambda n: rows[n]["median"]):
                    print(f"  {n:<40}{rows[n]['median']:>8.2f} ms  spread {rows[n]['spread']:.0%}", flush=True)
    previous = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    data["networks"] = previous["networks"] | data["networks"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
