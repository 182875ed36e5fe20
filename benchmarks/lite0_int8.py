"""EfficientNet-Lite0 in INT8 without labels: agreement, noise and latency by method.

Every method sees only 300 images (and holds out some of them for its trials); the 496 others are evaluated once, at the
end, in the runtime. Agreement is the share of equal top-1 predictions, with a 95 % bootstrap interval over 10,000
resamples of the images; noise is logit power over error power. Peers: ONNX Runtime's static quantization, NNCF with its
default and with its accurate bias correction. Latency is measured side by side; OpenVINO files have a fixed shape, as
its documentation recommends, for both tools.

    python benchmarks/lite0_int8.py [--only NAME ...] [--batches 1 8] [--folder DIR]

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
THREADS = 2
GOAL = 0.93
STATIC = "quantize.Static"
RECIPES = {
    "Static": [{STATIC: {}}],
    "Static + BiasCorrection": [{STATIC: {}}, {"quantize.BiasCorrection": {}}],
    "Static + AdaRound": [{STATIC: {}}, {"quantize.CoordinateRounding": {}}],
    "Static + AdaRound with float additions": [{STATIC: {"exclude": ["*/add#*"]}}, {"quantize.CoordinateRounding": {}}],
    "Best": [{"quantize.Best": {}}],
    "Static + Rollback": [{STATIC: {"exclude": ["*/add#*"]}}, {"quantize.Rollback": {"agreement": 0.96, "snr_db": 27}}],
}
CONTESTANTS = {
    **{f"penjing openvino {name}": ("openvino", name) for name in RECIPES},
    **{f"penjing onnxruntime {name}": ("onnxruntime", name) for name in ("Static + AdaRound", "Best")},
    "penjing openvino bf16": ("openvino", "bf16"),
    "penjing onnxruntime fp32": ("onnxruntime", "fp32"),
    "nncf": ("nncf", "fast"),
    "nncf accurate bias correction": ("nncf", "accurate"),
    "ort-minmax": ("ort", "MinMax"),
}


def make(name: str, folder: Path) -> None:
    """Write the contestant's files and `made.json` with its seconds into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    task, network = lite0_task(), lite0().eval()
    kind, how = CONTESTANTS[name]
    log = []
    start = time.perf_counter()
    if kind in ("nncf", "ort"):
        import ptq_cost

        images = torch.cat(list(task.calibration))
        prepared = ptq_cost._prepare("nncf" if kind == "nncf" else "ort-minmax", network, folder)
        if kind == "ort":
            ptq_cost._onnxruntime(prepared, images, folder, how)
        else:
            import nncf
            import openvino

            advanced = nncf.AdvancedQuantizationParameters()
            data = nncf.Dataset([p[None].numpy() for p in images])
            quantized = nncf.quantize(
                prepared, data, subset_size=len(images), fast_bias_correction=how == "fast",
                advanced_parameters=advanced,
            )  # fmt: skip
            openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)
    else:
        from penjing import measure, runtimes
        from penjing.network.capture import capture_network
        from penjing.pipeline import building
        from penjing.recipes.recipe import Recipe
        from penjing.steps.draft import Draft
        from penjing.steps.step import Context

        def events(kind, **values):
            if kind != "progress":
                log.append({"event": kind, **values})

        capabilities = runtimes.get(kind).capabilities(measure.machine(THREADS).instruction_sets)
        raised = capture_network(network, *task.call())
        draft = Draft(raised)
        context = Context(task=task, capabilities=capabilities, source=raised, events=events)
        for step in Recipe.from_data(RECIPES.get(how, [])):
            draft = step(draft, context)
        building.build(draft, kind, "int8" if how in RECIPES else how, task, {"kind": "tensor"}, folder)
    seconds = time.perf_counter() - start
    (folder / "made.json").write_text(json.dumps({"seconds": seconds, "log": log}, default=str))


def open_folder(folder, threads):
    """Open a session that runs a list of arrays, for the latency workers."""
    folder = Path(folder)
    kind, _ = CONTESTANTS[folder.name]
    if kind in ("openvino", "onnxruntime"):
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)
    if kind == "ort":
        import ptq_cost

        return ptq_cost.opened("ort-minmax", folder, threads)
    import openvino

    class Session:
        def __init__(self):
            self.requests = {}

        def run(self, inputs):
            shape = inputs[0].shape
            if shape not in self.requests:
                core = openvino.Core()
                model = core.read_model(str(folder / "model.xml"))
                model.reshape({model.inputs[0]: list(shape)})
                settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads),
                            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}  # fmt: skip
                self.requests[shape] = core.compile_model(model, "CPU", settings).create_infer_request()
            return [self.requests[shape].infer(inputs, share_inputs=True, share_outputs=True)[0].copy()]

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
    noises = 10 * np.log10(signal[draws].sum(1) / noise[draws].sum(1)) if noise.sum() else [np.inf]
    return {
        "agreement": float(same.mean()),
        "agreement_interval": [float(low), float(high)],
        "snr_db": float(10 * np.log10(signal.sum() / max(noise.sum(), 1e-30))),
        "snr_interval": [float(v) for v in np.percentile(noises, [2.5, 97.5])],
    }


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-lite0-int8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/lite0_int8.json")
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
        rows[name] = json.loads((folder / "judged.json").read_text())
        rows[name] |= json.loads((folder / "made.json").read_text())
        low, high = rows[name]["agreement_interval"]
        print(
            f"{name:<52} {rows[name]['agreement']:.3f} [{low:.3f}, {high:.3f}] {rows[name]['snr_db']:6.1f} dB "
            f"{rows[name]['seconds']:6.1f} s",
            flush=True,
        )
    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
    image = torch.cat(list(lite0_task().calibration))
    for batch in arguments.batches:
        targets = [Target(n, arguments.folder / n, [image[:batch].numpy()], batch) for n in rows]
        timings = compare(targets, threads=THREADS, seconds=arguments.seconds, opener="lite0_int8:open_folder")
        print(f"\nbatch {batch}")
        for name in sorted(rows, key=lambda n: timings[n].latency.median):
            latency = timings[name].latency
            rows[name].setdefault("latency_ms", {})[str(batch)] = vars(latency)
            enough = "" if rows[name]["agreement"] >= GOAL else f"   agreement below {GOAL}"
            print(f"  {name:<52}{latency.median:>8.2f} ms  spread {latency.spread:.0%}{enough}", flush=True)
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "goal": GOAL, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
