"""An engine of TensorRT, built from an ONNX file and run with torch's memory on the GPU; also a part of `load.py`."""

from __future__ import annotations

from typing import Any

import numpy as np


def shapes_of(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Input → its smallest, usual and largest shape, of "x=1x3x8x8:1x3x8x8:64x3x8x8;…"."""
    return {
        name: [tuple(int(n) for n in shape.split("x") if n) for shape in shapes.split(":")]
        for name, _, shapes in (part.partition("=") for part in text.split(";") if part)
    }


class Engine:
    """An engine for the shapes of its profile."""

    def __init__(self, path: str, shapes: str) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(path):
            raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, (least, usual, most) in shapes_of(shapes).items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("TensorRT built no engine")
        self.runtime = trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        tensors = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.types = {name: trt.nptype(self.engine.get_tensor_dtype(name)) for name in tensors}
        self.context = self.engine.create_execution_context()

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        """One call."""
        import torch

        held: list[Any] = []
        for name, x in inputs.items():
            tensor = torch.from_numpy(np.ascontiguousarray(x)).cuda()
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
            held.append(tensor)
        empty = [np.empty(tuple(self.context.get_tensor_shape(n)), self.types[n]) for n in outputs]
        results = [torch.from_numpy(x).cuda() for x in empty]
        for name, tensor in zip(outputs, results):  # noqa: B905  # also in `load.py`, which may run in Python 3.9
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        return [tensor.cpu().numpy() for tensor in results]
