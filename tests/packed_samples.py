"""Tensors that packed files are tested with."""

import numpy as np
import torch
from safetensors.torch import save_file

RANDOM = np.random.default_rng(0)


def laplace(shape, scale):
    return np.clip(np.round(RANDOM.laplace(0, scale, shape)), -127, 127)


def every_type(folder):
    """A safetensors file with a tensor of every kind."""
    pruned = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    pruned[torch.rand(64, 100, generator=torch.Generator().manual_seed(1)) < 0.8] = 0
    tensors = {
        "int8": torch.tensor(laplace((32, 9, 3), 20), dtype=torch.int8),
        "uint8": torch.tensor(laplace((40, 30), 20) + 128, dtype=torch.uint8),
        "float32": torch.randn(50, 30),
        "float16": torch.randn(50, 31).half(),
        "bfloat16": torch.randn(51, 30).bfloat16(),
        "pruned": pruned,
        "codebook": torch.randn(16)[torch.randint(16, (80, 40))],
        "infinite": torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40]),
        "rounded": torch.randint(-9, 9, (40, 50)) * torch.randn(40, 1),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "int64": torch.arange(5),
        "int16": torch.tensor(laplace((40, 50), 20) * 100, dtype=torch.int16),
        "int32": torch.arange(-900, 900, dtype=torch.int32),
        "bool": torch.rand(40, 40) < 0.1,
        "float8_e4m3": (torch.randn(60, 40) * 0.1).to(torch.float8_e4m3fn),
        "float8_e5m2": (torch.randn(60, 40) * 0.1).to(torch.float8_e5m2),
        "float64": torch.randn(40, 30).double() * 1.1,
        "double": torch.randn(40, 30).double(),
        "index": torch.randint(-3, 3, (40, 30)),
    }
    save_file(tensors, folder / "weights.safetensors")
    return tensors
