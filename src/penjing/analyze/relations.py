"""How the channels of an operator's inputs, weights and outputs belong together: layers, norms, products, reductions.

Each rule takes the `Walk` and a node, joins what goes together, and returns the labels of the result. What only moves
values stands in `penjing.analyze.rearrangements`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing.analyze.atoms import Axis, Labels, Literal, Walk, fixed
from penjing.graph import arguments, operator_name, site, tensor_inputs

Rule = Callable[[Walk, fx.Node], Any]


def refuse(walk: Walk, node: fx.Node, why: str) -> Any:
    """Nothing that this operator reads is ever removed."""
    for x in tensor_inputs(node):
        if x in walk.values and isinstance(walk.values[x], tuple):
            for axis in walk.of(x):
                walk.hold(axis, f"{site(node)}: {why}")
    return unchanged(walk, node)


def unchanged(walk: Walk, node: fx.Node) -> Any:
    """Labels of a result that never changes."""
    if node.name in walk.shapes:
        return fixed(len(walk.shape(node)))
    return [fixed(len(walk.shape(user))) if user.name in walk.shapes else () for user in _results(node)]


def _results(node: fx.Node) -> list[fx.Node]:
    """The users that read one of several results each, by their index."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if len(user.args) == 2 and isinstance(user.args[1], int):
            found.setdefault(user.args[1], user)
    return [found.get(i, node) for i in range(max(found, default=-1) + 1)]


def hold_all(walk: Walk, node: fx.Node, axes: list[Axis], why: str) -> None:
    """Hold axes because of an operator."""
    for axis in axes:
        walk.hold(axis, f"{site(node)}: {why}")


# --- layers ------------------------------------------------------------------------------------------------------


