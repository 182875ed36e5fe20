"""The compressed module for a custom training pipeline, and the way back from it to a draft.

What `apply` returns carries the draft that it was made from. Training changes tensors alone, so that draft with the
module's tensors in the place of its own is what a runtime's file is made from.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from penjing import measure, runtimes
from penjing.errors import SourceError
from penjing.network.naming import free_name
from penjing.pipeline import questions
from penjing.pipeline import request as requests
from penjing.pipeline.repeatable import capture_repeatable
from penjing.randomness import seed_everything
from penjing.recipes.recipe import Recipe
from penjing.sources.source import in_single_precision, open_source, with_declared_axes
from penjing.steps.draft import Draft
from penjing.steps.plan import Entry, Plan
from penjing.steps.step import Context, Step
from penjing.storage import checkpoint
from penjing.surgery import insert, quantizer_calls
from penjing.surgery.quantizers import SMALLEST
from penjing.tasks.keywords import suggesting
from penjing.tasks.opening import as_task
from penjing.tasks.task import Task
from penjing.tasks.undisturbed import same_process

_META = "applied"


@dataclass(frozen=True)
class Applied:
    """How a module was made: its source, recipe and draft.

    Attributes:
        name: Of the source.
        draft: Before fake quantizers were put in; its parameters are the module's own.
        recipe: The steps as plain data.
        runtime: Whose integers were planned; None: those that every runtime has.
    """

    name: str
    draft: Draft
    recipe: list[dict[str, Any]]
    runtime: str | None = None

    def planned_for_another(self, names: Sequence[str]) -> str | None:
        """A warning where its integers are those of one runtime and files are made for others too."""
        others = [name for name in names if name != self.runtime]
        if self.runtime is None or not others or not self.draft.plan:
            return None
        return (
            f"the integers were planned for {self.runtime}, and {' and '.join(others)} may compute others faster or "
            f"not at all: pj.apply(..., runtime={others[0]!r}), or runtime=None for what every runtime has"
        )


@suggesting
@same_process()
def apply(
    recipe: Recipe | Step | Sequence[Step],
    model: nn.Module | str | Path,
    task: Task | str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    runtime: str | None = None,
    learn_ranges: bool = False,
) -> fx.GraphModule:
    """Only the compressed module, for a custom training pipeline: nothing is measured. `deliver` is the way back.

    Where the recipe quantizes, the module holds fake quantizers. Gradients pass through them, and none passes where a
    value lies outside a range. Parameters have the source's names; where a layer's tensors had to take others (a fused
    attention projection), ``module.meta["renamed"]`` maps the module's name to the source's.

    Args:
        recipe: Steps to take, or one step.
        model: The network or SOURCE, or what an earlier `apply` returned without quantizers.
        task: The data that the steps need.
        seed: Same seed and data: same module.
        device: Where training steps run.
        runtime: Whose integers are planned; None plans what every runtime has.
        learn_ranges: The scales of fake quantizers are parameters and learn too (Esser et al., ICLR 2020).

    Raises:
        PenjingError: With what, got, expected and remedy.
    """
    recipe, task = Recipe.of(recipe), as_task(task)
    refuse_quantized(model)
    requests.check_device(device)
    doubt = questions.check_direction(task)
    for text in filter(None, (requests.undropped(recipe, model), None if doubt is None else doubt.text)):
        warnings.warn(text, stacklevel=4)  # the decorators are between
    seed_everything(seed)
    before = drafted(model) if isinstance(model, nn.Module) and _META in _meta(model) else None
    source = open_source(model)
    source, task, told = in_single_precision(source, with_declared_axes(source, task))
    if told:
        warnings.warn(told, stacklevel=4)
    name = source.name if before is None else before.name
    draft = Draft(capture_repeatable(source, task)) if before is None else before.draft
    recipe = requests.with_teachers(recipe, task)
    requests.check_recipe(recipe, draft.network, task, seed)
    planned = None
    if runtime is not None:
        planned = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    context = Context(task=task, seed=seed, device=device, capabilities=planned, source=draft.network)
    for step in recipe:
        draft = step(draft, context)
    steps = ([] if before is None else before.recipe) + recipe.to_data()
    return _carrying(Applied(name, draft, steps, runtime), learn_ranges)


def _carrying(applied: Applied, learn_ranges: bool) -> fx.GraphModule:
    draft = applied.draft.copy()
    module = insert(draft.network, draft.plan, trains=True, learns=learn_ranges) if draft.plan else draft.copy().network
    for name, part in draft.network.named_modules(remove_duplicate=False):
        part._parameters.update({role: module.get_submodule(name)._parameters[role] for role in part._parameters})
    module.meta[_META] = replace(applied, draft=draft)
    return module


def drafted(module: nn.Module | Draft) -> Applied:
    """What led to a module that `apply` returned, with the tensors and ranges that it has now.

    Raises:
        SourceError: It does not come from `apply`, or what it was trained to be can't be read back.
    """
    if isinstance(module, Draft):
        return Applied("Network", module.copy(), [])
    module = _unwrapped(module)
    applied = _meta(module).get(_META)
    if not isinstance(applied, Applied):
        raise _foreign(module)
    draft = applied.draft.copy()
    network = draft.network.cpu()
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    holder = free_name(network, "quantizers") + "."  # as `insert` chose it
    tensors = {name: tensor for name, tensor in state.items() if not (draft.plan and name.startswith(holder))}
    if problem := checkpoint.difference(tensors, network.state_dict()):
        raise SourceError(
            "the module no longer has the tensors that pj.apply gave it",
            code="other-tensors",
            got=problem,
            expected="training that changes the values of tensors, and neither their names nor their shapes",
            remedy="remove parametrizations and hooks that rename tensors; change the structure before pj.apply",
        )
    network.load_state_dict(tensors)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SourceError(
                "the trained module holds numbers that are not finite",
                code="not-finite",
                got=name,
                expected="finite weights",
                remedy="the training diverged: a smaller learning rate, or gradients kept within a norm",
            )
    entries = _ranges(module, draft.plan) if isinstance(module, fx.GraphModule) and draft.plan else draft.plan.entries
    return replace(applied, draft=replace(draft, network=network.eval(), plan=replace(draft.plan, entries=entries)))


def _ranges(module: fx.GraphModule, plan: Plan) -> dict[str, Entry]:
    """The plan's entries with the numbers of the module's quantizers."""
    entries = dict(plan.entries)
    for edge, node in quantizer_calls(module, plan).items():
        quantizer: Any = module.get_submodule(str(node.target))
        scale, zero = quantizer.scale.detach().cpu().float(), quantizer.zero_point.cpu()
        scale = scale.abs().clamp(min=SMALLEST) if quantizer.scale.requires_grad else scale
        if not (scale > 0).all() or not scale.isfinite().all():
            raise SourceError(
                "a fake quantizer has a scale that is not a positive number",
                code="scale",
                got=f"{edge}: {scale.flatten()[:3].tolist()}",
                expected="finite scales above 0",
                remedy="the training of the ranges diverged: a smaller learning rate for them",
            )
        entries[edge] = replace(entries[edge], scale=tuple(scale.tolist()), zero_point=tuple(zero.tolist()))
    return entries


def refuse_quantized(model: object) -> None:
    """Raise SourceError where a network holds fake quantizers of `apply`: another plan would round it twice."""
    applied = _meta(model).get(_META)
    if isinstance(applied, Applied) and applied.draft.plan:
        raise SourceError(
            "the network holds the fake quantizers of pj.apply",
            code="applied",
            got=f"{len(applied.draft.plan.entries)} edges that are integers already",
            expected="a network in floating point",
            remedy="pj.deliver(module, task) exports it with the integers that it was trained for",
        )


def _meta(model: object) -> dict[str, Any]:
    model = _unwrapped(model) if isinstance(model, nn.Module) else model
    return model.meta if isinstance(model, fx.GraphModule) else {}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module within `DataParallel`, `DistributedDataParallel` and `torch.compile`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _foreign(module: nn.Module) -> SourceError:
    inner = [name for name, part in module.named_modules() if name and _META in getattr(part, "meta", {})]
    return SourceError(
        "the module does not come from pj.apply",
        code="not-applied",
        got=type(module).__name__ + (f", which holds one in .{inner[0]}" if inner else ""),
        expected="what pj.apply returned, trained or not, or a copy.deepcopy of it",
        remedy=f"give module.{inner[0]}"
        if inner
        else "pj.compress takes any other network; a state dict is loaded into a fresh result of pj.apply",
    )


__all__ = ["Applied", "apply", "drafted", "refuse_quantized"]
