"""Where the tensors of a network lie within its files, so that they can be coded as what they are.

What is not told here is coded as bytes, so a file that is read wrongly loses size and never content.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penjing.records import reading
from penjing.storage import archives, onnx_places

Bytes = npt.NDArray[np.uint8]

BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "f32": 32, "f16": 16, "bf16": 16}
"""Number types of weights → bits of a value; two values of 4 bits share a byte, the lower half first."""
ALL_BITS = BITS | {
    "f8e4m3": 8, "f8e5m2": 8, "i16": 16, "u16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
"""All number types that are told."""
_SAFETENSORS = {
    "BOOL": "u8", "I8": "i8", "U8": "u8", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8e4m3",
    "F8_E5M2": "f8e5m2", "I16": "i16", "U16": "u16", "I32": "i32", "U32": "u32", "I64": "i64", "U64": "u64",
    "F64": "f64",
}  # fmt: skip
_ONNX = {
    1: "f32", 2: "u8", 3: "i8", 4: "u16", 5: "i16", 6: "i32", 7: "i64", 9: "u8", 10: "f16", 11: "f64", 12: "u32",
    13: "u64", 16: "bf16", 17: "f8e4m3", 19: "f8e5m2", 21: "u4", 22: "i4",
}  # fmt: skip
_OPENVINO = {name: name for name in ALL_BITS} | {"boolean": "u8"}
_CONSTANT = re.compile(rb"<data [^>]*>")
_ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Region:
    """A tensor within a file.

    Attributes:
        name: As the file calls it.
        offset: In bytes, from the beginning of the file.
        dtype: A key of `ALL_BITS`.
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
        return -(-self.count * ALL_BITS[self.dtype] // 8)


def regions(path: Path, content: Bytes, types: Collection[str] = tuple(BITS)) -> list[Region]:
    """Return the tensors of a file in the order of their places; none of a file of another kind.

    Args:
        path: Its name tells the kind: ``.safetensors``, ``.onnx``, ``.bin`` (with OpenVINO's ``.xml`` beside it), or
            any file in which an ``.onnx`` beside it stores tensors. Zip archives, such as ``.pth``, begin as such.
        content: Its bytes.
        types: Number types of the tensors that are told.
    """
    listed: list[Region] = []
    archived = content[:4].tobytes() == b"PK\3\4"
    for reader in (_archived,) if archived else _READERS.get(path.suffix, (_external,)):
        with contextlib.suppress(Exception):  # whatever a damaged file raises: it is coded as bytes
            listed += reader(path, content)
    apart: list[Region] = []
    end = 0
    for region in sorted(listed, key=lambda r: r.offset):
        fits = region.offset >= end and region.offset + region.size <= len(content)
        if region.dtype in types and region.count and fits:
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
    return _stored(onnx_places.tensors(content))


def _external(path: Path, content: Bytes) -> list[Region]:
    return _stored(onnx_places.outside(path))


def _archived(path: Path, content: Bytes) -> list[Region]:
    members = archives.members(path, content)
    return [Region(m.name, m.place, m.dtype, (m.size * 8 // ALL_BITS[m.dtype],)) for m in members]


def _stored(tensors: list[onnx_places.Stored]) -> list[Region]:
    """Those whose bytes are as many as their shape takes."""
    listed = {}
    for tensor in tensors:
        if tensor.data_type in _ONNX and reading.fits(tensor.shape, 2 * tensor.size):
            region = Region(tensor.name, tensor.place, _ONNX[tensor.data_type], tensor.shape)
            if region.size == tensor.size:
                listed[region.offset] = region
    return list(listed.values())


def _openvino(path: Path, content: Bytes) -> list[Region]:
    text = reading.data(path.with_suffix(".xml"), reading.TEXT_BYTES)
    listed = {}
    for match in _CONSTANT.finditer(text):
        data = {key.decode(): value.decode() for key, value in _ATTRIBUTE.findall(match[0])}
        dtype = _OPENVINO.get(data.get("element_type", ""))
        if dtype and "offset" in data:
            shape = tuple(int(n) for n in data.get("shape", "").split(",") if n.strip())
            region = Region(f"offset {data['offset']}", int(data["offset"]), dtype, shape)
            if region.size == int(data["size"]):
                listed[region.offset] = region
    return list(listed.values())


_READERS: dict[str, tuple[Callable[[Path, Bytes], list[Region]], ...]] = {
    ".safetensors": (_safetensors,),
    ".onnx": (_onnx,),
    ".bin": (_openvino, _external),
}

__all__ = ["ALL_BITS", "BITS", "Region", "regions"]
