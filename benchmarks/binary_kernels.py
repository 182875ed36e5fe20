"""Latency of the generated kernels: binary 3×3 convolutions, and products of packed weights at batch 1.

Binary convolutions are compared with torch's fp32 (oneDNN, the faster of both memory formats), ONNX Runtime's fp32 and
ONNX Runtime's INT8 (QLinearConv, 8-bit inputs and outputs), all on the same shapes and threads. "binary" takes packed
inputs and writes float32, as a layer that follows another binary layer would; "binary with packing" takes float32.

Packed products, y = W·x in groups of 128, are compared with torch's fp32 (the faster of `mv` and `linear`) and ONNX
Runtime's MatMulNBits. All sides of a row run in turn; the median, and the quartiles' distance divided by it, are of the
calls.

    python benchmarks/binary_kernels.py [--parts conv] [--seconds 2] [--threads 1 2]
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "binary_kernels.json"
SIZES = (1024, 4096, 8192)  # of square products: 4 MB, 64 MB and 256 MB in fp32
BLOCK, REST = 12, 0.02
CONVOLUTIONS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side: the stages of ResNet-18


def timed(sides, seconds):
    """Run all sides in turn, a block of calls at a time; return {side: {median, spread, calls}} in ms.

    Before a block all threads rest: those of another side's pool may still spin, and would take a core from it.
    """
    for run in sides.values():
        for _ in range(5):
            run()
    times = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end:
        for name, run in sides.items():
            time.sleep(REST)
            for call in range(BLOCK + 2):
                start = time.perf_counter()
                run()
                if call >= 2:  # the first ones find cold caches and sleeping threads
                    times[name].append((time.perf_counter() - start) * 1e3)
    gc.enable()
    rows = {}
    for name, each in times.items():
        low, middle, high = statistics.quantiles(each, n=4)
        rows[name] = {"median_ms": middle, "spread": (high - low) / middle, "calls": len(each)}
    return rows


def session(model, threads):
    """An ONNX Runtime session of a model of one input and one output, as a call on bound memory."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bound(x):
        binding = opened.io_binding()
        binding.bind_cpu_input("x", x)
        binding.bind_output("y", "cpu")
        return lambda: opened.run_with_iobinding(binding)

    return bound


