"""How layers with parameters couple the channels of their input, their weights and their output."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from penjing.analyze.atoms import Axis, Labels, Literal, Walk, fixed
from penjing.analyze.relations import Rule, hold_all, refuse
from penjing.analyze.reshaping import one_part
from penjing.network.graph import arguments, operator_name, site


def convolution(walk: Walk, node: fx.Node) -> Labels:
    """Input (N, in, …); weight (out, in/groups, …), or (in, out/groups, …) if the convolution is transposed."""
    name, layer = str(node.target), walk.network.get_submodule(str(node.target))
    x = walk.of(node.args[0])
    spatial = len(layer.kernel_size)  # type: ignore[arg-type]
    channels = len(x) - spatial - 1  # the channel axis: 1, or 0 without a batch
    spatial_axes = [x[channels + 1 + i] if _is_pointwise(layer, i) else None for i in range(spatial)]
    sliding = [axis for axis, unchanged in zip(x[channels + 1 :], spatial_axes, strict=True) if unchanged is None]
    hold_all(walk, node, [*x[:channels], *sliding], "a convolution slides along this axis")
    in_channels, out_channels, groups = int(layer.in_channels), int(layer.out_channels), int(layer.groups)  # type: ignore[arg-type]
    transposed = bool(layer.transposed)
    inner, outer = (0, 1) if transposed else (1, 0)
    weight = f"{name}.weight"
    input_axis = x[channels] if groups == 1 else one_part(walk, node, x[channels])
    if groups == 1:
        walk.join(walk.stored(weight, inner, "its inputs"), input_axis, f"{name} reads it")
        out = walk.stored(weight, outer, "its outputs")
    elif input_axis is None:
        for axis in (inner, outer):
            walk.hold(walk.stored(weight, axis, "its channels"), f"{name}: the number of its groups never changes")
        out = None
    else:
        out = _grouped(walk, name, input_axis, (in_channels, out_channels, groups), transposed)
    if layer.bias is not None and out is not None:
        role = "its channels" if groups == in_channels == out_channels else "its outputs"
        walk.join(walk.stored(f"{name}.bias", 0, role), out, f"{name} adds its bias")
    return (*fixed(channels), out, *spatial_axes)


def _is_pointwise(layer: Any, axis: int) -> bool:
    """Whether an output position along a spatial axis depends only on the same position of the input."""
    padding = layer.padding if isinstance(layer.padding, str) else layer.padding[axis]
    return layer.kernel_size[axis] == 1 == layer.stride[axis] and padding in (0, "valid", "same")


def _grouped(walk: Walk, name: str, input_axis: np.ndarray, sizes: tuple[int, int, int], transposed: bool) -> Axis:
    """Output labels of a convolution with several groups.

    Args:
        walk: The analysis.
        name: Name of the layer.
        input_axis: Labels of the input channels.
        sizes: Number of input channels, output channels and groups.
        transposed: Whether the convolution is transposed.
    """
    in_channels, out_channels, groups = sizes
    in_per_group, out_per_group = in_channels // groups, out_channels // groups
    weight, why = f"{name}.weight", f"{name} has groups of channels"
    rows = input_axis.reshape(groups, in_per_group)
    whole = groups > in_per_group  # remove whole groups if there are more of them than channels in each
    if whole:
        for k in range(1, in_per_group):
            walk.join(rows[:, 0], rows[:, k], why)
        walk.changes.append(Literal(name, ("groups",), input_axis, in_per_group))
        depthwise = in_per_group == 1 == out_per_group  # its output channels are its input channels
        first = walk.stored(weight, 0, "its channels" if depthwise else "its inputs" if transposed else "its outputs")
        if transposed:
            walk.join(first, input_axis, f"{name} reads it")
            walk.hold(walk.stored(weight, 1, "its outputs"), f"{name}: whole groups are removed")
            return np.repeat(rows[:, 0], out_per_group)
        walk.join(first, np.repeat(rows[:, 0], out_per_group), f"{name} reads it group by group")
        walk.hold(walk.stored(weight, 1, "its inputs"), f"{name}: whole groups are removed")
        return first
    for g in range(1, groups):
        walk.join(rows[0], rows[g], why)
    if transposed:
        walk.join(walk.stored(weight, 0, "its inputs"), input_axis, f"{name} reads it")
        each = walk.stored(weight, 1, "its outputs")
        return None if each is None else np.tile(each, groups)
    walk.join(walk.stored(weight, 1, "its inputs"), rows[0] if in_per_group > 1 else None, f"{name} reads it")
    out = walk.stored(weight, 0, "its outputs")
    if out is not None:
        columns = out.reshape(groups, out_per_group)
        for g in range(1, groups):
            walk.join(columns[0], columns[g], why)
    return out


def linear(walk: Walk, node: fx.Node) -> Labels:
    """Input (…, in); weight (out, in)."""
    name, layer = str(node.target), walk.network.get_submodule(str(node.target))
    x = walk.of(node.args[0])
    walk.join(walk.stored(f"{name}.weight", 1, "its inputs"), x[-1], f"{name} reads it")
    out = walk.stored(f"{name}.weight", 0, "its outputs")
    if layer.bias is not None and out is not None:
        walk.join(walk.stored(f"{name}.bias", 0, "its outputs"), out, f"{name} adds its bias")
    return (*x[:-1], out)


def product_of_weights(walk: Walk, node: fx.Node) -> Labels:
    """A linear operator whose weight (out, in) is computed or also read by another operator; input (…, in)."""
    given = arguments(node)
    x, weight = walk.of(given["input"]), walk.of(given["weight"])
    walk.join(weight[-1], x[-1], f"{site(node)} sums over it")
    for axis, role in ((1, "its inputs"), (0, "its outputs")):
        walk.name_role(str(given["weight"].target), axis, role)
    if len(weight) == 1:
        return x[:-1]
    out = weight[0]
    if given.get("bias") is not None:
        walk.join(walk.of(given["bias"])[-1], out, f"{site(node)} adds its bias")
    return (*x[:-1], out)


def computed_convolution(walk: Walk, node: fx.Node) -> Labels:
    """A convolution with a computed weight (out, in/groups, …); input (N, in, …); all groups are kept."""
    given = arguments(node)
    x, weight, shape = walk.of(given["input"]), walk.of(given["weight"]), walk.shape(given["weight"])
    channels = len(x) - (len(weight) - 2) - 1
    transposed = "transpose" in operator_name(node)
    hold_all(walk, node, [*x[:channels], *x[channels + 1 :], *weight[2:]], "a convolution slides along this axis")
    input_axis, groups = (
        one_part(walk, node, x[channels]),
        walk.shape(given["input"])[channels] // shape[int(not transposed)],
    )
    if transposed:
        if given["groups"] != 1:
            return refuse(walk, node, "a computed weight with groups")  # type: ignore[no-any-return]
        inner, out, groups = one_part(walk, node, weight[0]), weight[1], 1
    else:
        out, inner = one_part(walk, node, weight[0]), one_part(walk, node, weight[1])
    _join_every_group(walk, inner, input_axis, groups, f"{site(node)} sums over it")
    if out is not None and groups > 1:
        rows = out.reshape(groups, -1)
        for g in range(1, groups):
            walk.join(rows[0], rows[g], f"{site(node)} has groups of channels")
    if given.get("bias") is not None:
        walk.join(walk.of(given["bias"])[-1], out, f"{site(node)} adds its bias")
    return (*fixed(channels), out, *fixed(len(weight) - 2))


def _join_every_group(walk: Walk, inner: Axis, input_axis: Axis, groups: int, why: str) -> None:
    """Couple the weight's input axis, the channels of one group, with the channels of every group of the input."""
    if inner is None or input_axis is None:
        walk.join(inner, input_axis, why)
        return
    for row in input_axis.reshape(groups, -1):
        walk.join(inner, row, why)


