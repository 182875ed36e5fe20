"""What all ways to learn from a teacher check of their settings."""

from __future__ import annotations

import math

from penjing.errors import RecipeError


def check(term: object, **values: float) -> None:
    """Refuse a temperature that is not above 0 and weights below 0.

    Raises:
        RecipeError: A setting makes no sense.
    """
    for name, value in values.items():
        above = name == "temperature"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value < math.inf if above else 0 <= value < math.inf):
            raise RecipeError(
                f"{type(term).__name__}({name}=...) can't be used",
                got=repr(value),
                expected="a number above 0" if above else "a number of at least 0",
                remedy=f"{getattr(type(term), name):g} where nothing is said",
            )


def paired(term: object, features: object, least: int = 1) -> tuple[tuple[str, str], ...]:
    """Features as (student's, teacher's) names; a name alone stands for itself in both.

    Raises:
        RecipeError: They are no names, or too few.
    """
    found = []
    for feature in features if isinstance(features, tuple | list) else [None]:
        pair = (feature, feature) if isinstance(feature, str) else feature
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise RecipeError(
                f"{type(term).__name__}(features=...) can't be used",
                got=repr(features),
                expected="names, or pairs of names",
                remedy='for example features=("stages.1", "stages.2"), or (("stages.1", "layer2"),)',
            )
        found.append((pair[0], pair[1]))
    if len(found) < least:
        raise RecipeError(f"{type(term).__name__} needs features to look at", got="none", expected="at least one name")
    return tuple(found)