def convolution_models(weights, side):
    """fp32 and INT8 models of one convolution, NCHW."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    filters, channels = weights.shape[:2]

    def model(nodes, kind, constants):
        shape_in, shape_out = (1, channels, side, side), (1, filters, side, side)
        graph = helper.make_graph(
            nodes, "conv", [helper.make_tensor_value_info("x", kind, shape_in)],
            [helper.make_tensor_value_info("y", kind, shape_out)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(made)
        return made

    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    fp32 = model([helper.make_node("Conv", ["x", "w"], ["y"], **window)], TensorProto.FLOAT, {"w": weights})
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    constants = {
        "x_scale": np.float32(0.02), "x_zero": np.uint8(128), "w_scale": np.full(filters, 0.01, np.float32),
        "w_zero": np.zeros(filters, np.int8), "y_scale": np.float32(0.1), "y_zero": np.uint8(128),
        "w": np.clip(np.round(weights * 40), -127, 127).astype(np.int8),
    }  # fmt: skip
    constants = {name: np.asarray(value) for name, value in constants.items()}
    int8 = model([helper.make_node("QLinearConv", names, ["y"], **window)], TensorProto.UINT8, constants)
    return fp32, int8


def convolutions(threads, seconds):
    """One row for every convolution."""
    import numpy as np
    import torch

    from penjing.kernels.binary import BinaryConvolution, Convolution

    torch.set_num_threads(threads)
    rows = []
    for channels, side in CONVOLUTIONS:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32)
        x = rng.standard_normal((1, side, side, channels)).astype(np.float32)
        shape = Convolution(height=side, width=side, channels=channels, filters=channels, pad=(1, 1))
        layer = BinaryConvolution(shape, weights.transpose(0, 2, 3, 1))
        layer.pack(x)
        fp32, int8 = (session(model, threads) for model in convolution_models(weights, side))
        wide = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        eager = {}
        for form in (torch.contiguous_format, torch.channels_last):
            conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval().to(memory_format=form)
            eager[form] = (conv, torch.from_numpy(wide).to(memory_format=form))

        def torch_side(form, eager=eager):
            conv, image = eager[form]

            def run():
                with torch.inference_mode():
                    conv(image)

            return run

        sides = {
            "binary": lambda layer=layer: layer.convolve(threads),
            "binary with packing": lambda layer=layer, x=x: layer(x, threads),
            "torch fp32": torch_side(torch.contiguous_format),
            "torch fp32 channels-last": torch_side(torch.channels_last),
            "onnxruntime fp32": fp32(wide),
            "onnxruntime int8": int8(np.clip(wide * 50 + 128, 0, 255).astype(np.uint8)),
        }
        rows.append({"channels": channels, "side": side, "threads": threads, "sides": timed(sides, seconds)})
        told = {name: round(side["median_ms"], 4) for name, side in rows[-1]["sides"].items()}
        print(channels, side, threads, told, flush=True)
    return rows


def nbits_model(q, scales, shape, level):
    """ONNX Runtime's own product of 4-bit weights, in blocks of the same groups."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nibbles = q.reshape(shape.outputs, -1, shape.group // 2, 2)
    blob = (nibbles[..., 0] | nibbles[..., 1] << 4).astype("uint8")
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=shape.inputs, N=shape.outputs, bits=4,
        block_size=shape.group, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, shape.inputs))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, shape.outputs))],
        [numpy_helper.from_array(blob, "w"), numpy_helper.from_array(scales.reshape(-1), "s")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)


def products(threads, seconds):
    """One row for every size of a square product."""
    import numpy as np
    import torch

    from penjing.kernels.packed_weights import PackedProduct, Product, rounded

    torch.set_num_threads(threads)
    rows = []
    for size in SIZES:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((size, size), dtype=np.float32)
        x = rng.standard_normal(size, dtype=np.float32)
        sides, agreement = {}, {}
        exact = weights @ x
        for bits in (4, 2):
            shape = Product(outputs=size, inputs=size, bits=bits)
            q, scales = rounded(weights, bits, shape.group)
            product = PackedProduct(shape, q, scales)
            sides[f"{bits} bits"] = lambda product=product, x=x: product(x, threads)
            error = product(x, threads) - exact
            agreement[f"{bits} bits"] = float(10 * np.log10((exact**2).sum() / (error**2).sum()))
            if bits == 4:
                for level, name in ((1, "onnxruntime 4 bits, fp32"), (4, "onnxruntime 4 bits, int8 inputs")):
                    sides[name] = session(nbits_model(q, scales, shape, level), threads)(x[None])
        tensor, vector = torch.from_numpy(weights), torch.from_numpy(x)
        sides["torch fp32 mv"] = lambda a=tensor, b=vector: torch.mv(a, b)
        sides["torch fp32 linear"] = lambda a=tensor, b=vector[None]: torch.nn.functional.linear(b, a)
        row = {"size": size, "threads": threads, "sides": timed(sides, seconds), "snr_db": agreement}
        rows.append(row)
        print(size, threads, {name: round(side["median_ms"], 3) for name, side in row["sides"].items()}, flush=True)
    return rows


PARTS = {"conv": convolutions, "product": products}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from penjing import measure
    from penjing.kernels.instruction_sets import here

    written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for part in options.parts:
        rows = [row for threads in options.threads for row in PARTS[part](threads, options.seconds)]
        written[part] = {"rows": rows, "instructions": here().name}
        machine = measure.machine(max(options.threads))
        written["machine"] = {"processor": machine.processor}
        written["versions"] = versions()
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")


def versions():
    """Of what was compared."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "apache-tvm", "numpy")}


if __name__ == "__main__":
    main()
