"""The catalogue of steps, settings and teachers by their names in a recipe, and their conversion to plain data."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from penjing import decompose, distill, prune, quantize, share
from penjing.errors import PenjingError, RecipeError
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune

CATALOGUE: dict[str, type[Any]] = {
    "Finetune": Finetune,
    "decompose.LowRank": decompose.LowRank,
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
    "share.Codebook": share.Codebook,
    "share.Grid": share.Grid,
    "share.Layers": share.Layers,
    "share.ProductCodebook": share.ProductCodebook,
    "quantize.Binary": quantize.Binary,
    "quantize.Ternary": quantize.Ternary,
    "quantize.Static": quantize.Static,
    "quantize.Dynamic": quantize.Dynamic,
    "quantize.BiasCorrection": quantize.BiasCorrection,
    "quantize.CoordinateRounding": quantize.CoordinateRounding,
    "quantize.CrossLayerEqualization": quantize.CrossLayerEqualization,
    "quantize.SmoothQuant": quantize.SmoothQuant,
    "quantize.SplitOutliers": quantize.SplitOutliers,
    "quantize.WeightClipping": quantize.WeightClipping,
    "quantize.QAT": quantize.QAT,
    "quantize.Rollback": quantize.Rollback,
    "quantize.Best": quantize.Best,
    "quantize.MixedPrecision": quantize.MixedPrecision,
}
"""Every step by its name in a YAML recipe."""


SETTINGS: dict[str, type[Any]] = {
    "Clip": Clip,
    **{f"distill.{name}": way for name, way in vars(distill).items() if hasattr(way, "loss")},
}
"""Objects that are settings of a step, by their names in a YAML recipe."""


TEACHERS: dict[str, type[Any]] = {"distill.TeacherCache": distill.TeacherCache}
"""Objects that are teachers, by their names in a YAML recipe."""


def plain_data(step: Any) -> dict[str, Any]:
    """Convert a step to plain data, including nested steps."""
    names = {cls: name for name, cls in (CATALOGUE | SETTINGS | TEACHERS).items()}

    def plain(value: Any) -> Any:
        if type(value) in names:
            return plain_data(value)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    fields = {f.name: plain(getattr(step, f.name)) for f in dataclasses.fields(step)}
    return {names.get(type(step), type(step).__name__): fields}


def not_plain(step: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings that YAML can't represent, with their names."""
    known = (*CATALOGUE.values(), *SETTINGS.values(), *TEACHERS.values())

    def within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, tuple | list):
            for one in value:
                yield from within(name, one)
        elif isinstance(value, Mapping):
            for one in value.values():
                yield from within(name, one)
        elif isinstance(value, known):
            yield from not_plain(value)
        elif not isinstance(value, str | int | float | None):
            yield name, value

    for field in dataclasses.fields(step):
        yield from within(field.name, getattr(step, field.name))


_NESTED = {"distill": SETTINGS, "clip": SETTINGS, "finetune": CATALOGUE, "step": CATALOGUE, "teacher": TEACHERS}


def _setting(value: Any, key: str) -> Any:
    """A value from a recipe's YAML: lists become tuples, and nested steps and settings become objects."""
    if isinstance(value, list):
        return tuple(_setting(one, key) for one in value)
    names_object = isinstance(value, str) and (value in TEACHERS if key == "teacher" else value != "auto")  # or a path
    if key in _NESTED and (isinstance(value, dict) or names_object):
        return step_of(value, _NESTED[key])
    every = CATALOGUE | SETTINGS
    if isinstance(value, dict) and len(value) == 1 and set(value) <= set(every):
        return step_of(value, every)
    return value


def step_of(item: Any, catalogue: Mapping[str, type[Any]] = CATALOGUE) -> Any:
    """Build the step (or, from another catalogue, the setting) that an entry of a recipe's plain data describes.

    Raises:
        RecipeError: A name or setting is unknown; the error names the nearest known ones.
    """
    single = isinstance(item, dict) and len(item) == 1
    name, settings = next(iter(item.items())) if single else (item, None)
    if isinstance(item, dict) and len(item) > 1 and set(item) <= set(catalogue):
        raise RecipeError(
            "one entry of the recipe contains two steps",
            code="two-steps",
            got=", ".join(map(str, item)),
            expected="a dash before each of them",
        )
    _check_name(name, item, catalogue)
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise RecipeError(
            f"the settings of {name} are not a mapping",
            code="not-a-mapping",
            got=repr(settings),
            expected=f"- {name}: {{key: value}}",
        )
    cls = catalogue[name]
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise RecipeError(
                f"{name} has no setting {key!r}",
                code="unknown-setting",
                got=key,
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]}?" if near else None,
            )
    try:
        return cls(**{key: _setting(value, key) for key, value in settings.items()})
    except PenjingError:
        raise
    except Exception as error:  # invalid settings fail in many ways
        raise RecipeError(
            f"the settings of {name} can't be used", code="settings", got=f"{settings}: {error}"[:1000]
        ) from None


def _check_name(name: Any, item: Any, catalogue: Mapping[str, type[Any]]) -> None:
    """Raise RecipeError unless `name`, that of the entry `item`, is in the catalogue."""
    if isinstance(name, str) and name in SETTINGS | TEACHERS and catalogue is CATALOGUE:
        raise RecipeError(
            f"{name} is not a step",
            code="not-a-step",
            got=repr(item),
            expected="a setting of one, for example - Finetune: {distill: {distill.Logits: {}}}, "
            "{clip: {Clip: {}}}, or {teacher: {distill.TeacherCache: {folder: answers}}}",
        )
    if not isinstance(name, str) or name not in catalogue:
        whole = f"distill.{name}" if f"distill.{name}" in catalogue else str(name)
        near = difflib.get_close_matches(whole, catalogue, n=1)
        fields = {f.name for f in dataclasses.fields(Finetune)}
        if not near and isinstance(item, dict) and "Finetune" in catalogue and set(item) <= fields:
            near = [f"{{Finetune: {json.dumps(item)}}}"]
        raise RecipeError(
            f"the recipe names a {'step' if catalogue is CATALOGUE else 'setting'} that does not exist",
            code="unknown-step" if catalogue is CATALOGUE else "unknown-setting",
            got=repr(item),
            expected=f"one of {', '.join(catalogue)}",
            remedy=f"did you mean {near[0]}?" if near else None,
        )
