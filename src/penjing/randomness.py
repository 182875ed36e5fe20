"""Random numbers: the global generators of torch, NumPy and Python are seeded, and put back where they stood."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and `random`."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_of(seed: int, number: int) -> int:
    """Of an epoch of a training, or of a batch of an epoch."""
    return seed * 1_000_003 + number


def rng_state(device: str) -> RngState:
    """Where the global generators of torch, NumPy and `random` stand."""
    cuda = torch.cuda.get_rng_state(device) if torch.device(device).type == "cuda" else None
    state: Any = np.random.get_state()
    # A list instead of an array, which could only be read with NumPy's own code.
    numpy = [state[0], state[1].tolist(), *state[2:]]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


@contextmanager
def preserve_rng_state(device: str | None = None) -> Iterator[None]:
    """The user's global generators stand after the block where they stood before it; None takes CUDA's along."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)


def set_rng_state(state: RngState, device: str) -> None:
    """Put the generators where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
