"""What this machine computes and moves, measured within a fifth of a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from penjing.analyze.roofline import BYTES
from penjing.records import Balance

OPERATOR_S = 1e-6  # to start an operator: `benchmarks/diagnosis.py` measures a little more in ONNX Runtime and OpenVINO
SMALLEST, LARGEST = 2**18, 2**26  # bytes of buffers
SPELL_S, LEAST = 0.03, 3  # of measuring one figure, and calls at least

_RATES: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("int8", 32.0, ("amx_int8",)),  # 1024 multiply-accumulates a cycle and core against 32 of float32
    ("int8", 8.0, ("i8mm", "sme")),
    ("int8", 4.0, ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "dotprod")),
    ("bf16", 16.0, ("amx_bf16",)),
    ("bf16", 4.0, ("bf16",)),
    ("bf16", 2.0, ("avx512_bf16",)),
    ("fp16", 2.0, ("fp16", "avx512_fp16")),
)
"""Precision, how many times as many products as in float32, and the instruction sets that do it; best first."""
PLAIN = {"fp32": 1.0, "fp16": 1.0, "bf16": 1.0, "int8": 2.0}
"""Without any of them: 8-bit products are summed in pairs."""


def rates(instruction_sets: Collection[str]) -> dict[str, float]:
    """Precision → how many times as many multiply-accumulates as in float32 a processor reaches at most.

    >>> rates(("avx2", "avx512f", "avx512_vnni", "avx512_bf16"))
    {'fp32': 1.0, 'fp16': 1.0, 'bf16': 2.0, 'int8': 4.0}
    """
    best = dict(PLAIN)
    for precision, rate, names in reversed(_RATES):
        if set(names) & set(instruction_sets):
            best[precision] = rate
    return best


def balance(weight_bytes: int, instruction_sets: Collection[str], threads: int) -> Balance:
    """What the machine computes and moves for a network of that size.

    One thread is measured, so that other programs disturb little, and multiplied: with several, memory is shared, and
    the figures are what is reached at most.

    Args:
        weight_bytes: Of the network's parameters in float32.
        instruction_sets: Of the processor.
        threads: Of the run.
    """
    weights = {name: _bytes_per_s(_rounded(weight_bytes * size // 4)) for name, size in BYTES.items()}
    return Balance(
        macs_per_s=threads * _macs_per_s(),
        rates=rates(instruction_sets),
        values_per_s=threads * _bytes_per_s(2**20),
        weights_per_s={name: threads * rate for name, rate in weights.items()},
        operator_s=OPERATOR_S,
        threads=threads,
    )


def _rounded(size: int) -> int:
    """A power of two, so that few buffers are measured."""
    return min(LARGEST, max(SMALLEST, 1 << max(0, size - 1).bit_length()))


@functools.cache
def _macs_per_s() -> float:
    """Of a 3×3 convolution with 64 channels at 28×28, on one thread."""
    weight = torch.full((64, 64, 3, 3), 0.01).contiguous(memory_format=torch.channels_last)
    x = torch.ones(1, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), _single_threaded():
        return weight.numel() * 28 * 28 / _least(lambda: torch.nn.functional.conv2d(x, weight, padding=1))


@functools.cache
def _bytes_per_s(size: int) -> float:
    """Of reading a buffer of so many bytes again and again, on one thread."""
    values = torch.ones(size // 4)
    with _single_threaded():
        return size / _least(values.sum)


def _least(call: Callable[[], object]) -> float:
    """Seconds of the fastest call: what the others take more, other programs took."""
    call()
    end = time.perf_counter() + SPELL_S
    times: list[float] = []
    while len(times) < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def _single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
