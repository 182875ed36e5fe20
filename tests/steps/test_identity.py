"""What a run or a training is compared by when it goes on: what its settings were made as."""

from __future__ import annotations

import enum
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import penjing as pj
from penjing.errors import CheckpointError
from penjing.prune.movement import _UpdateMasks
from penjing.prune.regularized import Single, _AddSubgradient
from penjing.quantize.qat import _Freeze
from penjing.steps.identity import identity
from penjing.train import state as training_state
from tests.raises import raises_case

SCRIPT = """
import json, sys
import torch, penjing as pj
from penjing.steps.identity import identity
def scaled(by):
    return lambda batch: by * len(batch) if by in {"one", "two", "three"} else {"a", "b"}
torch.manual_seed(0)
step = pj.Finetune(losses=(scaled(2.5), len), hooks=(print,), teacher=torch.nn.Linear(2, 2))
print(json.dumps([pj.Recipe(step).to_data(), identity(frozenset("abc"))]))
"""


class Counting:
    """A hook with a state that its repr shows."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.calls = every, 0

    def __repr__(self) -> str:
        return f"Counting({self.calls})"

    def __call__(self, moment: Any) -> None:
        self.calls += 1


class Told(Counting):
    def to_data(self) -> dict[str, Any]:
        return {"every": self.every}


@dataclass(frozen=True)
class Sampler:
    size: int = 1
    mean: torch.Tensor | None = None
    cache: dict[str, int] = field(default_factory=dict, compare=False)


@dataclass
class Open:
    size: int = 1


class Color(enum.Enum):
    RED = 1


def scaled(by):
    return lambda x: by * x


def outer(inner):
    def loss(x):
        return inner(x)

    return loss


def recursive(last):
    def loop(x):
        return loop(x - 1) if x > last else x

    return loop


def counting():
    calls = 0

    def hook(moment):
        nonlocal calls
        calls += 1

    return hook


def collecting():
    seen = []

    def hook(moment):
        seen.append(moment)

    return hook


def linear(seed, width=2):
    torch.manual_seed(seed)
    return nn.Linear(width, 2)


SAME = {
    "lambdas": (lambda: scaled(2), lambda: scaled(2)),
    "a function within itself": (lambda: recursive(0), lambda: recursive(0)),
    "networks": (lambda: linear(0), lambda: linear(0)),
    "partials": (lambda: functools.partial(scaled, by=2), lambda: functools.partial(scaled, by=2)),
    "lists and tuples": (lambda: [1, 2], lambda: (1, 2)),
    "numpy": (lambda: np.float32(0.5), lambda: 0.5),
    "what is not compared": (lambda: Sampler(cache={"a": 1}), lambda: Sampler(cache={"b": 2})),
}
OTHER = {
    "code": (lambda x: x + 1, lambda x: x - 1),
    "constants": (lambda x: x + 1, lambda x: x + 2),
    "called functions": (lambda x: F.relu(x), lambda x: F.gelu(x)),
    "an int and a float": (lambda x: x + 1, lambda x: x + 1.0),
    "closures": (scaled(2), scaled(3)),
    "closures within closures": (outer(scaled(2)), outer(scaled(3))),
    "closures over functions": (outer(F.relu), outer(F.gelu)),
    "defaults": (lambda x, by=1: x, lambda x, by=2: x),
    "keyword defaults": (lambda x, *, by=1: x, lambda x, *, by=2: x),
    "recursion": (recursive(0), recursive(1)),
    "functions": (F.relu, F.gelu),
    "classes": (nn.ReLU, nn.GELU),
    "methods": (Sampler(1).__eq__, Sampler(2).__eq__),
    "partials": (functools.partial(scaled, by=2), functools.partial(scaled, by=3)),
    "networks": (linear(0), linear(1)),
    "shapes": (linear(0), linear(0, 3)),
    "frozen fields": (Sampler(1), Sampler(2)),
    "tensors": (Sampler(1, torch.zeros(2)), Sampler(1, torch.ones(2))),
    "arrays": (np.zeros(2), np.ones(2)),
    "types of one field": (Sampler(1), Open(1)),
    "to_data": (Told(1), Told(2)),
    "dtypes": (torch.float16, torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_what_is_made_alike_is_the_same(one, other):
    assert identity(one()) == identity(other())


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_what_is_made_otherwise_is_another(one, other):
    assert identity(one) != identity(other)
    assert identity(one) == identity(one)


@pytest.mark.parametrize("make", [Counting, Told, Open, counting, collecting], ids=lambda make: make.__name__)
def test_what_a_hook_remembers_does_not_change_it(make):
    hook, fresh = make(), make()
    if isinstance(hook, Open):
        hook.size = 2
    else:
        hook(None)
    assert identity(hook) == identity(fresh)


def test_all_of_it_is_plain():
    values = [
        len, scaled(1), linear(0), Sampler(), Told(), object(), Color.RED, {1: b"a", "b": {2, 1}}, Path("a"), 1j,
        torch.float16, torch.ones(2), np.int64(1), [].append, nn, torch.device("cpu"),
        torch.ones(2, dtype=torch.bfloat16),
    ]  # fmt: skip
    plain = identity(values)
    assert json.loads(json.dumps(plain)) == plain
    assert identity(len) == "builtins.len" and identity(F.relu) == "torch.nn.functional.relu"
    assert identity(object()) == "builtins.object" and identity(plain) == plain


def test_a_recipe_is_the_same_in_every_process(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def printed(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout)

    one, other = printed("1"), printed("2")
    assert one == other
    assert one[0][0]["Finetune"]["hooks"] == ["builtins.print"] and "0x" not in json.dumps(one)


def test_recipes_with_other_losses_are_others():
    one, same, other = (pj.Recipe(pj.Finetune(losses=(scaled(by),))) for by in (2, 2, 3))
    assert one.to_data() == same.to_data() != other.to_data()


def test_a_training_with_another_hook_does_not_go_on(tmp_path):
    training_state.save(tmp_path / "state.pt", {"request": {"hooks": (scaled(2),)}})
    with training_state.loading(tmp_path / "state.pt", {"hooks": (scaled(2),)}) as state:
        assert "request" in state
    with raises_case(CheckpointError, "settings") as caught:
        with training_state.loading(tmp_path / "state.pt", {"hooks": (scaled(3),)}):
            pytest.fail("the state was given out")
    assert caught.value.field == "hooks"


def test_hooks_of_steps_say_their_step_without_its_training():
    short, long = pj.Finetune(epochs=1), pj.Finetune(epochs=2)

    def both(training, **settings):
        return identity(
            [
                _UpdateMasks(("a",), pj.prune.Movement(finetune=training, **settings)),
                _AddSubgradient(pj.prune.Regularized(finetune=training), Single(1, {"a": torch.ones(1)})),
            ]
        )

    assert both(short) == both(long) != both(long, sparsity=0.25)
    assert identity(_Freeze(0.5, 0.9)) != identity(_Freeze(0.6, 0.9))
