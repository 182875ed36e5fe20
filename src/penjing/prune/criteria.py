"""How much a channel matters: one score for every unit of a coupled group, from all of its weights together.

| name | a unit's score | source |
|---|---|---|
| ``l1``, ``l2`` | the norm of all its weights | Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 |
| ``bn_scale`` | its batch norms' factors | Liu et al., "Network Slimming", ICCV 2017 |
| ``geometric_median`` | how far its filters are from all others | He et al., "FPGM", CVPR 2019 |
| ``activation`` | the mean size of what is read from it | Hu et al., "Network Trimming", 2016 |
| ``gradient`` | the norm of the loss' gradient by its weights | |
| ``taylor`` | the squared change of the loss, to first order | Molchanov et al., "Importance Estimation", CVPR 2019 |
| ``jacobian`` | the squared change of the outputs, to first order; needs no labels | |
| ``random`` | a random number: what any criterion has to beat | |

The change of a loss is taken where the unit is *read*: Σ w·∂loss/∂w over the weights that multiply it is the derivative
by a factor on the unit, after whatever function lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.analyze.coupling import Coupling, Group, Member
from penjing.errors import TaskError
from penjing.network.graph import in_eval_mode
from penjing.steps.step import Context
from penjing.tasks.call import as_call, to_tensors
from penjing.tasks.outputs import to_tensor
from penjing.tasks.task import calibration_calls

CRITERIA = ("l1", "l2", "bn_scale", "geometric_median", "activation", "gradient", "taylor", "jacobian", "random")

FIRST_ORDER = ("taylor", "jacobian")
"""Those whose scores are changes of one and the same loss: comparable between groups as they are."""

Scores = dict[str, np.ndarray]


def score(
    criterion: str, network: fx.GraphModule, coupling: Coupling, context: Context, batches: int, seed: int
) -> Scores:
    """Group → score of every unit (units,), each at least 0; larger matters more.

    Args:
        criterion: One of `CRITERIA`.
        network: A raised network; it stays as it is.
        coupling: Its groups.
        context: For its data: labelled for "gradient" and "taylor", calibration for "activation" and "jacobian".
        batches: How many batches of it are read.
        seed: Of the random directions and numbers.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    generator = torch.Generator().manual_seed(seed)
    if criterion in ("gradient", "taylor", "jacobian"):
        return _by_gradient(criterion, network, coupling, context, batches, generator)
    if criterion == "activation":
        return _by_activation(network, coupling, context, batches)
    return {name: _by_weight(criterion, group, tensors, generator) for name, group in coupling.groups.items()}


def rows(member: Member, tensor: torch.Tensor) -> torch.Tensor:
    """(positions, everything else): what one member holds, position by position."""
    picked = tensor.detach().movedim(member.axis, 0)[torch.from_numpy(member.positions)]
    return picked.reshape(len(picked), -1).double()


def per_unit(member: Member, values: torch.Tensor, units: int) -> torch.Tensor:
    """Sums over the positions of every unit: (positions,) to (units,)."""
    return torch.zeros(units, dtype=torch.float64).index_add(0, torch.from_numpy(member.units), values)


def _by_weight(
    criterion: str, group: Group, tensors: dict[str, torch.Tensor], generator: torch.Generator
) -> np.ndarray:
    if criterion == "random":
        return torch.rand(group.units, generator=generator).double().numpy()
    weights = [m for m in group.members if tensors[m.tensor].dim() > 1]
    if criterion == "bn_scale":
        scales = [m for m in group.members if m.role == "one of every channel" and m.tensor.endswith("weight")]
        if scales:
            each = [per_unit(m, rows(m, tensors[m.tensor]).abs().sum(1), group.units) for m in scales]
            return torch.stack(each).sum(0).numpy()
        criterion = "l2"  # no norm scales this group
    if criterion == "geometric_median":
        made = [m for m in weights if m.role == "its outputs"] or weights[:1] or group.members[:1]
        filters = torch.cat([rows(m, tensors[m.tensor]).reshape(group.units, -1) for m in made], dim=1)
        return torch.cdist(filters, filters).sum(1).numpy()
    power = 1 if criterion == "l1" else 2
    held = weights or group.members
    each = [per_unit(m, rows(m, tensors[m.tensor]).abs().pow(power).sum(1), group.units) for m in held]
    return torch.stack(each).sum(0).pow(1 / power).numpy()


