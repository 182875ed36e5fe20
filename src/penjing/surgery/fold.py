"""Folding batch norms into the convolution or linear layer before them. Jacob et al., CVPR 2018, section 3.2."""

from __future__ import annotations

import torch
from torch import fx, nn

from penjing.network.graph import kind
from penjing.steps.draft import Edit


def fold_batch_norms(network: fx.GraphModule) -> tuple[Edit, ...]:
    """Fold, in place, every batch norm that is the only reader of a layer; returns the edits."""
    calls: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    edits: list[Edit] = []
    for node in list(network.graph.nodes):
        if kind(network, node) != "batch_norm" or node.op != "call_module":
            continue
        before = node.args[0]
        foldable = (
            isinstance(before, fx.Node)
            and kind(network, before) in ("conv", "linear", "conv_transpose")
            and before.op == "call_module"
            and len(before.users) == 1
            and calls[str(before.target)] == 1
            and calls[str(node.target)] == 1
            and _owns_weights(network, before)
        )
        if foldable and _norm_axis_fits(network, before):
            layer, norm = str(before.target), str(node.target)
            fold_batch_norm(network, layer, norm)
            edits.append({"edit": "fold", "layer": layer, "norm": norm})
    return tuple(edits)


def _owns_weights(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether no other layer, and no functional operator, uses the same tensors (tied weights)."""
    mine = {id(p) for p in network.get_submodule(str(node.target)).parameters()}
    names = [name for name, p in network.named_parameters(remove_duplicate=False) if id(p) in mine]
    read = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
    return len(names) == len(mine) and not read & set(names)


def _norm_axis_fits(network: fx.GraphModule, node: fx.Node) -> bool:
    # A linear layer's features are the last axis, a batch norm's the second: the same only in 2-D.
    return kind(network, node) != "linear" or node.meta.get("rank") == 2


def fold_batch_norm(network: fx.GraphModule, layer: str, norm: str) -> None:
    """Fold `norm` into `layer` in place: w ← w·γ/√(σ²+ε), b ← (b−μ)·γ/√(σ²+ε) + β, computed in float64."""
    module, bn = network.get_submodule(layer), network.get_submodule(norm)
    weight = module.weight
    if not isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) or not isinstance(weight, nn.Parameter):
        raise TypeError(f"{norm} is a {type(bn).__name__}, {layer} a {type(module).__name__}")
    assert bn.running_mean is not None and bn.running_var is not None
    with torch.no_grad():
        gamma = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight
        beta = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
        factor = gamma.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        bias = module.bias.double() if isinstance(module.bias, torch.Tensor) else torch.zeros_like(factor)
        folded_bias = (bias - bn.running_mean.double()) * factor + beta.double()
        folded = weight.double() * _along_output(module, weight, factor)
        weight.copy_(folded.to(weight.dtype))
        if isinstance(module.bias, nn.Parameter):
            module.bias.copy_(folded_bias.to(weight.dtype))
        else:
            module.bias = nn.Parameter(folded_bias.to(weight.dtype))
    node = next(n for n in network.graph.nodes if n.op == "call_module" and n.target == norm)
    node.replace_all_uses_with(node.args[0])
    network.graph.erase_node(node)
    network.delete_submodule(norm)
    network.recompile()


def _along_output(module: nn.Module, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`factor` (out,) in a shape that broadcasts over the weight's output channels."""
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return factor.reshape(-1, *[1] * (weight.dim() - 1))
    # (in, out/groups, …): the output channels of group g belong to the input channels of group g.
    per_group = factor.reshape(module.groups, 1, -1)
    spread = per_group.expand(module.groups, weight.shape[0] // module.groups, -1)
    return spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))
