"""Validation rules for settings, and `check`, which refuses a field that violates its rule.

Booleans are not numbers, and neither are NaN and infinity, unless a rule says so. A NumPy scalar is converted to the
Python value, because recipes are written as JSON and YAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.errors import RecipeError, in_percent


@dataclass(frozen=True)
class Rule:
    """A validation rule for a setting.

    Attributes:
        holds: Whether a value, of any type, satisfies the rule.
        expected: The rule in words, as in an error message.
    """

    holds: Callable[[Any], bool]
    expected: str


def check(settings: object, **rules: Rule) -> None:
    """Validate the fields of a frozen dataclass. To be called in `__post_init__`.

    Args:
        settings: An instance of a dataclass.
        rules: Field → rule.

    Raises:
        RecipeError: A field violates its rule; the first one is reported.
    """
    for name, rule in rules.items():
        current = getattr(settings, name)
        value = require(f"{type(settings).__name__}({name}=...)", current, rule, field=name)
        if value is not current:
            object.__setattr__(settings, name, value)


def require(what: str, value: Any, rule: Rule, *, field: str) -> Any:
    """Return a value that satisfies its rule; a NumPy scalar as a Python number.

    Raises:
        RecipeError: The value violates the rule; the message names `what`, and the error's `field` is that name.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if not rule.holds(plain):
        got = plain if isinstance(plain, int | float) else repr(plain)[:300]
        remedy = in_percent(plain, rule.expected)
        raise RecipeError(
            f"{what} can't be used", code="settings", field=field, got=got, expected=rule.expected, remedy=remedy
        )
    return plain


def whole(least: int = 1, most: int | None = None) -> Rule:
    """A whole number.

    >>> whole().expected, whole(2, 8).expected
    ('a whole number of at least 1', 'a whole number from 2 to 8')
    """

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= least
            and (most is None or value <= most)
        )

    return Rule(holds, "a whole number " + (f"of at least {least}" if most is None else f"from {least} to {most}"))


def number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
    called: str | None = None,
) -> Rule:
    """A number within the given bounds.

    Args:
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        below: Exclusive upper bound.
        most: Inclusive upper bound.
        infinite: Whether infinity is allowed.
        called: The noun in an error message; by default "a fraction" for bounds within 0 and 1, otherwise "a number".

    >>> number(above=0, most=1).expected, number(least=1, infinite=True).expected, number().expected
    ('a fraction above 0 and at most 1', 'a number of at least 1, or infinity', 'a number')
    """

    def holds(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if value != value or (abs(value) == math.inf and not infinite):
            return False
        return (
            (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )

    fraction = 0 in (above, least) and 1 in (below, most)
    words = {"above": above, "of at least": least, "below": below, "at most": most}
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
    if least is not None and most is not None:
        bounds = f"from {least:g} to {most:g}"
    expected = f"{called or ('a fraction' if fraction else 'a number')} {bounds}".strip()
    return Rule(holds, f"{expected}, or infinity" if infinite else expected)


def above(bound: float) -> Rule:
    """A number larger than this.

    >>> above(0).expected
    'a number above 0'
    """
    return number(above=bound)


def at_least(bound: float) -> Rule:
    """A number of at least this.

    >>> at_least(0).expected
    'a number of at least 0'
    """
    return number(least=bound)


def between(low: float, high: float) -> Rule:
    """A number between two bounds, both included.

    >>> between(0, 1).expected
    'a fraction from 0 to 1'
    """
    return number(least=low, most=high)


def one_of(*values: str) -> Rule:
    """One of these strings.

    >>> one_of("sgd", "adamw").expected
    "'sgd' or 'adamw'"
    """
    words = [repr(value) for value in values]
    expected = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return Rule(lambda value: isinstance(value, str) and value in values, expected)


def instance(kind: Any, example: str) -> Rule:
    """An instance of a class (or of a union, A | B), with an example for the error message.

    >>> instance(dict, "{'weight_bits': 4}").holds({})
    True
    """
    return Rule(lambda value: isinstance(value, kind), example)


def optional(rule: Rule) -> Rule:
    """A value that satisfies the rule, or None.

    >>> optional(whole()).expected
    'a whole number of at least 1, or None'
    """
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.expected}, or None")


FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
NAMES = Rule(
    lambda value: isinstance(value, tuple | list) and all(isinstance(name, str) for name in value), "a tuple of names"
)
FUNCTIONS = Rule(lambda value: isinstance(value, tuple) and all(map(callable, value)), "a tuple of functions")
