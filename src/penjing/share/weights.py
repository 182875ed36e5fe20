"""Which tensors can be shared, and by what name settings speak of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from penjing.analyze.output_gradients import squared_gradients
from penjing.errors import SharingError
from penjing.network.graph import RECURRENT, kind
from penjing.network.selection import named
from penjing.steps.step import Context

KINDS = ("conv", "linear", "conv_transpose", "embedding", *RECURRENT)
"""The kinds of layers whose matrices can be values of a codebook."""


def matrices(network: fx.GraphModule, layers: Iterable[str] = (), keep: Iterable[str] = ()) -> dict[str, str]:
    """Parameter → the kind of its layer, for every weight of two or more axes, in execution order.

    A parameter that several layers share is listed once.

    Args:
        network: A captured network.
        layers: Layers, or parts of the network; empty selects all.
        keep: Layers, or parts of the network, that are left out.

    Raises:
        RecipeError: A named layer does not exist.
        SharingError: No weight is left.
    """
    layers, keep = tuple(layers), tuple(keep)
    owners: dict[str, str] = {}  # layer → its kind, in execution order; of a functional operator the tensor's owner
    direct: set[str] = set()
    for node in network.graph.nodes:
        if node.op == "call_module" and kind(network, node) in KINDS:
            owners.setdefault(str(node.target), kind(network, node))
        for read in node.all_input_nodes if kind(network, node) in KINDS else ():
            if read.op == "get_attr":
                direct.add(str(read.target))
                owners.setdefault(str(read.target).rpartition(".")[0], kind(network, node))
    chosen = named(owners, network, layers) if layers else set(owners)
    chosen -= named(owners, network, keep)
    layers_called = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    tensors: dict[str, str] = {}
    seen: set[int] = set()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for owner, what in owners.items():
        names = [n for n in parameters if n.rpartition(".")[0] == owner and (owner in layers_called or n in direct)]
        for name in names if owner in chosen else ():
            if parameters[name].dim() > 1 and id(parameters[name]) not in seen:
                seen.add(id(parameters[name]))
                tensors[name] = what
    if not tensors:
        raise SharingError(
            "no layer is left whose weights can be shared",
            code="nothing-to-share",
            got=f"{len(owners)} layers with matrices, layers={layers}, keep={keep}",
            expected=f"at least one of the kinds {', '.join(KINDS)}",
        )
    return tensors


def sensitivities(
    network: fx.GraphModule, names: Iterable[str], context: Context, setting: str, samples: int
) -> dict[str, torch.Tensor]:
    """Parameter → what a squared error of each of its weights counts, in its shape.

    Args:
        network: It is left unchanged.
        names: The parameters.
        context: Has the calibration data and the seed.
        setting: "outputs": the mean squared derivative of the network's outputs; "none": 1 for every weight; "auto":
            "outputs" where there is calibration data.
        samples: Calibration samples that are read.

    Raises:
        CalibrationError: There is no calibration data for "outputs".
    """
    if setting == "none" or (setting == "auto" and context.task.calibration is None):
        return {name: torch.ones_like(network.get_parameter(name).detach()) for name in names}
    return squared_gradients(network, names, context, samples)
