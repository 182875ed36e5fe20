"""The rules that settings are held to: one wording a kind, and the same answer for every odd value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import penjing as pj
from penjing.recipes.catalogue import CATALOGUE, SETTINGS
from penjing.steps import settings
from penjing.steps.settings import (
    FLAG,
    FUNCTIONS,
    NAMES,
    Rule,
    above,
    at_least,
    between,
    check,
    instance,
    number,
    one_of,
    optional,
    require,
    whole,
)  # fmt: skip
from tests.raises import raises_setting

NUMBERS = {
    "whole": whole(), "above": above(0), "at least": at_least(0), "between": between(0, 1), "any": number(),
    "infinite": number(least=1, infinite=True),
}  # fmt: skip
ODD = [True, False, math.nan, "1", "", None, [], (1,), 1j, torch.tensor(1.0), np.ones(1), np.bool_(True), float]


@dataclass(frozen=True)
class Bits:
    bits: Any = 8
    name: Any = "a"

    def __post_init__(self) -> None:
        check(self, bits=whole(2, 8), name=one_of("a", "b"))


class TestRules:
    @pytest.mark.parametrize("rule", NUMBERS.values(), ids=NUMBERS)
    @pytest.mark.parametrize("value", ODD, ids=repr)
    def test_what_is_not_a_number_keeps_no_rule_of_numbers(self, rule, value):
        assert not rule.holds(value)

    @given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
    def test_bounds_are_those_of_python(self, x):
        assert above(0).holds(x) == (x > 0)
        assert at_least(0).holds(x) == (x >= 0)
        assert between(0, 1).holds(x) == (0 <= x <= 1)
        assert number(above=0, below=1).holds(x) == (0 < x < 1)
        assert number(least=0, below=1).holds(x) == (0 <= x < 1)
        assert number(above=0, most=1).holds(x) == (0 < x <= 1)
        assert whole(2, 8).holds(x) == (isinstance(x, int) and 2 <= x <= 8)
        assert number().holds(x)

    def test_infinity_is_a_number_where_a_rule_says_so(self):
        assert number(above=0, infinite=True).holds(math.inf) and not number(above=0).holds(math.inf)
        assert not number(above=0, infinite=True).holds(-math.inf)

    def test_numbers_that_no_float_holds(self):
        assert above(0).holds(10**400) and not between(0, 1).holds(10**400)

    def test_fractions_are_called_so(self):
        assert between(0, 1).expected == "a fraction from 0 to 1"
        assert number(above=0, below=1).expected == "a fraction above 0 and below 1"
        assert number(least=0, below=1).expected == "a fraction of at least 0 and below 1"
        assert between(0, 2).expected == "a number from 0 to 2"
        assert above(1).expected == "a number above 1"

    @pytest.mark.parametrize(
        ("rule", "good", "bad"),
        [
            (one_of("a", "b"), ["a", "b"], ["c", "", None, ["a"], 1, torch.ones(2)]),
            (FLAG, [True, False], [1, 0, "True", None]),
            (NAMES, [(), ("a",), ["a", "b"]], ["a", None, (1,), {"a": 1}, 3]),
            (FUNCTIONS, [(), (print, lambda: 0)], [print, [print], (1,), None]),
            (instance(int | str, "3"), [3, "3"], [3.0, None]),
            (optional(whole()), [None, 3], [0, "3", True]),
        ],
    )
    def test_of_other_kinds(self, rule, good, bad):
        assert all(rule.holds(value) for value in good) and not any(rule.holds(value) for value in bad)


class TestCheck:
    def test_the_first_field_that_breaks_its_rule(self):
        with raises_setting("bits") as caught:
            Bits(9, "c")
        error = caught.value
        assert "Bits(bits=...)" in error.what
        assert (error.got, error.expected, error.remedy) == (9, "a whole number from 2 to 8", None)
        with raises_setting("name") as caught:
            Bits(name="c")
        assert (caught.value.got, caught.value.expected) == ("'c'", "'a' or 'b'")

    @pytest.mark.parametrize("value", [np.int64(4), np.uint8(4), np.int32(4)])
    def test_a_scalar_of_numpy_is_kept_as_a_python_value(self, value):
        assert type(Bits(value).bits) is int and Bits(value) == Bits(4)

    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
    def test_floats_of_numpy_are_written_as_others(self, kind):
        step = pj.Finetune(learning_rate=kind(0.5), workers=np.int64(1), channels_last=np.bool_(True))
        assert step == pj.Finetune(learning_rate=0.5)
        assert pj.Recipe.from_yaml(pj.Recipe(step).to_yaml()) == pj.Recipe(step)
        with raises_setting("learning_rate"):
            pj.Finetune(learning_rate=kind("nan"))

    def test_percent_are_told_from_fractions(self):
        for given_, meant in ((50, 0.5), ("50%", 0.5), (np.float32(7.5), 0.075)):
            with raises_setting("part") as caught:
                require("the part", given_, between(0, 1), field="part")
            assert caught.value.remedy.startswith(f"did you mean {meant:g}?")

    def test_a_huge_value_is_shown_in_part(self):
        with raises_setting("this") as caught:
            require("this", ["x"] * 10_000, FLAG, field="this")
        assert len(caught.value.got) == 300

    def test_a_number_of_more_digits_than_a_float_has(self):
        with raises_setting("this"):
            require("this", 10**400, between(0, 1), field="this")


def _numeric() -> list[tuple[type, str]]:
    kinds = {**CATALOGUE, **SETTINGS}.values()
    return [
        (cls, field.name)
        for cls in kinds
        for field in dataclasses.fields(cls)
        if str(field.type).split(" |")[0] in ("int", "float", "bool")
    ]


TARGETS = (
    "macs",
    "params",
    "channels",
    "size",
    "size_bytes",
    "latency_ms",
    "latency",
    "latency_ratio",
    "snr_db",
    "average_bits",
    "blocks",
)
NEEDED = {
    pj.prune.Channels: {"macs": 0.5},
    pj.prune.Blocks: {"blocks": 1},
    pj.prune.Iterative: {"step": pj.prune.Magnitude(), "finetune": pj.Finetune()},
    pj.quantize.MixedPrecision: {"average_bits": 5},
    pj.quantize.Rollback: {"drop": 0.1},
}


@pytest.mark.parametrize(("cls", "name"), _numeric(), ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [math.nan, "many", [3]], ids=repr)
def test_no_step_takes_for_a_number_what_is_not(cls, name, value):
    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    others = dict.fromkeys(needed - {name}, "a") | ({} if name in TARGETS else NEEDED.get(cls, {}))
    with raises_setting(name) as caught:
        cls(**{**others, name: value})
    assert caught.value.got == repr(value) or caught.value.got is value
    assert caught.value.expected


def test_every_rule_says_what_it_expects():
    rules = [value for value in vars(settings).values() if isinstance(value, Rule)]
    assert len(rules) == 3 and all(rule.expected for rule in rules)
