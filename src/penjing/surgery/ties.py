"""Tying tensors: several names for one parameter, which is then stored once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from penjing.steps.draft import Edit


def tie(network: fx.GraphModule, groups: Sequence[Sequence[str]]) -> Edit:
    """Make the parameters of each group one, in place: all names read the first one.

    A parameter that has further names of its own takes these along.

    Raises:
        AttributeError: The network has no such parameter.
        ValueError: Two parameters of a group have different shapes.
    """
    for names in groups:
        first = network.get_parameter(names[0])
        for name in names[1:]:
            other = network.get_parameter(name)
            if other.shape != first.shape or other.dtype != first.dtype:
                raise ValueError(f"{name} is {tuple(other.shape)}, and {names[0]} is {tuple(first.shape)}")
            for module in network.modules():
                for role, value in module._parameters.items():
                    if value is other:
                        module._parameters[role] = first
    return {"edit": "tie", "groups": [list(names) for names in groups]}