def _readers(group: Group) -> tuple[Member, ...]:
    """The members whose weights multiply the units; where there are none, those that make them."""
    reads = tuple(m for m in group.members if m.role == "its inputs")
    return reads or tuple(m for m in group.members if m.role == "its outputs") or group.members


def _by_gradient(
    criterion: str,
    network: fx.GraphModule,
    coupling: Coupling,
    context: Context,
    batches: int,
    generator: torch.Generator,
) -> Scores:
    found = {name: torch.zeros(group.units, dtype=torch.float64) for name, group in coupling.groups.items()}
    tensors = dict(network.named_parameters())
    losses = (
        _directions(network, context, batches, generator)
        if criterion == "jacobian"
        else _losses(network, context, batches)
    )
    with in_eval_mode(network), _all_trainable(network):
        for loss in losses:
            network.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, group in coupling.groups.items():
                change = torch.zeros(group.units, dtype=torch.float64)
                for member in _readers(group):
                    tensor = tensors.get(member.tensor)
                    if tensor is None or tensor.grad is None:
                        continue
                    gradient = rows(member, tensor.grad)
                    term = gradient if criterion == "gradient" else rows(member, tensor)
                    change += per_unit(member, (gradient * term).sum(1), group.units)
                found[name] += change if criterion == "gradient" else change.pow(2)
    network.zero_grad(set_to_none=True)
    return {name: value.numpy() for name, value in found.items()}


def _losses(network: fx.GraphModule, context: Context, batches: int) -> Iterator[torch.Tensor]:
    task = context.task
    if task.train is None or task.loss is None:
        raise TaskError(
            "this criterion needs labelled data and a loss",
            got=f"train is {'missing' if task.train is None else 'given'}, loss is "
            f"{'missing' if task.loss is None else 'given'}",
            expected="Task(train=loader, loss=torch.nn.functional.cross_entropy)",
            remedy='criterion="jacobian" needs calibration data alone, "l2" none at all',
        )
    loss = task.loss
    for _, (inputs, target) in zip(range(batches), task.train, strict=False):
        args, kwargs = to_tensors(as_call(inputs))
        truth = pytree.tree_map_only(np.ndarray, to_tensor, target)
        yield loss(network(*args, **kwargs), truth)


def _directions(
    network: fx.GraphModule, context: Context, batches: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Outputs of every sample along random directions: the mean square of the derivatives is that of all outputs."""

    for args, kwargs in calibration_calls(context.task, limit=batches):
        outputs = [x for x in pytree.tree_leaves(network(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        terms = [
            (x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1)).sum() / x.numel() ** 0.5
            for x in outputs
            if x.is_floating_point()
        ]
        yield torch.stack(terms).sum()


@contextmanager
def _all_trainable(network: nn.Module) -> Iterator[None]:
    before = {p: p.requires_grad for p in network.parameters()}
    for p in before:
        p.requires_grad_(p.is_floating_point())
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)


def _by_activation(network: fx.GraphModule, coupling: Coupling, context: Context, batches: int) -> Scores:
    readers = [m for group in coupling.groups.values() for m in _readers(group) if m.role == "its inputs"]
    reads = dict.fromkeys(m.tensor.rpartition(".")[0] for m in readers)
    sums: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        layer: Any = network.get_submodule(name)
        axis = 1 if hasattr(layer, "kernel_size") else -1

        def hook(_: nn.Module, inputs: Any) -> None:
            sizes = inputs[0].detach().abs().double().movedim(axis, 0).flatten(1).mean(1)
            sums[name] = sums.get(name, torch.zeros_like(sizes)) + sizes

        return hook

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(note(name))
        for name in reads
        if isinstance(network.get_submodule(name), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    try:
        with in_eval_mode(network), torch.no_grad():
            for args, kwargs in calibration_calls(context.task, limit=batches):
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _mean_size(group, sums) for name, group in coupling.groups.items()}


def _mean_size(group: Group, sums: dict[str, torch.Tensor]) -> np.ndarray:
    found = torch.zeros(group.units, dtype=torch.float64)
    for member in _readers(group):
        sizes = sums.get(member.tensor.rpartition(".")[0])
        if sizes is not None and member.positions.max() < len(sizes):
            found += per_unit(member, sizes[torch.from_numpy(member.positions)], group.units)
    return found.numpy()


def relative(scores: Scores) -> Scores:
    """Scores in units of each group's mean, which makes groups of different weights comparable."""
    return {name: value / max(float(value.mean()), 1e-300) for name, value in scores.items()}


__all__ = ["CRITERIA", "FIRST_ORDER", "Scores", "per_unit", "relative", "rows", "score"]
