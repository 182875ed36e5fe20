"""Where the tensors of a network lie within its files, so that they can be coded as what they are.

What is not told here is coded as bytes, so a file that is read wrongly loses size and never content.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penjing.records import reading

Bytes = npt.NDArray[np.uint8]

BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "f32": 32, "f16": 16, "bf16": 16}
"""Number types that are coded as numbers → bits of a value; two values of 4 bits share a byte, the lower half first."""
_SAFETENSORS = {"I8": "i8", "U8": "u8", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_ONNX = {1: "f32", 2: "u8", 3: "i8", 10: "f16", 16: "bf16", 21: "u4", 22: "i4"}
_CONSTANT = re.compile(rb"<data [^>]*>")
_ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Region:
    """A tensor within a file.

    Attributes:
        name: As the file calls it.
        offset: In bytes, from the beginning of the file.
        dtype: A key of `BITS`.
        shape: Its sizes.
    """

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1

    @property
    def size(self) -> int:
        """In bytes."""
        return -(-self.count * BITS[self.dtype] // 8)


def regions(path: Path, content: Bytes) -> list[Region]:
    """Return the tensors of a file in the order of their places; none of a file of another kind.

    Args:
        path: Its name tells the kind: ``.safetensors``, ``.onnx``, ``.bin`` (with OpenVINO's ``.xml`` beside it).
        content: Its bytes.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        return []
    try:
        listed = reader(path, content)
    except Exception:  # whatever a library raises for a damaged file, or without that library: it is coded as bytes
        return []
    apart: list[Region] = []
    end = 0
    for region in sorted(listed, key=lambda r: r.offset):
        if region.count and region.offset >= end and region.offset + region.size <= len(content):
            apart.append(region)
            end = region.offset + region.size
    return apart


def _safetensors(path: Path, content: Bytes) -> list[Region]:
    header = reading.safetensors_header(path)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    return [
        Region(name, start + entry["data_offsets"][0], _SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
        if entry["dtype"] in _SAFETENSORS
    ]


def _onnx(path: Path, content: Bytes) -> list[Region]:
    import onnx

    whole = content.tobytes()
    listed, end = [], 0
    for tensor in onnx.load_from_string(whole).graph.initializer:
        raw = tensor.raw_data
        # Any place with these bytes will do, and they lie in this order.
        place = whole.find(raw, end) if len(raw) and tensor.data_type in _ONNX else -1
        if place >= 0:
            listed.append(Region(tensor.name, place, _ONNX[tensor.data_type], tuple(tensor.dims)))
            end = place + len(raw)
    return [region for region in listed if region.size]


def _openvino(path: Path, content: Bytes) -> list[Region]:
    text = reading.data(path.with_suffix(".xml"), reading.TEXT_BYTES)
    listed = {}
    for match in _CONSTANT.finditer(text):
        data = {key.decode(): value.decode() for key, value in _ATTRIBUTE.findall(match[0])}
        if data.get("element_type") in BITS and "offset" in data:
            shape = tuple(int(n) for n in data.get("shape", "").split(",") if n.strip())
            region = Region(f"offset {data['offset']}", int(data["offset"]), data["element_type"], shape)
            if region.size == int(data["size"]):
                listed[region.offset] = region
    return list(listed.values())


_READERS: dict[str, Callable[[Path, Bytes], list[Region]]] = {
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".bin": _openvino,
}

__all__ = ["BITS", "Region", "regions"]