def looked_up(walk: Walk, node: fx.Node) -> Labels:
    """An embedding whose weight (rows, width) is computed or also read by another operator; indices (…)."""
    given = arguments(node)
    weight = walk.of(given["weight"])
    walk.hold(weight[0], f"{site(node)}: its rows are looked up by index")
    return (*walk.of(given["indices"]), weight[1])


COMPUTED: dict[str, Rule] = {
    "linear": product_of_weights,
    "conv": computed_convolution,
    "conv_transpose": computed_convolution,
    "embedding": looked_up,
}
"""Kind of operator with a computed or shared weight → its rule."""


def embedding(walk: Walk, node: fx.Node) -> Labels:
    """Indices (…); weight (rows, width)."""
    weight = f"{node.target}.weight"
    walk.hold(walk.stored(weight, 0, "its rows"), f"{node.target}: its rows are looked up by index")
    return (*walk.of(node.args[0]), walk.stored(weight, 1, "its outputs"))


def batch_norm(walk: Walk, node: fx.Node) -> Labels:
    """Input (N, channels, …); weight, bias, running mean and variance (channels,)."""
    x = walk.of(node.args[0])
    layer = walk.network.get_submodule(str(node.target))
    for role in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, role, None) is not None:
            walk.join(walk.stored(f"{node.target}.{role}", 0, "one of every channel"), x[1], f"{node.target} scales it")
    return x


def layer_norm(walk: Walk, node: fx.Node) -> Labels:
    """Layer norm or RMS norm: statistics over the last axes, weight and bias of their shape."""
    x = walk.of(node.args[0])
    if node.op == "call_module":
        layer = walk.network.get_submodule(str(node.target))
        count = len(layer.normalized_shape)  # type: ignore[arg-type]
        for role in ("weight", "bias"):
            for axis in range(count if getattr(layer, role) is not None else 0):
                vector = walk.stored(f"{node.target}.{role}", axis, "one of every channel")
                walk.join(vector, x[len(x) - count + axis], f"{node.target} scales it")
    else:
        given = arguments(node)
        count = len(given["normalized_shape"])
        for i, size in enumerate(given["normalized_shape"]):
            axis_labels = x[len(x) - count + i]
            if not walk.length(node, ("normalized_shape", i), size, axis_labels):
                hold_all(walk, node, [axis_labels], "the shape it normalizes is computed")
        for role in ("weight", "bias"):
            if given.get(role) is not None:
                for vector, other in zip(walk.of(given[role]), x[len(x) - count :], strict=True):
                    walk.join(vector, other, f"{site(node)} scales it")
    for axis_labels in x[len(x) - count :]:
        walk.depends(axis_labels, site(node))
    return x


