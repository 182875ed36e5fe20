"""EfficientNet-Lite0 in INT8 in ExecuTorch: ranges of Penjing's against those of XNNPACKQuantizer, in one run.

Both see the same images without labels (300, or --samples); the 496 others are evaluated once, in ExecuTorch. The peer
is `XNNPACKQuantizer` with a scale per channel, prepared and converted by torchao's PT2E as its documentation shows, for
a fixed batch of 1: static, in eval mode, with its own observers (those of smallest and largest values came out worse,
tried on fewer images), batch norms folded into the convolutions before anything is observed (none is left in the
prepared graph). What it loses: it joins ReLU to a convolution, and not ReLU6, which is behind most layers here. Their
grid spans also what ReLU6 cuts off. With ReLU6 joined, which is no setting of it, most of the difference is gone.
Agreement is the share of top-1 predictions equal to those of the fp32 network in torch; noise is logit power over error
power. Latency is measured side by side, at batch 1.

    python benchmarks/executorch_ranges.py [--only NAME ...] [--samples 300] [--folder DIR]

A contestant that is already in --folder is not built again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 1
RECIPES = {
    "penjing fp32": None,
    "penjing int8": [{"quantize.Static": {}}],
    "penjing int8, biases corrected": [{"quantize.Static": {}}, {"quantize.BiasCorrection": {}}],
}
PEER = "XNNPACKQuantizer int8"


def make(name: str, folder: Path, samples: int) -> None:
    """Write the contestant's files and `made.json` with its seconds into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    from dataclasses import replace

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    task, network = lite0_task(), lite0().eval()
    images = torch.cat(list(task.calibration))[:samples]
    start = time.perf_counter()
    if name == PEER:
        (folder / "model.pte").write_bytes(_peer(network, images))
    else:
        from penjing import measure, runtimes
        from penjing.network.capture import capture_network
        from penjing.pipeline import building
        from penjing.recipes.recipe import Recipe
        from penjing.steps.draft import Draft
        from penjing.steps.step import Context

        task = replace(task, calibration=list(images.split(10)))
        raised = capture_network(network, *task.call())
        capabilities = runtimes.get("executorch").capabilities(measure.machine(THREADS).instruction_sets)
        draft, context = Draft(raised), Context(task=task, capabilities=capabilities, source=raised)
        recipe = RECIPES[name]
        for step in Recipe.from_data(recipe) if recipe else ():
            draft = step(draft, context)
        building.build(draft, "executorch", "int8" if recipe else "fp32", task, {"kind": "tensor"}, folder)
    made = {"seconds": time.perf_counter() - start, "size_bytes": (folder / "model.pte").stat().st_size}
    (folder / "made.json").write_text(json.dumps(made))


def _peer(network, images):
    """The bytes of the .pte file that XNNPACKQuantizer, PT2E and the XNNPACK partitioner make of a network."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (images[:1].contiguous(),)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(network, example).module(), quantizer)
        for image in images:
            prepared(image[None])
        program = torch.export.export(convert_pt2e(prepared), example)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def open_folder(folder, threads):
    """Open a session that runs a list of arrays, for the latency workers."""
    folder = Path(folder)
    if folder.name != PEER:
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)
    import numpy as np
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)

    class Session:
        program = Runtime.get().load_program(folder / "model.pte")
        method = program.load_method("forward")

        def run(self, inputs):
            each = [self.method.execute([torch.from_numpy(x[None])])[0].numpy() for x in inputs[0]]
            return [np.concatenate(each)]

    return Session()


def judge(folder: Path) -> dict:
    """Evaluate the 496 images once."""
    import numpy as np
    import torch

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    torch.set_num_threads(THREADS)
    network, session = lite0().eval(), open_folder(folder, THREADS)
    signal, noise, same = [], [], []

    def predict(x):
        outputs = session.run([x])[0]
        with torch.no_grad():
            reference = network(torch.from_numpy(x)).numpy()
        signal.append((reference.astype(np.float64) ** 2).sum(1))
        noise.append(((outputs - reference).astype(np.float64) ** 2).sum(1))
        same.append(outputs.argmax(1) == reference.argmax(1))
        return outputs

    lite0_task().evaluate(predict)
    signal, noise, same = (np.concatenate(x) for x in (signal, noise, same))
    draws = np.random.default_rng(0).integers(0, len(same), (10_000, len(same)))
    low, high = np.percentile(same[draws].mean(1), [2.5, 97.5])
    return {
        "agreement": float(same.mean()),
        "agreement_interval": [float(low), float(high)],
        "snr_db": float(10 * np.log10(signal.sum() / max(noise.sum(), 1e-30))),
    }


def main() -> None:
    """Run all, print the table, write JSON."""
    names = [*RECIPES, PEER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-executorch-ranges")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/executorch_ranges.json")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.folder, arguments.samples)
        return
    if arguments.judge:
        (arguments.folder / "judged.json").write_text(json.dumps(judge(arguments.folder)))
        return
    import torch

    from examples.imagenet_lite0.task import task as lite0_task
    from penjing.measure import Target, compare, machine, versions

    torch.set_num_threads(THREADS)
    rows = {}
    for name in arguments.only:
        folder = arguments.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for step, file in (("--make", "made.json"), ("--judge", "judged.json")):
            if not (folder / file).exists():
                command = [sys.executable, __file__, step, name, "--folder", str(folder)]
                command += ["--samples", str(arguments.samples)]
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
        rows[name] = json.loads((folder / "judged.json").read_text()) | json.loads((folder / "made.json").read_text())
        low, high = rows[name]["agreement_interval"]
        print(
            f"{name:<34} {rows[name]['agreement']:.3f} [{low:.3f}, {high:.3f}] {rows[name]['snr_db']:6.1f} dB "
            f"{rows[name]['size_bytes'] / 1e6:6.2f} MB {rows[name]['seconds']:6.1f} s",
            flush=True,
        )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    image = next(iter(lite0_task().calibration))[:1].numpy()
    targets = [Target(name, arguments.folder / name, [image], 1) for name in rows]
    timings = compare(targets, threads=THREADS, seconds=arguments.seconds, opener="executorch_ranges:open_folder")
    for name in rows:
        latency = timings[name].latency
        rows[name]["latency_ms"] = vars(latency)
        print(f"  {name:<34}{latency.median:>8.2f} ms  spread {latency.spread:.0%}", flush=True)
    from importlib.metadata import version

    known = versions() | {"executorch": version("executorch"), "torchao": version("torchao")}
    data = {"machine": vars(machine(THREADS)), "versions": known, "samples": arguments.samples, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
