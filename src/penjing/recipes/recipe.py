"""A recipe: a tuple of steps, as Python or as YAML, whose order is checked before any compute starts."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from penjing import distill, prune, quantize
from penjing.errors import PenjingError, RecipeError
from penjing.records import reading
from penjing.steps.step import Step
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune

RECIPE_BYTES = 1 << 18  # of a recipe's text
NODES = 10_000  # entries of it
DIGITS = 400  # of a number

CATALOGUE: dict[str, type[Any]] = {
    "Finetune": Finetune,
    "distill.FewerLayers": distill.FewerLayers,
    "distill.Student": distill.Student,
    "prune.Blocks": prune.Blocks,
    "prune.Channels": prune.Channels,
    "prune.Iterative": prune.Iterative,
    "prune.Magnitude": prune.Magnitude,
    "prune.Wanda": prune.Wanda,
    "prune.SparseGPT": prune.SparseGPT,
    "prune.Movement": prune.Movement,
    "prune.Gradual": prune.Gradual,
    "prune.Regularized": prune.Regularized,
    "quantize.Static": quantize.Static,
    "quantize.Dynamic": quantize.Dynamic,
    "quantize.BiasCorrection": quantize.BiasCorrection,
    "quantize.AdaRound": quantize.AdaRound,
    "quantize.CrossLayerEqualization": quantize.CrossLayerEqualization,
    "quantize.SmoothQuant": quantize.SmoothQuant,
    "quantize.SplitOutliers": quantize.SplitOutliers,
    "quantize.QAT": quantize.QAT,
    "quantize.Rollback": quantize.Rollback,
    "quantize.Best": quantize.Best,
    "quantize.MixedPrecision": quantize.MixedPrecision,
}
"""Every step by the name that it has in a YAML recipe."""


SETTINGS: dict[str, type[Any]] = {
    "Clip": Clip,
    **{f"distill.{name}": way for name, way in vars(distill).items() if hasattr(way, "term")},
}
"""What is no step but a setting of one, by the name that it has in a YAML recipe."""


TEACHERS: dict[str, type[Any]] = {"distill.Stored": distill.Stored}
"""What stands as the teacher of a step, by the name that it has in a YAML recipe."""


_QUANTIZERS = (quantize.Static, quantize.Dynamic, quantize.Best, quantize.MixedPrecision)  # they make the plan
_PRUNERS = (
    prune.Blocks, prune.Channels, prune.Iterative, prune.Magnitude, prune.Wanda, prune.SparseGPT, prune.Movement,
    prune.Gradual, prune.Regularized,
)  # fmt: skip
_REPAIRS = (quantize.BiasCorrection, quantize.AdaRound, quantize.Rollback, quantize.QAT)  # of what a plan has rounded
_ROUNDERS = (quantize.BiasCorrection, quantize.AdaRound, quantize.Rollback)  # they compare with unrounded weights
# The same function with other weights.
_RESHAPERS = (quantize.CrossLayerEqualization, quantize.SmoothQuant, quantize.SplitOutliers)


@dataclass(frozen=True, init=False)
class Recipe:
    """Steps that run one after another.

    >>> Recipe(quantize.Static(weight_bits=8)).to_data()[0]["quantize.Static"]["weight_bits"]
    8
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step) -> None:
        object.__setattr__(self, "steps", tuple(steps))
        self.check()

    @classmethod
    def of(cls, steps: Recipe | Step | Sequence[Step]) -> Recipe:
        """A recipe of what may stand in its place: one step, or a list of steps.

        Raises:
            RecipeError: It is something else.
        """
        if isinstance(steps, Recipe):
            return steps
        if isinstance(steps, str | Path):
            raise RecipeError(
                "a recipe is given as a file's name",
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
        """Raise RecipeError when something is no step, or the order contradicts what the steps do."""
        quantized: Step | None = None
        repaired: Step | None = None
        for step in self.steps:
            if not callable(step) or not dataclasses.is_dataclass(step) or isinstance(step, type):
                raise RecipeError(
                    "a recipe holds something that is no step",
                    got=repr(step),
                    expected="instances such as pj.quantize.Static(weight_bits=8)",
                    remedy=f"known steps: {', '.join(CATALOGUE)}",
                )
            if isinstance(step, distill.Student) and step is not self.steps[0]:
                raise RecipeError(
                    "Student is not the first step of this recipe",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected="Student first: it is a new network, on which nothing that was done before is left",
                    remedy="put Student first",
                )
            if quantized is not None and isinstance(step, distill.FewerLayers):
                raise RecipeError(
                    "FewerLayers comes after quantization in this recipe",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected="FewerLayers before the step that quantizes: the plan's ranges belong to the values that "
                    "they were measured on",
                    remedy="put FewerLayers first",
                )
            if quantized is not None and isinstance(step, Finetune):
                raise RecipeError(
                    "fine-tuning comes after quantization in this recipe",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected="Finetune before Static: the ranges belong to the weights that they were measured on",
                    remedy="put Finetune first",
                )
            if quantized is not None and isinstance(step, _PRUNERS):
                raise RecipeError(
                    f"{type(step).__name__} comes after quantization in this recipe",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected=f"{type(step).__name__} before {type(quantized).__name__}: the plan's ranges and scales "
                    "belong to the channels that they were measured on",
                    remedy=f"put {type(step).__name__} first",
                )
            if quantized is not None and isinstance(step, _RESHAPERS):
                raise RecipeError(
                    f"{type(step).__name__} comes after quantization in this recipe",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected=f"{type(step).__name__} before {type(quantized).__name__}: it scales weights and "
                    "activations, and the plan's ranges belong to those that they were measured on",
                    remedy=f"put {type(step).__name__} first",
                )
            if isinstance(step, _REPAIRS) and quantized is None:
                raise RecipeError(
                    f"{type(step).__name__} has nothing to repair yet",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected=f"quantize.Static before quantize.{type(step).__name__}",
                )
            if isinstance(step, quantize.QAT) and isinstance(quantized, quantize.Dynamic):
                raise RecipeError(
                    "QAT trains ranges, and those of Dynamic are taken at run time",
                    got=" → ".join(type(s).__name__ for s in self.steps),
                    expected="quantize.Static before quantize.QAT",
                )
            if isinstance(step, _ROUNDERS):
                if repaired is not None:
                    raise RecipeError(
                        f"{type(step).__name__} comes after {type(repaired).__name__}, which has changed the weights",
                        got=" → ".join(type(s).__name__ for s in self.steps),
                        expected="one of BiasCorrection, AdaRound (which corrects biases too) and Rollback (which "
                        "repairs by itself): each compares with the weights that Static was given",
                    )
                repaired = step
            if isinstance(step, quantize.QAT | quantize.Best | quantize.MixedPrecision):
                repaired = step
            if isinstance(step, _QUANTIZERS):
                if quantized is not None:
                    raise RecipeError(
                        "a recipe quantizes twice",
                        got=f"{type(quantized).__name__} and {type(step).__name__}",
                        expected="one of them: the second would choose its scales for values that the first has "
                        "already rounded",
                        remedy="quantize.MixedPrecision gives layers other bits in one step",
                    )
                quantized = step

    @property
    def quantizes(self) -> bool:
        """Whether a step makes a plan."""
        return any(isinstance(step, _QUANTIZERS) for step in self.steps)

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data: [{"quantize.Static": {"weight_bits": 8, …}}, …]; what JSON can't hold is written as its repr."""
        data = [_data(step) for step in self.steps]
        # Without addresses, which are others in every process: a resumed run compares recipes.
        plain: list[dict[str, Any]] = json.loads(re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(data, default=repr)))
        return plain

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back.

        Raises:
            RecipeError: A setting is a function, a network or another object, which only Python can hold.
        """
        for step in self.steps:
            if found := next(_objects(step), None):
                raise RecipeError(
                    f"{type(step).__name__}({found[0]}=...) can't be written as YAML",
                    got=repr(found[1])[:200],
                    expected="settings of numbers, words, and steps",
                    remedy="leave it out and give it in Python: dataclasses.replace(step, ...)",
                )
        return str(yaml.dump(self.to_data(), Dumper=_Dumper, sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a YAML list of ``- quantize.Static: {weight_bits: 8}`` or ``- quantize.Static``.

        A setting that is a step stands as one: ``- prune.Movement: {finetune: {Finetune: {epochs: 3}}}``.

        Raises:
            RecipeError: Unknown steps or settings are named, with the nearest known ones.
        """
        try:
            if len(text) > RECIPE_BYTES:
                raise ValueError(f"{len(text):,} characters, and at most {RECIPE_BYTES:,} are read")
            _check_brackets(text)
            data = yaml.load(text, _Loader)
            reading.check(data)
        except (yaml.YAMLError, *reading.UNREADABLE) as error:
            got = " ".join(str(error).split())[:400] or type(error).__name__
            raise RecipeError("the recipe is not valid YAML", got=got) from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """The inverse of `to_data`."""
        if not isinstance(data, list):
            raise RecipeError(
                "a recipe is a list of steps", got=type(data).__name__, expected="- quantize.Static: {weight_bits: 8}"
            )
        return cls(*(_step(item) for item in data))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's numbers and truth values, where PyYAML's are those of 1.1: 1e-3 is a number, and `off` a word.

    A name that stands twice in a mapping is an error, not what was written last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict of different keys."""
        seen = set()
        for written, _ in node.value:
            key = self.construct_object(written, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice"[:200], node.start_mark)
            seen.add(key if isinstance(key, Hashable) else id(key))
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made

    def get_single_node(self) -> Any:
        """The document, if its aliases do not make much of little."""
        node = super().get_single_node()
        if node is not None and (count := _expanded(node, {})) > NODES:
            raise ValueError(f"{count:,} entries with all aliases written out, and at most {NODES:,} are read")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits."""
        if len(node.value) > DIGITS or abs(value := super().construct_yaml_int(node)) >= 2**63:
            raise ValueError(f"the number {node.value[:20]}…, which has more than 64 bits")
        return int(value)


