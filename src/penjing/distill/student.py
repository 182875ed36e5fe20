"""A student with a different architecture: a built-in network replaces the source, which becomes its teacher.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from penjing.errors import PenjingError, RecipeError, TaskError
from penjing.modes import in_eval_mode
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.step import Context
from penjing.surgery import build, building
from penjing.tasks.outputs import first_output, flatten_outputs
from penjing.tasks.task import Call


@dataclass(frozen=True, kw_only=True)
class Student:
    """Replace the source by a new network with random weights, to be trained by the steps that follow.

    It comes first in a recipe: ``Recipe(Student(architecture="mobilenet_v2"), Finetune(epochs=30))``.

    Attributes:
        architecture: One of `penjing.architectures.names()`.
        settings: Arguments of its factory. By default, ``classes`` is taken from the source's output and
            ``in_channels`` from the example.
    """

    stage: ClassVar[str] = "replace"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with the new network.

        Raises:
            RecipeError: The architecture can't be built, or does not accept these inputs.
            TaskError: Its outputs differ in shape from those of the source.
        """
        call = context.task.call()
        expected = _outputs(draft.network, call)
        try:
            edit, network = self._built(call, expected, context)
        except (PenjingError, TypeError) as error:
            raise RecipeError(
                f"the student {self.architecture} can't be built",
                code="unbuildable",
                got=" ".join(str(error).split()),
                expected="an architecture for the inputs of the source",
                remedy="Student(architecture=..., settings={...}) passes settings on",
            ) from error
        produced = _outputs(network, call)
        if produced != expected:
            raise TaskError(
                "student and teacher have different outputs",
                code="outputs",
                got=f"{self.architecture}: {produced}, the source: {expected}",
                expected="outputs of the same shapes",
                remedy=f"for example Student(..., settings={{'classes': {expected[0][-1]}}})",
            )
        return replace(draft, network=network, plan=Plan(), edits=(edit,))

    def _built(
        self, call: Call, expected: list[tuple[int, ...]], context: Context
    ) -> tuple[dict[str, Any], fx.GraphModule]:
        """The network, built with the first combination of inferred settings that the factory accepts."""
        args, kwargs = call
        first = next(iter((*args, *kwargs.values())))
        read = {"classes": expected[0][1] if len(expected[0]) > 1 else 1}
        if first.dim() == 4:
            read["in_channels"] = first.shape[1]
        failures: list[PenjingError] = []
        for more in (read, {"classes": read["classes"]}, {}):
            settings = {**more, **self.settings}
            edit = building(self.architecture, settings, call, context.task.dynamic)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed % 2**63)
                try:
                    return edit, build(edit)
                except PenjingError as error:
                    failures.append(error)
        # Report the factory's error about given settings, not that it has no argument `in_channels`.
        raise next((e for e in failures if "unexpected keyword" not in str(e)), failures[0])


def _outputs(network: fx.GraphModule, call: Call) -> list[tuple[int, ...]]:
    args, kwargs = call
    with torch.no_grad(), in_eval_mode(network):
        produced = network(*args, **kwargs)
    first_output(produced)
    return [tuple(x.shape) for x in flatten_outputs(produced)[0]]
