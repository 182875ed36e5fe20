"""Conditioning: how far a network's outputs move when every value is off by rounding, an upper bound for parity.

Behind a quantizer a difference in the last bit becomes a whole step where the value lies between two of them, and in a
deep network that step moves others. Two runtimes that both compute what was planned then differ as much as the plan
differs from itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from penjing.network.graph import flat_inputs
from penjing.tasks.outputs import flatten_outputs, to_numpy
from penjing.tasks.task import Call

_DRAWN = 1_048_573  # errors before they repeat; a prime, so that no two rows of a tensor have the same ones


def rounded_elsewhere(network: fx.GraphModule, call: Call, rounding: float, seed: int) -> list[np.ndarray]:
    """The network's flat outputs where every floating-point input and result is off by up to `rounding` of itself.

    Args:
        network: Captured, with or without quantizers.
        call: The samples.
        rounding: Largest relative error of a value, such as 2**-8 for bfloat16.
        seed: Of the errors, which are uniform.
    """
    with torch.no_grad():
        values = _Rounds(network, rounding, seed).run(*flat_inputs(network, call), enable_io_processing=False)
    return [to_numpy(t) for t in flatten_outputs(network.graph.process_outputs(values))[0]]


class _Rounds(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, rounding: float, seed: int) -> None:
        super().__init__(network)
        generator = torch.Generator().manual_seed(seed)
        self.rounding, self.drawn = rounding, torch.rand(_DRAWN, generator=generator) * 2 - 1
        self.next = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("output", "get_attr"):  # those are given, and exact
            return value
        return type(value)(map(self._off, value)) if type(value) in (tuple, list) else self._off(value)

    def _off(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        errors = self._errors(value.numel()).view(value.shape).to(value)
        moved = torch.addcmul(value, value, errors, value=self.rounding)
        if moved.sum().isfinite():
            return moved
        return torch.where(moved.isfinite(), moved, value)  # the largest float fills masks

    def _errors(self, count: int) -> torch.Tensor:
        """The next errors from -1 to 1, cyclically: to draw each takes longer than the network itself."""
        start = self.next
        self.next = (start + count) % _DRAWN
        if start + count > len(self.drawn):
            self.drawn = self.drawn[:_DRAWN].repeat(-(-(start + count) // _DRAWN))
        return self.drawn[start : start + count]


__all__ = ["rounded_elsewhere"]