def group_norm(walk: Walk, node: fx.Node) -> Labels:
    """Input (N, channels, …); statistics over each group of channels, weight and bias (channels,)."""
    x = walk.of(node.args[0])
    if node.op == "call_module":
        layer = walk.network.get_submodule(str(node.target))
        groups, where = int(layer.num_groups), (str(node.target), ("num_groups",))  # type: ignore[arg-type]
        vectors = [walk.stored(f"{node.target}.{r}", 0, "one of every channel") for r in ("weight", "bias")]
    else:
        given = arguments(node)
        groups, where = int(given["num_groups"]), (site(node), ("num_groups",))
        vectors = [walk.of(given[r])[0] for r in ("weight", "bias") if given[r] is not None]
    for vector in vectors:
        walk.join(vector, x[1], f"{where[0]} scales it")
    if x[1] is None:
        return x
    rows, why = x[1].reshape(groups, -1), f"{where[0]} has groups of channels"
    if groups > rows.shape[1]:
        for k in range(1, rows.shape[1]):
            walk.join(rows[:, 0], rows[:, k], why)
        walk.changes.append(Literal(*where, x[1], rows.shape[1]))
    else:
        for g in range(1, groups):
            walk.join(rows[0], rows[g], why)
    return x


def channelwise(walk: Walk, node: fx.Node) -> Labels:
    """Input (N, channels, …); vectors (channels,), of which those with one element are broadcast."""
    given = arguments(node)
    x = walk.of(given.get("input") or given["self"])
    for role in ("weight", "bias", "running_mean", "running_var"):
        vector = given.get(role)
        if isinstance(vector, fx.Node) and walk.shape(vector) != (1,):
            walk.join(walk.of(vector)[0], x[1], f"{site(node)} scales it")
    return x


def recurrent(walk: Walk, node: fx.Node) -> Any:
    """LSTM and GRU stacks, whose matrices are (gates·hidden, in) and (gates·hidden, hidden).

    The hidden units of all layers are coupled, since one state tensor (layers·directions, N, hidden) holds them all.
    """
    given = arguments(node)
    if "data" in given or len(given["params"]) != _parameter_count(given):
        return refuse(walk, node, "a packed or projected recurrent layer")
    if any(p.op != "get_attr" for p in given["params"]):
        return refuse(walk, node, "its weights are computed")
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    hidden = walk.of(states[0])[-1]
    directions, step = 1 + given["bidirectional"], 4 if given["has_biases"] else 2
    x: Axis = walk.of(given["input"])[-1]
    why = f"{site(node)} computes it"
    width = int(walk.shape(states[0])[-1])
    units = walk.stored(str(given["params"][1].target), 1, "its state")
    if units is None:
        return refuse(walk, node, "a single unit")
    for state in states:
        walk.join(walk.of(state)[-1], units, why)
    if hidden is None:
        walk.hold(units, f"{site(node)}: its initial state is given")
    outputs: list[Axis] = []
    for i in range(0, len(given["params"]), step):
        names = [str(p.target) for p in given["params"][i : i + step]]
        direction = (i // step) % directions
        if direction == 0 and outputs:
            x, outputs = np.concatenate([units, units]) if directions == 2 else units, []
        gates = walk.stored_tensors[names[0]].shape[0] // width
        walk.join(walk.stored(names[0], 1, "its inputs"), x, f"{site(node)} reads it")
        walk.join(walk.stored(names[1], 1, "its state"), units, why)
        walk.name_role(names[0], 1, "the inputs of its gates")
        walk.name_role(names[1], 1, "the state that its gates read")
        for name in (names[0], *names[1:]):
            walk.join(walk.stored(name, 0, "its gates"), np.tile(units, gates), why)
            walk.name_role(name, 0, "its gates")
        outputs.append(units)
    output = np.concatenate([units, units]) if directions == 2 else units
    sequence = (*walk.of(given["input"])[:-1], output)
    state_labels = (*walk.of(states[0])[:-1], units)
    return [sequence, *([state_labels] * len(states))]


def _parameter_count(given: dict[str, Any]) -> int:
    """Number of parameters of a stack without projections."""
    each = 4 if given["has_biases"] else 2
    return each * int(given["num_layers"]) * (1 + int(given["bidirectional"]))


LAYERS: dict[str, Rule] = {
    "embedding": embedding,
    "linear": linear,
    "conv": convolution,
    "conv_transpose": convolution,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    "instance_norm": channelwise,
    "prelu": channelwise,
    "lstm": recurrent,
    "gru": recurrent,
}
"""Kind of operator (`penjing.network.graph.kind`) → its rule."""