def _expanded(node: Any, known: dict[int, int]) -> int:
    """How many entries a document has when every alias is written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = NODES + 1  # within itself: without end
    inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
    parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
    known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _check_brackets(text: str) -> None:
    """Raise ValueError where brackets nest deep: the reader's time grows with the square of that."""
    depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if depth > reading.DEPTH:
            raise ValueError(f"brackets nested deeper than {reading.DEPTH} levels")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what would be no text for either version of YAML."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag not in (_BOOL, _FLOAT)]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _reads_or_writes in (_Loader, _Dumper):
    _reads_or_writes.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )


def _data(step: Any) -> dict[str, Any]:
    """A step as plain data, and the steps within it too."""
    names = {cls: name for name, cls in (CATALOGUE | SETTINGS | TEACHERS).items()}

    def plain(value: Any) -> Any:
        if type(value) in names:
            return _data(value)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    fields = {f.name: plain(getattr(step, f.name)) for f in dataclasses.fields(step)}
    return {names.get(type(step), type(step).__name__): fields}


def _objects(step: Any) -> Iterator[tuple[str, Any]]:
    """Settings that YAML can't hold, by their names."""
    known = (*CATALOGUE.values(), *SETTINGS.values(), *TEACHERS.values())

    def within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, tuple | list):
            for one in value:
                yield from within(name, one)
        elif isinstance(value, Mapping):
            for one in value.values():
                yield from within(name, one)
        elif isinstance(value, known):
            yield from _objects(value)
        elif not isinstance(value, str | int | float | None):
            yield name, value

    for field in dataclasses.fields(step):
        yield from within(field.name, getattr(step, field.name))


