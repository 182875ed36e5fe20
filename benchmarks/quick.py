"""The quick way to one INT8 file against NNCF: seconds, agreement, noise, on EfficientNet-Lite0 with 300 images.

Both start from the same fp32 network, as a torch module or as an ONNX file, and end with an OpenVINO file on disk;
each run is a process of its own, interleaved. `seconds` leaves imports and the loading of images out; `process_s` is
the whole process, as a user of the command line waits for it. What NNCF does not do is part of Penjing's time: the
check that the network repeats itself, and parity in the runtime. Quality is that on 496 other images, in OpenVINO in
float32: agreement of the top-1 class with the fp32 network, and the signal-to-noise ratio of the logits. NNCF's
accurate mode is `fast_bias_correction=False` with the mixed preset.

    PYTHONPATH=FOLDER_OF_NNCF python benchmarks/quick.py [--repeats 3] [--sources torch onnx]
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
THREADS = 2
TOOLS = ("penjing", "penjing --fast", "nncf", "nncf accurate")
LIMITS = {"penjing": 1.5, "penjing --fast": 1.0}
"""Times of NNCF's default: what is to be reached."""


def child(tool: str, source: str, folder: Path) -> None:
    """Quantize once; writes model.xml, model.bin and result.json into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    batches = list(lite0_task().calibration)
    network = lite0().eval() if source == "torch" else folder.parent / "fp32.onnx"
    if tool.startswith("penjing"):
        import penjing as pj

        pj.quantize_to  # noqa: B018  what it needs is imported
        start = time.perf_counter()
        done = pj.quantize_to(
            network if source == "torch" else str(network), batches, folder / "model.xml", fast="fast" in tool,
            threads=THREADS, force=True,
        )  # fmt: skip
        stages = done.seconds
    else:
        import nncf
        import openvino

        start = time.perf_counter()
        path = exported(network, folder / "fp32.onnx") if source == "torch" else network
        more = {"fast_bias_correction": False, "preset": nncf.QuantizationPreset.MIXED} if "accurate" in tool else {}
        images = [image[None].numpy() for image in torch.cat(batches)]
        quantized = nncf.quantize(
            openvino.convert_model(str(path)), nncf.Dataset(images), subset_size=len(images), **more
        )
        openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)
        stages = {}
    seconds = time.perf_counter() - start
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "stages_s": stages}))


def exported(network, path: Path) -> Path:
    """The network as an ONNX file, as torch's own exporter writes it."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        network, (torch.zeros(2, 3, 224, 224),), str(path), dynamo=True, dynamic_shapes=({0: batch},),
        input_names=["x"], output_names=["output"], verbose=False, external_data=False,
    )  # fmt: skip
    return path


def quality(path: Path) -> dict:
    """Agreement and signal-to-noise ratio of an OpenVINO file on the held-out images."""
    import numpy as np
    import openvino
    import torch

    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import task as lite0_task

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(THREADS)}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    network, power, noise = lite0().eval(), 0.0, 0.0

    def predict(x):
        nonlocal power, noise
        logits = compiled([x])[0].copy()
        with torch.no_grad():
            reference = network(torch.from_numpy(x)).numpy()
        power += float((reference.astype(np.float64) ** 2).sum())
        noise += float(((logits - reference).astype(np.float64) ** 2).sum())
        return logits

    agreement = lite0_task().evaluate(predict)
    return {"agreement": agreement, "snr_db": 10 * float(np.log10(power / noise))}


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sources", nargs="+", choices=("torch", "onnx"), default=["torch", "onnx"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quick.json")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        tool, source, folder = arguments.child
        child(tool, source, Path(folder))
        return
    from penjing.measure import machine, versions

    runs = {(tool, source): [] for source in arguments.sources for tool in TOOLS}
    with tempfile.TemporaryDirectory() as aside:
        if "onnx" in arguments.sources:
            from examples.imagenet_lite0.network import lite0

            exported(lite0().eval(), Path(aside) / "fp32.onnx")
        for repeat in range(arguments.repeats):
            for tool, source in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
                folder = Path(aside) / f"{tool} {source}"
                folder.mkdir(exist_ok=True)
                start = time.perf_counter()
                command = [sys.executable, __file__, "--child", tool, source, str(folder)]
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"{tool} from {source}: {done.stderr[-2000:]}")
                row = json.loads((folder / "result.json").read_text()) | {"process_s": time.perf_counter() - start}
                runs[tool, source].append(row)
                print(f"{tool} from {source}: {row['seconds']:.1f} s, process {row['process_s']:.1f} s", flush=True)
        judged = {key: quality(Path(aside) / f"{key[0]} {key[1]}" / "model.xml") for key in runs}
    rows = []
    print(f"\n{'tool':<16}{'source':<8}{'seconds':>9}{'spread':>8}{'× nncf':>8}{'process':>9}{'agree':>8}{'SNR dB':>8}")
    for (tool, source), samples in runs.items():
        seconds = [row["seconds"] for row in samples]
        # Of the same round, for what disturbs the machine meets both.
        ratios = [row["seconds"] / base["seconds"] for row, base in zip(samples, runs["nncf", source], strict=True)]
        row = {
            "tool": tool,
            "source": source,
            "seconds": statistics.median(seconds),
            "spread_s": max(seconds) - min(seconds),
            "process_s": statistics.median(row["process_s"] for row in samples),
            "times_nncf": statistics.median(ratios),
            "to_reach": LIMITS.get(tool),
            "stages_s": samples[-1]["stages_s"],
            **judged[tool, source],
        }
        rows.append(row)
        print(
            f"{tool:<16}{source:<8}{row['seconds']:>9.1f}{row['spread_s']:>8.1f}{row['times_nncf']:>8.2f}"
            f"{row['process_s']:>9.1f}{row['agreement']:>8.4f}{row['snr_db']:>8.1f}"
        )
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "repeats": arguments.repeats, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
