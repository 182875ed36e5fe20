"""The integers of a plan in the files of ncnn.

A layer with scales of integers (key 8) loads int8 weights, its bias in float32, then for every output how many steps
make 1, then the same of its input. ncnn rounds the input to −127…127, sums products in int32, and gives floating point;
or, where convolutions alone read a convolution, int8, with one number more: how many steps of its result make 1.
(`load_model` and `forward` of ncnn's src/layer/convolution.cpp, convolutiondepthwise.cpp, innerproduct.cpp.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penjing.errors import ExportError
from penjing.runtimes.ncnn_files import CONVOLUTIONS, INT8_TERM, INTEGER, MULTIPLIES, Layer, flagged, plain

GIVES_INTEGERS = 101  # behind INT8_TERM

Places = Mapping[int, tuple[Any, int | None]]
"""Position of a layer → what is known of it (`ncnn_graph.Weighted`), and where its weights' flag lies in the file."""


def placed(layers: Sequence[Layer], data: bytes, weighted: Sequence[Any]) -> Places:
    """Which convolution or linear layer of a network each layer is: one of the same weights, or else of the same size.

    Args:
        layers: Of the `.param` file that pnnx wrote.
        data: The `.bin` file, float32.
        weighted: What the network has, in its order.
    """
    remaining, position = list(weighted), 0
    places: dict[int, tuple[Any, int | None]] = {}
    for i, layer in enumerate(layers):
        count = layer.weights() if layer.type in MULTIPLIES else 0
        alike = [w for w in remaining if w.weight.size == count] if count else []
        there = [(at, k) for k, w in enumerate(alike) if (at := data.find(flagged(w.weight), position)) >= 0]
        if there:
            at, k = min(there)
            places[i], position = (alike[k], at), at + 4 * count
        elif alike:  # pnnx has changed them: a batch norm is folded
            places[i] = (alike[0], None)
        if i in places:
            remaining.remove(places[i][0])
    return places


def in_integers(
    layers: Sequence[Layer], data: bytes, places: Places, weighted: Sequence[Any]
) -> tuple[list[Layer], bytes]:
    """The layers and the `.bin` file with the integers of those that have some.

    Raises:
        ExportError: pnnx has made something else of a layer that the plan computes in integers.
    """
    rewritten, done = list(layers), {}
    for i, (of, at) in places.items():
        if of.integers is not None and at is not None and (layer := _with_scales(layers[i])) is not None:
            rewritten[i], done[i] = layer, of
    lost = [w.site for w in weighted if w.integers is not None and not any(_alike(w, of) for of in done.values())]
    if lost:
        raise ExportError(
            "pnnx has changed layers whose integers ncnn should compute with",
            code="changed",
            got=", ".join(lost[:5]),
            expected="convolutions and linear layers with the weights of the plan",
            remedy="leave them in floating point: quantize.Static(exclude=(...))",
        )
    parts, position = [], 0
    for i, of in done.items():
        at = places[i][1] or 0
        steps = [of.scales, [of.input_scale]]
        if (scale := _read_in_integers(rewritten, i, done)) is not None:
            rewritten[i] = rewritten[i].put(INT8_TERM, GIVES_INTEGERS)
            steps.append([scale])
        parts += [data[position:at], flagged(of.integers)]
        position = at + 4 + 4 * of.weight.size
        if of.bias is not None:
            position += len(flagged(of.bias) if layers[i].type == "Gemm" else plain(of.bias))
            parts.append(plain(of.bias))
        parts += [plain(_per_unit(np.array(values))) for values in steps]
    return rewritten, b"".join([*parts, data[position:]])


def _read_in_integers(layers: Sequence[Layer], position: int, done: Mapping[int, Any]) -> float | None:
    """What one step stands for in the inputs of all convolutions that read a convolution; None where others do, too."""
    if layers[position].type not in CONVOLUTIONS:
        return None
    blobs, readers = set(layers[position].tops), []
    for i, layer in enumerate(layers):
        if blobs.intersection(layer.bottoms):
            if layer.type == "Split":
                blobs.update(layer.tops)
            else:
                readers.append(done[i].input_scale if i in done and layer.type in CONVOLUTIONS else None)
    given = any(blob.startswith("out") for blob in blobs)
    return None if given or not readers or len(set(readers)) > 1 else readers[0]


def _alike(one: Any, other: Any) -> bool:
    """Whether two layers are one for pnnx, which computes what is called twice once."""
    same = one.input_scale == other.input_scale and one.weight.shape == other.weight.shape
    return one is other or bool(same and np.array_equal(one.weight, other.weight))


def _with_scales(layer: Layer) -> Layer | None:
    """The layer that computes the same in integers; None where there is none."""
    if layer.type in INTEGER:
        return layer.put(INT8_TERM, 1)
    keys = dict(layer.params)
    as_expected = all(keys.get(key, value) == value for key, value in _LINEAR.items())
    if layer.type != "Gemm" or not as_expected or set(keys) - _KNOWN:
        return None
    outputs, bias = layer.get(8), int(keys.get("10", "-1") == "4" and keys["6"] == "1")
    params = (("0", outputs), ("1", bias), ("2", layer.weights()), (str(INT8_TERM), 1))
    return Layer("InnerProduct", layer.name, layer.bottoms, layer.tops, tuple((k, str(v)) for k, v in params))


# What pnnx writes for a linear layer over rows: x · Bᵀ + C, B and C stored.
_LINEAR = {"2": "0", "3": "1", "4": "0", "5": "1"}
_KNOWN = {*_LINEAR, "6", "7", "8", "9", "10"}


def _per_unit(scales: np.ndarray) -> np.ndarray:
    """How many steps make 1, which ncnn multiplies by; 0 of a channel without a range."""
    steps = np.zeros(scales.shape)
    np.divide(1, scales, out=steps, where=scales > 0, dtype=np.float64)
    return steps
