"""What a choice is worth, and how far an artifact is beyond limits."""

import math

from penjing.goals.goal import Goal
from penjing.search.beliefs import Beliefs, Observation
from penjing.search.choice import Choice
from penjing.search.promise import Aim, promise

FLOATS, INTEGERS = {"size_bytes": 1000.0, "macs": 50.0, "drop": 0.0}, {"size_bytes": 300.0, "macs": 50.0, "drop": 0.01}


def beliefs(integers=True):
    rows = [Observation(choice=Choice(), artifact="onnxruntime-fp32", figures=FLOATS)]
    if integers:
        rows.append(Observation(choice=Choice(integers="rounded"), artifact="onnxruntime-int8", figures=INTEGERS))
    return Beliefs(rows)


def promised(goal, choice, known):
    return promise(known, Aim.of(Goal.parse(goal), 0.9), choice, 1000.0)


def test_a_choice_promises_artifacts_of_its_own_kind():
    halved = Choice(technique="channels", keep=0.5)
    assert promised("minimize size_bytes", halved, beliefs()).artifact == "onnxruntime-fp32"
    integers = Choice(technique="channels", keep=0.5, integers="corrected")
    assert promised("minimize macs", integers, beliefs()).artifact == "onnxruntime-int8"
    assert promised("minimize macs", integers, beliefs(integers=False)).artifact == "onnxruntime-fp32"  # all it knows


def test_a_limit_of_nothing_has_an_excess():
    aim = Aim.of(Goal.parse("minimize size_bytes, macs<=0"), 0.9)
    assert aim.excess({"macs": 50.0}) == 50 and aim.excess({"macs": 0.0}) == 0
    assert math.isclose(Aim.of(Goal.parse("minimize size_bytes, macs<=40"), 0.9).excess({"macs": 50.0}), 0.25)
