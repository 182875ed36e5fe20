"""Reading the graph of a captured network: kinds, names, inputs and results of its operators.

Every operator has a *site*, a name made of the source's own module paths that survives copies and edits:
``"layer1.0.conv1"`` for a layer, ``"layer1.0.conv1@1"`` for its second call, ``"layer1.0/add#0"`` for the first
addition in the forward of ``layer1.0``.
"""

from __future__ import annotations

import inspect
import operator
import re
from pathlib import PurePath
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.modes import in_eval_mode

# Names of operator kinds in plans, costs and records. Unlisted operators keep their ATen name.
_KINDS = {
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "conv_transpose1d": "conv_transpose",
    "conv_transpose2d": "conv_transpose",
    "conv_transpose3d": "conv_transpose",
    "hardtanh": "clip",
    "relu6": "clip",
    "clamp": "clip",
    "adaptive_avg_pool1d": "avg_pool",
    "adaptive_avg_pool2d": "avg_pool",
    "avg_pool1d": "avg_pool",
    "avg_pool2d": "avg_pool",
    "max_pool1d": "max_pool",
    "max_pool2d": "max_pool",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "flatten": "reshape",
    "unflatten": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "permute": "transpose",
    "t": "transpose",
    **dict.fromkeys(("numpy_T", "mT", "mH", "matrix_H", "adjoint"), "transpose"),
    **dict.fromkeys(("movedim", "moveaxis", "swapaxes", "swapdims"), "transpose"),
    "concat": "cat",
    "concatenate": "cat",
    "scaled_dot_product_attention": "attention",
    "dropout": "dropout",
    "alias": "identity",
    "contiguous": "identity",
    "clone": "identity",
    "detach_": "identity",
    "bmm": "matmul",
    "mm": "matmul",
    "upsample_nearest2d": "resize",
    "constant_pad_nd": "pad",
}
_MODULE_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv1d, "conv"),
    (nn.Conv2d, "conv"),
    (nn.Conv3d, "conv"),
    (nn.ConvTranspose1d, "conv_transpose"),
    (nn.ConvTranspose2d, "conv_transpose"),
    (nn.ConvTranspose3d, "conv_transpose"),
    (nn.Linear, "linear"),
    (nn.BatchNorm1d, "batch_norm"),
    (nn.BatchNorm2d, "batch_norm"),
    (nn.BatchNorm3d, "batch_norm"),
    (nn.LayerNorm, "layer_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.Embedding, "embedding"),
    (nn.Dropout, "dropout"),
)

OUTPUT = "/output"
"""The site of the network's output; no layer can have this name."""

RECURRENT = ("lstm", "gru")
"""Kinds of operator that are a stack of layers."""


def kind(network: fx.GraphModule, node: fx.Node) -> str:
    """Return the kind of a node: "conv", "linear", "add", "clip", "avg_pool", "reshape", …"""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        for cls, name in _MODULE_KINDS:
            if isinstance(module, cls):
                return name
        return type(module).__name__.lower()
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
    name = operator_name(node)
    if name == "mean" and _is_spatial_mean(node):
        return "avg_pool"
    return _KINDS.get(name, name)


def operator_name(node: fx.Node) -> str:
    """Return the ATen name of a functional node, without overload and without the underscore of in-place forms."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__).rstrip("_")
    return getattr(target, "__name__", str(target))


def site(node: fx.Node) -> str:
    """Return the stable name of an operator, see the module's docstring; an input has its own name."""
    return OUTPUT if node.op == "output" else str(node.meta.get("site", node.name))


def line(node: fx.Node) -> str:
    """Return the line of the user's code that a node comes from, in brackets after a space; empty if unknown.

    For example ``" (net.py:12 in forward: x = self.fc(x))"``.
    """
    frames = re.findall(r'File "(.+)", line (\d+), in (.+)\n *(.*)', str(node.meta.get("stack_trace") or ""))
    frames = [frame for frame in frames if not frame[0].startswith("<") and "site-packages" not in frame[0]]
    if not frames:
        return ""
    file, number, function, text = frames[-1]
    return f" ({PurePath(file).name}:{number} in {function}: {text.strip()})"


def layer_site(name: str, layer: int) -> str:
    """Return the site of a layer of a recurrent stack; the first one has the stack's."""
    return f"{name}/layer{layer}" if layer else name


def sites(network: fx.GraphModule) -> dict[str, fx.Node]:
    """Return every operator of the network by its site, in execution order."""
    return {site(n): n for n in network.graph.nodes if n.op in ("call_module", "call_function")}


def is_tensor(node: Any) -> bool:
    """Whether a node returns tensors, unlike sizes (`sym_size`) and arithmetic on them."""
    if not isinstance(node, fx.Node):
        return False
    if node.op != "call_function":
        return node.op != "output"
    if node.target is operator.getitem:  # one of several results
        return is_tensor(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and operator_name(node) not in ("sym_size", "item")


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an operator reads, in the order of its ports, excluding a layer's own parameters."""
    inputs: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: inputs.append(n) if is_tensor(n) else None)
    return inputs


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen node by the names of its schema, with defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def shapes(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return node name → fake tensor (shape and dtype, no data) of a forward pass in eval mode, excluding tuples.

    A size that depends on values (`nonzero`, a boolean mask) is that of this call.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    values: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                values[n.name] = result
            return result

    # In eval mode, because in training mode batch norm increments its real batch counter.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with in_eval_mode(network), mode, torch.no_grad():
            fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, call)
            Recorder(network).run(*flat_inputs(network, fake))
    except (DataDependentOutputException, DynamicOutputShapeException):
        values.clear()
        with in_eval_mode(network), torch.no_grad():
            Recorder(network).run(*flat_inputs(network, call))
        return {name: mode.from_tensor(value) for name, value in values.items()}
    return values


def flat_inputs(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """Return the inputs of a call in the order of the graph's placeholders."""
    codegen = network.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        return list(network.graph.process_inputs(*_ordered_call(network, call)))
    return [*call[0], *call[1].values()]


def _ordered_call(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    args, kwargs = call
    if not kwargs:
        return list(args)
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    return [*bound.args, *bound.kwargs.values()]


def compute(network: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Execute a node on these arguments; placeholders and the output compute nothing."""
    if node.op == "call_module":
        return network.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "get_attr":
        path, _, leaf = str(node.target).rpartition(".")
        return getattr(network.get_submodule(path), leaf)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_spatial_mean(node: fx.Node) -> bool:
    a = arguments(node)
    dims = a.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
