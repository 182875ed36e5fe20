"""The files of ncnn: `.param`, a text with one layer a line, and `.bin`, the weights one behind the other.

A line is ``type name bottoms tops bottom… top… key=value…``; a key is a number whose meaning the layer knows. The
weights lie in the order of the lines, each layer's own in the order in which it loads them. Those that may be of
several types begin with a flag; the others are float32. (ncnn's wiki, "param and model file structure".)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

import numpy as np

MAGIC = "7767517"
FLOAT32, INT8 = 0, 0x000D4B38
"""Flags of weights."""

NO_BATCH = 233
"""The axis of the batch of an array without one."""

OWN = "pnnx/"
"""What the names of layers begin with that are not sites of a network."""

CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
INTEGER = (*CONVOLUTIONS, "InnerProduct")
"""Types of layers with integer kernels whose input has a scale of its own."""
_OTHERS = ("Convolution1D", "ConvolutionDepthWise1D", "Convolution3D", "ConvolutionDepthWise3D", "Gemm")
MULTIPLIES = (*INTEGER, *_OTHERS)
"""Types of layers that a convolution or a linear layer of a network becomes."""

_WEIGHTS = {"InnerProduct": 2}  # the key of the number of weights; 6 in convolutions
INT8_TERM = 8  # the key that says in which form the scales of integers follow the weights


@dataclass(frozen=True)
class Layer:
    """A line of a `.param` file; `params` are its keys with their values as they stand there."""

    type: str
    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    params: tuple[tuple[str, str], ...] = ()

    def get(self, key: int, default: int = 0) -> int:
        """The whole number behind a key."""
        return int(dict(self.params).get(str(key), default))

    def put(self, key: int, value: object) -> Layer:
        """The layer with another value behind a key."""
        return replace(self, params=(*((k, v) for k, v in self.params if k != str(key)), (str(key), str(value))))

    def weights(self) -> int:
        """How many weights a layer of `MULTIPLIES` loads; 0 where they are computed."""
        if self.type == "Gemm":
            return self.get(8) * self.get(9) if self.get(5) == 1 and self.get(4) == 0 else 0
        return self.get(_WEIGHTS.get(self.type, 6))

    @property
    def integer(self) -> bool:
        """Whether it computes in integers: scales of integers follow its weights."""
        return self.type in INTEGER and self.get(INT8_TERM) != 0

    @property
    def site(self) -> str:
        """The site of a network's operator that it computes; empty where that is not known."""
        return "" if self.name.startswith(OWN) else unquote(self.name)

    def called(self, site: str) -> Layer:
        """The layer under the name of a site; without one under its own."""
        return replace(self, name=quote(site, safe="/#@.,:-_") if site else OWN + self.name)


def read_param(text: str) -> list[Layer]:
    """Parse a `.param` file.

    Raises:
        ValueError: It is none, or ends too early.
    """
    lines = text.splitlines()
    if len(lines) < 2 or lines[0].strip() != MAGIC:
        raise ValueError("not a file of ncnn")
    layers = [_read(line.split()) for line in lines[2:] if line.strip()]
    if len(layers) != int(lines[1].split()[0]):
        raise ValueError(f"{len(layers)} layers where {lines[1].split()[0]} are announced")
    return layers


def _read(words: list[str]) -> Layer:
    kind, name, bottoms, tops = words[0], words[1], int(words[2]), int(words[3])
    blobs, params = words[4 : 4 + bottoms + tops], words[4 + bottoms + tops :]
    pairs = tuple((key, value) for key, _, value in (word.partition("=") for word in params))
    return Layer(kind, name, tuple(blobs[:bottoms]), tuple(blobs[bottoms:]), pairs)


def write_param(layers: list[Layer]) -> str:
    """The text of a `.param` file."""
    blobs = sum(len(layer.tops) for layer in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    for layer in layers:
        counts = f"{len(layer.bottoms)} {len(layer.tops)}"
        params = [f"{key}={value}" for key, value in layer.params]
        head = f"{layer.type:<24} {layer.name:<24} {counts}"
        lines.append(" ".join([head, *layer.bottoms, *layer.tops, *params]))
    return "\n".join(lines) + "\n"


def flagged(values: np.ndarray) -> bytes:
    """Weights of a layer that takes several types, as they lie in a `.bin` file: float32 or int8."""
    if values.dtype == np.int8:
        data = values.tobytes()
        return struct.pack("<I", INT8) + data + b"\0" * (-len(data) % 4)
    return struct.pack("<I", FLOAT32) + plain(values)


def plain(values: np.ndarray) -> bytes:
    """Weights of a layer that takes float32 alone, such as biases and scales."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes()
