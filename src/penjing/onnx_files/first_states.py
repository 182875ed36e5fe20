"""First states of recurrent layers that a file stores for the batch that it was exported with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from penjing.onnx_files.node import Node

_LAYERS = ("LSTM", "GRU", "RNN")
_PLACES = (5, 6)
"""Inputs of a recurrent layer that are its first hidden and its first cell state."""


def one_row(state: np.ndarray, batch_first: bool) -> np.ndarray:
    """A state with equal rows, which serves a batch of any size, as one row; any other as it is.

    Args:
        state: (directions, batch, hidden), or (batch, directions, hidden).
        batch_first: Whether it is the latter.
    """
    row = state[:1] if batch_first else state[:, :1]
    return row if (state == row).all() else state


def in_one_row(
    weights: Mapping[str, np.ndarray], readers: Mapping[str, Sequence[tuple[Node, int]]]
) -> dict[str, np.ndarray]:
    """The weights; of a first state with equal rows one row, and none of zeros, which are not weights.

    Args:
        weights: Stored tensors by name.
        readers: Name → the nodes that read it, and as which of their inputs.
    """
    rows: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        orders = {bool(node.get("layout", 0)) for node, _ in readers[name]}
        states = all(node.operator in _LAYERS and place in _PLACES for node, place in readers[name])
        if not states or value.ndim != 3 or len(orders) > 1:
            rows[name] = value
        elif value.any():
            rows[name] = one_row(value, orders.pop())
    return rows
