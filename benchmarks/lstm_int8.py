"""A recurrent network in INT8: accuracy, size and latency, compared with ONNX Runtime's own tool.

Two bidirectional LSTM layers that read Fashion-MNIST images row by row, trained here for two epochs. Penjing's
`Dynamic` and `onnxruntime.quantization.quantize_dynamic` (per channel, after its pre-processing) from the same network,
both in ONNX Runtime, without calibration data. Latency in interleaved rounds at batch 1 and 16.

    python benchmarks/lstm_int8.py [--width 256] [--epochs 2] [--seconds 3]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2


def network(width: int):
    """Images (N, 1, 28, 28) to logits (N, 10)."""
    import torch

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(28, width, num_layers=2, bidirectional=True, batch_first=True)
            self.classifier = torch.nn.Linear(2 * width, 10)

        def forward(self, x):
            return self.classifier(self.lstm(x.flatten(1, 2))[0].mean(1))

    return Reader()


def trained(width: int, epochs: int, task):
    """Train the network for a number of epochs."""
    import torch

    torch.manual_seed(0)
    model = network(width)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(task.train))
    for _ in range(epochs):
        for x, y in task.train:
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def build(model, task, folder: Path) -> list[str]:
    """Build every contestant's folder; return their names."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.quantize import Dynamic
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    capabilities = runtimes.get("onnxruntime").capabilities(measure.machine(THREADS).instruction_sets)
    draft = Draft(capture_network(model, *task.call()))
    quantized = Dynamic()(draft, Context(task=task, capabilities=capabilities))
    for name, contestant in (("penjing fp32", draft), ("penjing int8", quantized)):
        (folder / name).mkdir()
        building.build(contestant, "onnxruntime", name.split()[1], task, {"kind": "tensor"}, folder / name)
    aside = folder / "ort dynamic int8"
    aside.mkdir()
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        model, (task.example,), str(folder / "fp32.onnx"), dynamo=True, verbose=False, external_data=False,
        dynamic_shapes=({0: batch},), input_names=["x"],
    )  # fmt: skip
    quant_pre_process(str(folder / "fp32.onnx"), str(folder / "ready.onnx"), skip_symbolic_shape=True)
    quantize_dynamic(
        str(folder / "ready.onnx"), str(aside / "model.onnx"), per_channel=True, weight_type=QuantType.QInt8
    )
    return ["penjing fp32", "penjing int8", "ort dynamic int8"]


def open_folder(folder, threads):
    """What the latency workers call."""
    folder = Path(folder)
    if folder.name.startswith("penjing"):
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    class Session:
        def run(self, inputs):
            return session.run(None, {session.get_inputs()[0].name: inputs[0]})

    return Session()


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/lstm_int8.json")
    arguments = parser.parse_args()
    import numpy as np
    import torch

    from examples.fashion_mnist.task import task as fashion
    from penjing.measure import Target, compare, machine, packed_bytes, versions

    torch.set_num_threads(THREADS)
    task = fashion()
    start = time.perf_counter()
    model = trained(arguments.width, arguments.epochs, task)
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as aside:
        names = build(model, task, Path(aside))
        for name in names:
            session = open_folder(Path(aside) / name, THREADS)
            signal, noise = [], []

            def seen(x, session=session, signal=signal, noise=noise):
                outputs = session.run([x])[0]
                with torch.no_grad():
                    exact = model(torch.from_numpy(x)).numpy().astype(np.float64)
                signal.append((exact**2).sum())
                noise.append(((outputs - exact) ** 2).sum())
                return outputs

            files = [p for p in (Path(aside) / name).iterdir() if p.suffix in (".onnx", ".data")]
            rows[name] = {
                "metric": task.evaluate(seen),
                "snr_db": float(10 * np.log10(sum(signal) / sum(noise))),
                "size_bytes": sum(p.stat().st_size for p in files),
                "packed_bytes": packed_bytes(files),
            }
        for batch in (1, 16):
            inputs = [task.calibration[0][:batch].numpy()]
            targets = [Target(name, Path(aside) / name, inputs, batch) for name in names]
            timings = compare(targets, threads=THREADS, seconds=arguments.seconds, opener="lstm_int8:open_folder")
            for name in names:
                rows[name].setdefault("latency_ms", {})[str(batch)] = vars(timings[name].latency)
    print(f"{'':<20}{'accuracy':>9}{'SNR dB':>8}{'kB':>8}{'batch 1':>10}{'batch 16':>10}")
    for name, row in rows.items():
        one, many = (row["latency_ms"][b]["median"] for b in ("1", "16"))
        figures = f"{row['metric']:>9.4f}{row['snr_db']:>8.1f}{row['size_bytes'] / 1e3:>8.0f}"
        print(f"{name:<20}{figures}{one:>7.2f} ms{many:>7.2f} ms")
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "width": arguments.width, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
