"""Building layers with parameters from their functional ATen operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import arguments, operator_name


class Tensors:
    """The tensors that get_attr nodes read, and every tensor of the source by its name."""

    def __init__(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.state = state

    def _tensor(self, node: Any) -> Any:
        return self.tensors[str(node.target)]


Built = tuple[nn.Module, tuple[Any, ...], dict[str, str]] | None


def assign(source: Tensors, module: nn.Module, values: Mapping[str, Any]) -> dict[str, str] | None:
    """Assign the exported tensors to `module`; None if one of them is computed rather than stored."""
    names: dict[str, str] = {}
    for role, node in values.items():
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor = source._tensor(node)
        if role in module._buffers:
            module._buffers[role] = tensor
        else:
            module._parameters[role] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
        names[role] = str(node.target)
    return names


def _weight(source: Tensors, node: Any) -> torch.Tensor | None:
    return source._tensor(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _conv(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    weight = _weight(source, a["weight"])
    name = operator_name(node)
    transposed = name.startswith("conv_transpose")
    if weight is None:
        return None
    n = int(name[-2])
    cls: Any = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    groups = a["groups"]
    inner, outer = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    spread = {k: _tuple(a[k], n) for k in ("stride", "dilation")}
    padding = a["padding"] if isinstance(a["padding"], str) else _tuple(a["padding"], n)
    more = {"output_padding": _tuple(a["output_padding"], n)} if transposed else {}
    module = cls(
        inner,
        outer,
        tuple(weight.shape[2:]),
        padding=padding,
        groups=groups,
        bias=a["bias"] is not None,
        device="meta",
        **spread,
        **more,
    )
    names = assign(source, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _linear(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    weight = _weight(source, a["weight"])
    if weight is None or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=a["bias"] is not None, device="meta")
    names = assign(source, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _batch_norm(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    if a["running_mean"] is None or a["training"]:
        return None
    mean = _weight(source, a["running_mean"])
    value = node.meta.get("val")
    if mean is None or value is None:
        return None
    cls: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.dim()]
    module = cls(mean.shape[0], eps=a["eps"], momentum=a["momentum"], affine=a["weight"] is not None, device="meta")
    roles = {role: a[role] for role in ("weight", "bias", "running_mean", "running_var")}
    names = assign(source, module, roles)
    if names is None:
        return None
    tracked = source.state.get(names["running_mean"].removesuffix("running_mean") + "num_batches_tracked")
    module.num_batches_tracked = torch.tensor(0) if tracked is None else tracked.clone()
    return module, (a["input"],), names


def _layer_norm(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    if a["weight"] is None:
        return None
    module = nn.LayerNorm(tuple(a["normalized_shape"]), eps=a["eps"], bias=a["bias"] is not None, device="meta")
    names = assign(source, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _group_norm(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    weight = _weight(source, a["weight"])
    if weight is None:
        return None
    module = nn.GroupNorm(a["num_groups"], weight.shape[0], eps=a["eps"], device="meta")
    names = assign(source, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _embedding(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    weight = _weight(source, a["weight"])
    if weight is None:
        return None
    padding = a["padding_idx"] if a["padding_idx"] is not None and a["padding_idx"] >= 0 else None
    module = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, device="meta")
    names = assign(source, module, {"weight": a["weight"]})
    return None if names is None else (module, (a["indices"],), names)


def _dropout(source: Tensors, node: fx.Node) -> Built:
    a = arguments(node)
    return nn.Dropout(a["p"]), (a["input"],), {}


BUILDERS = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _conv,
    "conv_transpose2d": _conv,
    "conv_transpose3d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "dropout": _dropout,
}


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, Iterable) else [value]
    return tuple(values * n) if len(values) == 1 else tuple(values)
