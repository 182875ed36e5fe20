"""The masked reference that structured pruning is checked against: the full network with removed channels masked.

The weights, biases, norms and states of removed channels are 0, and so are the weights that read them. Norms, means,
maxima and softmaxes over channels are computed over the remaining ones, and attention keeps its scale. The outputs of
the pruned network have to equal this reference up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from penjing.analyze.coupling import Coupling
from penjing.network.graph import arguments, flat_inputs, kind

Masks = list[torch.Tensor | None]


def masked(network: fx.GraphModule, coupling: Coupling, removed: dict[str, list[int]]) -> Callable[..., Any]:
    """A function with the network's arguments that computes the reference, in eval mode and without gradients.

    Args:
        network: The network before pruning; it is left unchanged.
        coupling: Its groups (`penjing.analyze.coupling.couple`), or those of a network that it is a copy of.
        removed: Group → units that are masked.
    """
    model = copy.deepcopy(network).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, units in removed.items():
            for member in coupling.groups[name].members:
                removed_positions = torch.from_numpy(member.of(units))
                tensors[member.tensor].index_fill_(member.axis, removed_positions, 0)
    gone_atoms = coupling.removed_atoms(removed)
    masks: dict[str, Masks] = {}
    for node in network.graph.nodes:
        positions = coupling.kept_positions(node.name, gone_atoms)
        if any(k is not None and not k.all() for k in positions):
            masks[node.name] = [None if k is None or k.all() else torch.from_numpy(k) for k in positions]
    interpreter = _Masked(model, masks)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return interpreter.run(*flat_inputs(model, (args, kwargs)))

    return run


class _Masked(fx.Interpreter):
    def __init__(self, model: fx.GraphModule, masks: dict[str, Masks]) -> None:
        super().__init__(model)
        self.model, self.masks = model, masks

    def run_node(self, n: fx.Node) -> Any:
        reads = [x for x in n.all_input_nodes if x.name in self.masks]
        rule = _RULES.get(kind(self.model, n)) if reads else None
        if rule is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return rule(self, n, args, kwargs)

    def zeroed(self, n: fx.Node, fill: float = 0.0, axes: tuple[int, ...] | None = None) -> torch.Tensor:
        """The value of a node with `fill` where a channel is masked, along these axes or along all."""
        value: torch.Tensor = self.env[n]
        for axis, keep in enumerate(self.masks.get(n.name, [])):
            if keep is not None and (axes is None or axis in axes):
                value = value.masked_fill(~_along(keep, axis, value.dim()), fill)
        return value

    def share(self, n: fx.Node, axis: int) -> torch.Tensor | None:
        """Mask of the remaining positions of an axis; None where all remain."""
        masks = self.masks.get(n.name)
        return None if masks is None else masks[axis]


def _along(keep: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    shape = [1] * rank
    shape[axis] = -1
    return keep.reshape(shape)


def _product(run: _Masked, n: fx.Node, args: Any, kwargs: Any) -> Any:
    """Sums of products: masked channels contribute nothing."""
    values = {x: run.zeroed(x) for x in n.all_input_nodes if isinstance(run.env[x], torch.Tensor)}
    return _call(run, n, values)


def _call(run: _Masked, n: fx.Node, values: dict[fx.Node, torch.Tensor]) -> Any:
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda x: values.get(x, run.env[x]))
    if n.op == "call_module":
        return run.model.get_submodule(str(n.target))(*args, **kwargs)
    return n.target(*args, **kwargs)  # type: ignore[operator]


def _norm(run: _Masked, n: fx.Node, args: Any, kwargs: Any) -> Any:
    """Layer norm over the remaining positions of the last axes."""
    x: Any = n.all_input_nodes[0]
    if n.op == "call_module":
        layer: Any = run.model.get_submodule(str(n.target))
        shape, weight, bias, eps = layer.normalized_shape, layer.weight, layer.bias, layer.eps
    else:
        given = arguments(n)
        shape, eps = given["normalized_shape"], given["eps"]
        weight, bias = (run.env[given[w]] if given.get(w) is not None else None for w in ("weight", "bias"))
    value = run.zeroed(x)
    axes = tuple(range(value.dim() - len(shape), value.dim()))
    keep, count = _kept_over(run, x, value, axes)
    if kind(run.model, n) == "rms_norm":
        eps = torch.finfo(value.dtype).eps if eps is None else eps
        value = value * torch.rsqrt((value**2).sum(axes, keepdim=True) / count + eps)
    else:
        centred = (value - value.sum(axes, keepdim=True) / count) * keep
        value = centred * torch.rsqrt((centred**2).sum(axes, keepdim=True) / count + eps)
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _kept_over(
    run: _Masked, x: fx.Node, value: torch.Tensor, axes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask over the axes of a reduction, and how many of their positions remain."""
    keep = torch.ones([value.shape[d] if d in axes else 1 for d in range(value.dim())], dtype=value.dtype)
    for d in axes:
        mask = run.share(x, d)
        if mask is not None:
            keep = keep * _along(mask, d, value.dim())
    return keep, keep.sum()


