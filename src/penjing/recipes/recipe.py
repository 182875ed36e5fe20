"""A recipe: a tuple of steps, in Python or YAML, whose order is checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import RecipeError
from penjing.recipes.catalogue import CATALOGUE, not_plain, plain_data, step_of
from penjing.records import reading, yaml_text
from penjing.steps.identity import identity
from penjing.steps.stages import PLAN, STAGES, WORK, Stage
from penjing.steps.step import Step


@dataclass(frozen=True, init=False)
class Recipe:
    """A sequence of compression steps.

    >>> from penjing import quantize
    >>> Recipe(quantize.Static(weight_bits=8)).to_data()[0]["quantize.Static"]["weight_bits"]
    8
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step) -> None:
        object.__setattr__(self, "steps", tuple(steps))
        self.check()

    @classmethod
    def of(cls, steps: Recipe | Step | Sequence[Step]) -> Recipe:
        """Convert to a recipe: a step, or a list of steps.

        Raises:
            RecipeError: The argument is neither.
        """
        if isinstance(steps, Recipe):
            return steps
        if isinstance(steps, str | Path):
            raise RecipeError(
                "a recipe was given as a file name",
                code="file-name",
                got=repr(str(steps)),
                expected="pj.Recipe(step, …), a step or a list of steps",
                remedy="pj.Recipe.from_yaml(pathlib.Path(...).read_text()) reads a file",
            )
        return cls(*steps) if isinstance(steps, Sequence) else cls(steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def check(self) -> None:
        """Raise RecipeError if something is not a step, or the order of the steps is invalid."""
        done: dict[str, Step] = {}
        for step in self.steps:
            stage = _stage(step)
            name, order = type(step).__name__, " → ".join(type(s).__name__ for s in self.steps)
            for fact, remedy in stage.needs.items():
                if fact not in done:
                    raise RecipeError(
                        f"{name} has nothing to work on yet in this recipe",
                        code="too-early",
                        got=order,
                        expected=remedy,
                    )
            for fact, remedy in stage.refuses.items():
                if fact in done:
                    before = type(done[fact]).__name__
                    raise RecipeError(
                        f"{name} can't come after {before} in this recipe", code="order", got=order, expected=remedy
                    )
            done |= dict.fromkeys((WORK, *stage.leaves), step)

    @property
    def quantizes(self) -> bool:
        """Whether a step creates a quantization plan."""
        return any(PLAN in STAGES[step.stage].leaves for step in self.steps)

    def to_data(self) -> list[dict[str, Any]]:
        """Return plain data: [{"quantize.Static": {"weight_bits": 8, …}}, …]; functions and objects by `identity`."""
        return [identity(plain_data(step)) for step in self.steps]

    def to_yaml(self) -> str:
        """Return YAML text that `from_yaml` reads back.

        Raises:
            RecipeError: A setting is a function, a network or another object that YAML can't represent.
        """
        for step in self.steps:
            if unsupported := next(not_plain(step), None):
                raise RecipeError(
                    f"{type(step).__name__}({unsupported[0]}=...) can't be written as YAML",
                    code="unwritable",
                    got=repr(unsupported[1])[:200],
                    expected="settings that are numbers, strings or steps",
                    remedy="leave it out and set it in Python: dataclasses.replace(step, ...)",
                )
        return yaml_text.dump(self.to_data())

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a YAML list of ``- quantize.Static: {weight_bits: 8}`` or ``- quantize.Static``.

        Steps nest: ``- prune.Movement: {finetune: {Finetune: {epochs: 3}}}``.

        Raises:
            RecipeError: A step or setting is unknown; the error names the nearest known ones.
        """
        try:
            data = yaml_text.load(text)
        except (yaml_text.YAMLError, *reading.UNREADABLE) as error:
            got = " ".join(str(error).split())[:400] or type(error).__name__
            raise RecipeError("the recipe is not valid YAML", code="unreadable", got=got) from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """Build a recipe from the output of `to_data`."""
        if not isinstance(data, list):
            raise RecipeError(
                "a recipe is a list of steps",
                code="not-a-list",
                got=type(data).__name__,
                expected="- quantize.Static: {weight_bits: 8}",
            )
        return cls(*(step_of(item) for item in data))


def _stage(step: Any) -> Stage:
    """Return the stage of a step.

    Raises:
        RecipeError: It is not a step, or lacks a declaration.
    """
    if not callable(step) or not dataclasses.is_dataclass(step) or isinstance(step, type):
        raise RecipeError(
            "a recipe contains something that is not a step",
            code="not-a-step",
            got=repr(step),
            expected="instances such as pj.quantize.Static(weight_bits=8)",
            remedy=f"known steps: {', '.join(CATALOGUE)}",
        )
    stage = getattr(step, "stage", None)
    undeclared = [name for name in ("per_runtime", "for_floats") if not isinstance(getattr(step, name, None), bool)]
    if stage not in STAGES or undeclared:
        raise RecipeError(
            f"{type(step).__name__} lacks declarations that a step needs",
            code="undeclared",
            got=f"stage {stage!r}" + "".join(f", no {name}" for name in undeclared),
            expected=f"class attributes stage (one of {', '.join(map(repr, STAGES))}), per_runtime and for_floats, "
            "each True or False",
        )
    return STAGES[stage]