def convolution(walk: Walk, node: fx.Node) -> Labels:
    """Weight (out, in/groups, …), or (in, out/groups, …) where it is transposed; input (N, in, …)."""
    name, layer = str(node.target), walk.network.get_submodule(str(node.target))
    x = walk.of(node.args[0])
    spatial = len(layer.kernel_size)  # type: ignore[arg-type]
    channels = len(x) - spatial - 1  # 1, or 0 where there is no batch
    hold_all(walk, node, [*x[:channels], *x[channels + 1 :]], "a convolution slides along this axis")
    reads, gives, groups = int(layer.in_channels), int(layer.out_channels), int(layer.groups)  # type: ignore[arg-type]
    transposed = bool(layer.transposed)
    inner, outer = (0, 1) if transposed else (1, 0)
    weight = f"{name}.weight"
    before = x[channels]
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
    return (*fixed(channels), out, *fixed(spatial))


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
                mine = walk.stored(f"{node.target}.{role}", axis, "one of every channel")
                walk.join(mine, x[len(x) - count + axis], f"{node.target} scales it")
    else:
        given = arguments(node)
        count = len(given["normalized_shape"])
        for i, size in enumerate(given["normalized_shape"]):
            axis_labels = x[len(x) - count + i]
            if not walk.length(node, ("normalized_shape", i), size, axis_labels):
                hold_all(walk, node, [axis_labels], "the shape it normalizes is computed")
        for role in ("weight", "bias"):
            if given.get(role) is not None:
                for mine, other in zip(walk.of(given[role]), x[len(x) - count :], strict=True):
                    walk.join(mine, other, f"{site(node)} scales it")
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
    for mine in vectors:
        walk.join(mine, x[1], f"{where[0]} scales it")
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
    """LSTM, GRU and plain recurrent stacks: matrices of (gates·hidden, in) and (gates·hidden, hidden).

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


# --- products ----------------------------------------------------------------------------------------------------


def product(walk: Walk, node: fx.Node) -> Labels:
    """(…, n, k)·(…, k, m), with vectors on either side, and bias + product."""
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "mv": ("self", "vec")}
    given = arguments(node)
    left, right = (given[w] for w in names.get(operator_name(node), ("self", _second(given))))
    a, b = walk.of(left), walk.of(right)
    walk.join(a[-1], b[-2] if len(b) > 1 else b[-1], f"{site(node)} sums over it")
    own: Labels = (*(a[-2:-1] if len(a) > 1 else ()), *(b[-1:] if len(b) > 1 else ()))
    shape = walk.shape(node)
    rank = len(shape) - len(own)
    outer = [
        aligned(walk, node, d, rank, [(a[:-2], walk.shape(left)[:-2]), (b[:-2], walk.shape(right)[:-2])])
        for d in range(rank)
    ]
    labels = (*outer, *own)
    if isinstance(right, fx.Node) and right.op == "get_attr" and len(b) == 2:  # a linear layer's weight (in, out)
        for axis, role in ((0, "its inputs"), (1, "its outputs")):
            walk.name_role(str(right.target), axis, role)
    if operator_name(node) in ("addmm", "baddbmm"):
        bias = given["self"]
        labels = tuple(
            aligned(walk, node, d, len(shape), [(labels, shape), (walk.of(bias), walk.shape(bias))])
            for d in range(len(shape))
        )
    return labels


def _second(given: dict[str, Any]) -> str:
    return "other" if "other" in given else "mat2" if "mat2" in given else "tensor"


def einsum(walk: Walk, node: fx.Node) -> Labels:
    """Axes of the same letter go together."""
    given = arguments(node)
    left, _, right = str(given["equation"]).replace(" ", "").partition("->")
    if "..." in left or not right:
        return refuse(walk, node, "an equation without a written result")  # type: ignore[no-any-return]
    known: dict[str, Axis] = {}
    for term, x in zip(left.split(","), given["tensors"], strict=True):
        for letter, axis in zip(term, walk.of(x), strict=True):
            if letter in known:
                walk.join(known[letter], axis, f"{site(node)} multiplies it")
            else:
                known[letter] = axis
    return tuple(known[letter] for letter in right)


def attention(walk: Walk, node: fx.Node) -> Labels:
    """Query (…, L, E), key (…, S, E), value (…, S, V): heads stand among the first axes."""
    given = arguments(node)
    q, k, v = (walk.of(given[w]) for w in ("query", "key", "value"))
    shapes = [walk.shape(given[w]) for w in ("query", "key", "value")]
    walk.join(q[-1], k[-1], f"{site(node)} sums over it")
    walk.join(k[-2], v[-2], f"{site(node)} sums over it")
    if q[-1] is not None and given["scale"] is None:
        walk.changes.append(Literal(site(node), ("scale",), q[-1], value=1 / float(np.sqrt(shapes[0][-1]))))
    rank = len(walk.shape(node)) - 2
    heads: list[Axis] = []
    for d in range(rank):
        if given["enable_gqa"] and d == rank - 1:
            heads.append(_shared_keys(walk, node, (q[d], k[d], v[d]), shapes[0][d] // shapes[1][d]))
            continue
        heads.append(aligned(walk, node, d, rank, [(x[:-2], s[:-2]) for x, s in zip((q, k, v), shapes, strict=True)]))
    if given["attn_mask"] is not None:
        mask = given["attn_mask"]
        scores: Labels = (*heads, q[-2], k[-2])
        shape = (*walk.shape(node)[:-2], shapes[0][-2], shapes[1][-2])
        for d in range(len(shape)):
            aligned(walk, node, d, len(shape), [(scores, shape), (walk.of(mask), walk.shape(mask))])
    return (*heads, q[-2], v[-1])


def _shared_keys(walk: Walk, node: fx.Node, heads: tuple[Axis, Axis, Axis], share: int) -> Axis:
    query, key, value = heads
    walk.join(key, value, f"{site(node)} sums over it")
    if key is None:
        walk.hold(query, f"{site(node)}: its keys are shared")
    else:
        walk.join(query, np.repeat(key, share), f"{site(node)} shares its keys")
    return query


# --- elementwise ---------------------------------------------------------------------------------------------------


def aligned(walk: Walk, node: fx.Node, axis: int, rank: int, operands: list[tuple[Labels, tuple[int, ...]]]) -> Axis:
    """Labels of one axis of a broadcast result; the operands' axes are counted from the last."""
    found: Axis = None
    sides: list[Axis] = []
    size = 1
    for labels, shape in operands:
        i = axis - (rank - len(shape))
        if i >= 0 and shape[i] != 1:
            sides.append(labels[i])
            size = shape[i]
    if size == 1:
        return None
    for side in sides:
        if found is None:
            found = side
    for side in sides:
        walk.join(found, side, f"{site(node)} combines it")
    return None if any(side is None for side in sides) else found


def elementwise(walk: Walk, node: fx.Node) -> Labels:
    """Every position of the result comes from the same position of every operand, broadcast."""
    operands = [(walk.of(x), walk.shape(x)) for x in tensor_inputs(node)]
    rank = len(walk.shape(node))
    return tuple(aligned(walk, node, d, rank, operands) for d in range(rank))


def same(walk: Walk, node: fx.Node) -> Any:
    """The labels of the first operand."""
    first = tensor_inputs(node)[0]
    return walk.of(first)


# --- reductions ----------------------------------------------------------------------------------------------------


def _axes(walk: Walk, node: fx.Node, rank: int) -> list[int]:
    given = arguments(node)
    axes = given.get("dim", given.get("axis"))
    if axes is None or axes == []:
        return list(range(rank))
    return [d % rank for d in (axes if isinstance(axes, list | tuple) else [axes])] if rank else []


