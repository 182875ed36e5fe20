"""How a layer couples the channels of its input, its weights and its output."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from penjing.analyze.atoms import Axis, Labels, Literal, Walk, fixed
from penjing.analyze.relations import Rule, hold_all, refuse
from penjing.analyze.reshaping import one_part
from penjing.network.graph import arguments, operator_name, site


def convolution(walk: Walk, node: fx.Node) -> Labels:
    """Weight (out, in/groups, …), or (in, out/groups, …) where it is transposed; input (N, in, …)."""
    name, layer = str(node.target), walk.network.get_submodule(str(node.target))
    x = walk.of(node.args[0])
    spatial = len(layer.kernel_size)  # type: ignore[arg-type]
    channels = len(x) - spatial - 1  # 1, or 0 where there is no batch
    passed = [x[channels + 1 + i] if _stands_still(layer, i) else None for i in range(spatial)]
    slid = [axis for axis, still in zip(x[channels + 1 :], passed, strict=True) if still is None]
    hold_all(walk, node, [*x[:channels], *slid], "a convolution slides along this axis")
    reads, gives, groups = int(layer.in_channels), int(layer.out_channels), int(layer.groups)  # type: ignore[arg-type]
    transposed = bool(layer.transposed)
    inner, outer = (0, 1) if transposed else (1, 0)
    weight = f"{name}.weight"
    before = x[channels] if groups == 1 else one_part(walk, node, x[channels])
    if groups == 1:
        walk.join(walk.stored(weight, inner, "its inputs"), before, f"{name} reads it")
        out = walk.stored(weight, outer, "its outputs")
    elif before is None:
        for axis in (inner, outer):
            walk.hold(walk.stored(weight, axis, "its channels"), f"{name}: the number of its groups never changes")
        out = None
    else:
        out = _grouped(walk, name, before, (reads, gives, groups), transposed)
    if layer.bias is not None and out is not None:
        role = "its channels" if groups == reads == gives else "its outputs"
        walk.join(walk.stored(f"{name}.bias", 0, role), out, f"{name} adds its bias")
    return (*fixed(channels), out, *passed)


def _stands_still(layer: Any, axis: int) -> bool:
    """Whether every position along a spatial axis is computed from the same position alone."""
    padding = layer.padding if isinstance(layer.padding, str) else layer.padding[axis]
    return layer.kernel_size[axis] == 1 == layer.stride[axis] and padding in (0, "valid", "same")


def _grouped(walk: Walk, name: str, before: np.ndarray, sizes: tuple[int, int, int], transposed: bool) -> Axis:
    """Output labels of a convolution whose input channels fall into groups."""
    reads, gives, groups = sizes
    each_in, each_out = reads // groups, gives // groups
    weight, why = f"{name}.weight", f"{name} has groups of channels"
    rows = before.reshape(groups, each_in)
    whole = groups > each_in  # whole groups go, where these are more than the channels of one
    if whole:
        for k in range(1, each_in):
            walk.join(rows[:, 0], rows[:, k], why)
        walk.changes.append(Literal(name, ("groups",), before, each_in))
        single = each_in == 1 == each_out  # depthwise: it makes no channels, it passes them on
        first = walk.stored(weight, 0, "its channels" if single else "its inputs" if transposed else "its outputs")
        if transposed:
            walk.join(first, before, f"{name} reads it")
            walk.hold(walk.stored(weight, 1, "its outputs"), f"{name}: whole groups go")
            return np.repeat(rows[:, 0], each_out)
        walk.join(first, np.repeat(rows[:, 0], each_out), f"{name} reads it group by group")
        walk.hold(walk.stored(weight, 1, "its inputs"), f"{name}: whole groups go")
        return first
    for g in range(1, groups):
        walk.join(rows[0], rows[g], why)
    if transposed:
        walk.join(walk.stored(weight, 0, "its inputs"), before, f"{name} reads it")
        each = walk.stored(weight, 1, "its outputs")
        return None if each is None else np.tile(each, groups)
    walk.join(walk.stored(weight, 1, "its inputs"), rows[0] if each_in > 1 else None, f"{name} reads it")
    out = walk.stored(weight, 0, "its outputs")
    if out is not None:
        columns = out.reshape(groups, each_out)
        for g in range(1, groups):
            walk.join(columns[0], columns[g], why)
    return out


def linear(walk: Walk, node: fx.Node) -> Labels:
    """Weight (out, in); input (…, in)."""
    name, layer = str(node.target), walk.network.get_submodule(str(node.target))
    x = walk.of(node.args[0])
    walk.join(walk.stored(f"{name}.weight", 1, "its inputs"), x[-1], f"{name} reads it")
    out = walk.stored(f"{name}.weight", 0, "its outputs")
    if layer.bias is not None and out is not None:
        walk.join(walk.stored(f"{name}.bias", 0, "its outputs"), out, f"{name} adds its bias")
    return (*x[:-1], out)


def product_of_weights(walk: Walk, node: fx.Node) -> Labels:
    """A linear layer by a weight (out, in) that is computed, or that another operator reads too; input (…, in)."""
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
    """A convolution by a weight (out, in/groups, …) that is computed; input (N, in, …); all groups stay."""
    given = arguments(node)
    x, weight, shape = walk.of(given["input"]), walk.of(given["weight"]), walk.shape(given["weight"])
    channels = len(x) - (len(weight) - 2) - 1
    transposed = "transpose" in operator_name(node)
    hold_all(walk, node, [*x[:channels], *x[channels + 1 :], *weight[2:]], "a convolution slides along this axis")
    before, groups = (
        one_part(walk, node, x[channels]),
        walk.shape(given["input"])[channels] // shape[int(not transposed)],
    )
    if transposed:
        if given["groups"] != 1:
            return refuse(walk, node, "a computed weight with groups")  # type: ignore[no-any-return]
        inner, out, groups = one_part(walk, node, weight[0]), weight[1], 1
    else:
        out, inner = one_part(walk, node, weight[0]), one_part(walk, node, weight[1])
    _each(walk, inner, before, groups, f"{site(node)} sums over it")
    if out is not None and groups > 1:
        rows = out.reshape(groups, -1)
        for g in range(1, groups):
            walk.join(rows[0], rows[g], f"{site(node)} has groups of channels")
    if given.get("bias") is not None:
        walk.join(walk.of(given["bias"])[-1], out, f"{site(node)} adds its bias")
    return (*fixed(channels), out, *fixed(len(weight) - 2))


def _each(walk: Walk, inner: Axis, before: Axis, groups: int, why: str) -> None:
    """Couple the input channels of a group with those of every group."""
    if inner is None or before is None:
        walk.join(inner, before, why)
        return
    for row in before.reshape(groups, -1):
        walk.join(inner, row, why)


def looked_up(walk: Walk, node: fx.Node) -> Labels:
    """An embedding whose weight (rows, width) is computed, or read by another operator too; indices (…)."""
    given = arguments(node)
    weight = walk.of(given["weight"])
    walk.hold(weight[0], f"{site(node)}: its rows are looked up by number")
    return (*walk.of(given["indices"]), weight[1])


COMPUTED: dict[str, Rule] = {
    "linear": product_of_weights,
    "conv": computed_convolution,
    "conv_transpose": computed_convolution,
    "embedding": looked_up,
}
"""Kind of operator that reads a weight which is not its own → its rule."""


def embedding(walk: Walk, node: fx.Node) -> Labels:
    """Weight (rows, width); indices (…)."""
    weight = f"{node.target}.weight"
    walk.hold(walk.stored(weight, 0, "its rows"), f"{node.target}: its rows are looked up by number")
    return (*walk.of(node.args[0]), walk.stored(weight, 1, "its outputs"))


def batch_norm(walk: Walk, node: fx.Node) -> Labels:
    """One weight, bias, mean and variance for every channel of (N, channels, …)."""
    x = walk.of(node.args[0])
    layer = walk.network.get_submodule(str(node.target))
    for role in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, role, None) is not None:
            walk.join(walk.stored(f"{node.target}.{role}", 0, "one of every channel"), x[1], f"{node.target} scales it")
    return x


def layer_norm(walk: Walk, node: fx.Node) -> Labels:
    """Statistics over the last axes; one weight and bias for every position of them."""
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
    """Statistics over groups of the channels of (N, channels, …)."""
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
    """A functional operator with vectors of one value for every channel of (N, channels, …)."""
    given = arguments(node)
    x = walk.of(given.get("input") or given["self"])
    for role in ("weight", "bias", "running_mean", "running_var"):
        vector = given.get(role)
        if isinstance(vector, fx.Node) and walk.shape(vector) != (1,):
            walk.join(walk.of(vector)[0], x[1], f"{site(node)} scales it")
    return x


def recurrent(walk: Walk, node: fx.Node) -> Any:
    """LSTM and GRU stacks: matrices of (gates·hidden, in) and (gates·hidden, hidden).

    The units of all layers and states come and go together: a state tensor has one axis for them all.
    """
    given = arguments(node)
    if "data" in given or len(given["params"]) != _expected(given):
        return refuse(walk, node, "a packed or projected recurrent layer")
    if any(p.op != "get_attr" for p in given["params"]):
        return refuse(walk, node, "its weights are computed")
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    hidden = walk.of(states[0])[-1]
    both, step = 1 + given["bidirectional"], 4 if given["has_biases"] else 2
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
        direction = (i // step) % both
        if direction == 0 and outputs:
            x, outputs = np.concatenate([units, units]) if both == 2 else units, []
        gates = walk.stored_tensors[names[0]].shape[0] // width
        walk.join(walk.stored(names[0], 1, "its inputs"), x, f"{site(node)} reads it")
        walk.join(walk.stored(names[1], 1, "its state"), units, why)
        for name in (names[0], *names[1:]):
            walk.join(walk.stored(name, 0, "its gates"), np.tile(units, gates), why)
        outputs.append(units)
    last = np.concatenate([units, units]) if both == 2 else units
    sequence = (*walk.of(given["input"])[:-1], last)
    state_labels = (*walk.of(states[0])[:-1], units)
    return [sequence, *([state_labels] * len(states))]


def _expected(given: dict[str, Any]) -> int:
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