_NESTED = {"distill": SETTINGS, "clip": SETTINGS, "finetune": CATALOGUE, "step": CATALOGUE, "teacher": TEACHERS}


def _setting(value: Any, key: str) -> Any:
    """A value of a recipe's YAML: lists become tuples, and what is written as a step or a setting becomes one."""
    if isinstance(value, list):
        return tuple(_setting(one, key) for one in value)
    word = isinstance(value, str) and (value in TEACHERS if key == "teacher" else value != "auto")  # else it is a path
    if key in _NESTED and (isinstance(value, dict) or word):
        return _step(value, _NESTED[key])
    every = CATALOGUE | SETTINGS
    if isinstance(value, dict) and len(value) == 1 and set(value) <= set(every):
        return _step(value, every)
    return value


def _step(item: Any, catalogue: Mapping[str, type[Any]] = CATALOGUE) -> Any:
    single = isinstance(item, dict) and len(item) == 1
    name, settings = next(iter(item.items())) if single else (item, None)
    if isinstance(item, dict) and len(item) > 1 and set(item) <= set(catalogue):
        raise RecipeError(
            "two steps stand in one entry of the recipe",
            got=", ".join(map(str, item)),
            expected="a dash before each of them",
        )
    if isinstance(name, str) and name in SETTINGS | TEACHERS and catalogue is CATALOGUE:
        raise RecipeError(
            f"{name} is no step",
            got=repr(item),
            expected="a setting of one, for example - Finetune: {distill: {distill.Logits: {}}}, "
            "{clip: {Clip: {}}}, or {teacher: {distill.Stored: {folder: answers}}}",
        )
    if not isinstance(name, str) or name not in catalogue:
        whole = f"distill.{name}" if f"distill.{name}" in catalogue else str(name)
        near = difflib.get_close_matches(whole, catalogue, n=1)
        fields = {f.name for f in dataclasses.fields(Finetune)}
        if not near and isinstance(item, dict) and "Finetune" in catalogue and set(item) <= fields:
            near = [f"{{Finetune: {json.dumps(item)}}}"]
        raise RecipeError(
            f"the recipe names a {'step' if catalogue is CATALOGUE else 'setting'} that does not exist",
            got=repr(item),
            expected=f"one of {', '.join(catalogue)}",
            remedy=f"did you mean {near[0]}?" if near else None,
        )
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise RecipeError(
            f"the settings of {name} are no mapping", got=repr(settings), expected=f"- {name}: {{key: value}}"
        )
    cls = catalogue[name]
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise RecipeError(
                f"{name} has no setting {key!r}",
                got=key,
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]}?" if near else None,
            )
    try:
        return cls(**{key: _setting(value, key) for key, value in settings.items()})
    except PenjingError:
        raise
    except Exception as error:  # what no setting is meant to be fails in many ways
        raise RecipeError(f"the settings of {name} can't be used", got=f"{settings}: {error}"[:1000]) from None