def _reduced(walk: Walk, node: fx.Node) -> Any:
    """Labels after a reduction, one for every result (the values and their positions of a maximum)."""
    x = walk.of(tensor_inputs(node)[0])
    axes = _axes(walk, node, len(x))
    keep = bool(arguments(node).get("keepdim", False))
    left = tuple(None if d in axes else axis for d, axis in enumerate(x) if keep or d not in axes)
    return left if node.name in walk.shapes else [left for _ in _results(node)]


def average(walk: Walk, node: fx.Node) -> Any:
    """A mean, a maximum: with fewer channels another value, that of the channels which are kept."""
    if "other" in arguments(node):  # the larger of two values
        return elementwise(walk, node)
    x = walk.of(tensor_inputs(node)[0])
    for d in _axes(walk, node, len(x)):
        walk.depends(x[d], site(node))
    return _reduced(walk, node)


def total(walk: Walk, node: fx.Node) -> Any:
    """A sum or norm: channels that are 0 add nothing."""
    return _reduced(walk, node)


def position(walk: Walk, node: fx.Node) -> Any:
    """An operator along axes whose positions count (argmax, cumsum, sort, topk, variance)."""
    x = walk.of(tensor_inputs(node)[0])
    axes = _axes(walk, node, len(x))
    hold_all(walk, node, [x[d] for d in axes], "every position along this axis counts")
    if node.name in walk.shapes and len(walk.shape(node)) == len(x) and not arguments(node).get("keepdim", False):
        return tuple(None if d in axes else axis for d, axis in enumerate(x))
    if node.name not in walk.shapes and _results(node) and len(walk.shape(_results(node)[0])) == len(x):
        return [tuple(None if d in axes else axis for d, axis in enumerate(x)) for _ in _results(node)]
    return _reduced(walk, node)


def softmax(walk: Walk, node: fx.Node) -> Labels:
    """What is left shares the whole."""
    x = walk.of(tensor_inputs(node)[0])
    for d in _axes(walk, node, len(x)):
        walk.depends(x[d], site(node))
    return x


def spatial(walk: Walk, node: fx.Node) -> Any:
    """Pooling, resizing: every channel of (N, channels, …) by itself."""
    x = walk.of(tensor_inputs(node)[0])
    shape = walk.shape(node) if node.name in walk.shapes else walk.shape(_results(node)[0])
    hold_all(walk, node, list(x[2:]), "an operator slides along this axis")
    labels = (*x[:2], *fixed(len(shape) - 2))
    return labels if node.name in walk.shapes else [labels for _ in _results(node)]


RULES: dict[str, Rule] = {
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
    "matmul": product,
    "addmm": product,
    "baddbmm": product,
    "mv": product,
    "einsum": einsum,
    "attention": attention,
    "where": elementwise,
    "floor_divide": elementwise,
    "fill": same,
    "hardswish": same,
    "dropout": same,
    "identity": same,
    "detach": same,
    "to": same,
    "_to_copy": same,
    "type_as": same,
    "lift_fresh_copy": same,
    "zeros_like": same,
    "ones_like": same,
    "full_like": same,
    "empty_like": same,
    "rand_like": same,
    "randn_like": same,
    "sum": total,
    "linalg_vector_norm": total,
    "norm": total,
    "mean": average,
    "amax": average,
    "amin": average,
    "max": average,
    "min": average,
    "logsumexp": average,
    "softmax": softmax,
    "log_softmax": softmax,
    "avg_pool": spatial,
    "max_pool": spatial,
    "max_pool2d_with_indices": spatial,
    "max_pool1d_with_indices": spatial,
    "adaptive_max_pool2d": spatial,
    "resize": spatial,
    "upsample_bilinear2d": spatial,
    "upsample_bicubic2d": spatial,
    "upsample_linear1d": spatial,
    "upsample_nearest1d": spatial,
    "upsample_trilinear3d": spatial,
    "_upsample_nearest_exact2d": spatial,
    "_upsample_bilinear2d_aa": spatial,
    "reflection_pad2d": spatial,
    "replication_pad2d": spatial,
    "reflection_pad1d": spatial,
    "replication_pad1d": spatial,
    "grid_sampler": spatial,
    "argmax": position,
    "argmin": position,
    "cumsum": position,
    "cumprod": position,
    "sort": position,
    "argsort": position,
    "topk": position,
    "var": position,
    "std": position,
    "var_mean": position,
    "any": position,
    "all": position,
    "prod": position,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
}
"""Kind of operator (`penjing.graph.kind`) → its rule. Operators that torch calls pointwise need none."""

POINTWISE = torch.Tag.pointwise