def _group_norm(run: _Masked, n: fx.Node, args: Any, kwargs: Any) -> Any:
    """Statistics of every group over its remaining channels; a group without any gives 0."""
    x: Any = n.all_input_nodes[0]
    if n.op == "call_module":
        layer: Any = run.model.get_submodule(str(n.target))
        groups, weight, bias, eps = layer.num_groups, layer.weight, layer.bias, layer.eps
    else:
        given = arguments(n)
        groups, eps = given["num_groups"], given["eps"]
        weight, bias = (run.env[given[w]] if given[w] is not None else None for w in ("weight", "bias"))
    value = run.zeroed(x)
    mask = run.share(x, 1)
    keep = torch.ones(value.shape[1], dtype=value.dtype) if mask is None else mask.to(value.dtype)
    rows = value.reshape(len(value), groups, -1)
    inner = value.numel() // (value.shape[0] * value.shape[1])
    spread = keep.repeat_interleave(inner).reshape(1, groups, -1)
    count = spread.sum(-1, keepdim=True).clamp(min=1)
    centred = (rows - rows.sum(-1, keepdim=True) / count) * spread
    normal = (centred * torch.rsqrt((centred**2).sum(-1, keepdim=True) / count + eps)).reshape(value.shape)
    if weight is not None:
        normal = normal * _along(weight, 1, value.dim())
    return normal if bias is None else normal + _along(bias, 1, value.dim())


def _mean(run: _Masked, n: fx.Node, args: Any, kwargs: Any) -> Any:
    x: Any = n.all_input_nodes[0]
    value = run.zeroed(x)
    given = arguments(n)
    dims = given.get("dim")
    axes = tuple(d % value.dim() for d in dims) if dims else tuple(range(value.dim()))
    count = torch.tensor(1.0, dtype=value.dtype)
    for d in axes:
        mask = run.share(x, d)
        count = count * (value.shape[d] if mask is None else int(mask.sum()))
    return value.sum(axes, keepdim=bool(given.get("keepdim", False))) / count


def _extreme(fill: float) -> Callable[..., Any]:
    def rule(run: _Masked, n: fx.Node, args: Any, kwargs: Any) -> Any:
        x, given = n.all_input_nodes[0], arguments(n)
        if "other" in given:  # the larger of two values, position by position
            return _call(run, n, {})
        rank, axes = run.env[x].dim(), given.get("dim")
        along = axes if isinstance(axes, list | tuple) else range(rank) if axes is None else [axes]
        # Along the other axes every channel has an extreme of its own, masked or not.
        return _call(run, n, {x: run.zeroed(x, fill, tuple(d % rank for d in along or range(rank)))})

    return rule


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("matmul", "addmm", "baddbmm", "mv", "einsum", "attention", "sum", "norm"), _product),
    "linalg_vector_norm": _product,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "group_norm": _group_norm,
    "mean": _mean,
    **dict.fromkeys(("amax", "max", "softmax", "log_softmax", "logsumexp"), _extreme(float("-inf"))),
    **dict.fromkeys(("amin", "min"), _extreme(float("inf"))),
}
