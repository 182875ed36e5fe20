import dataclasses
import json

from penjing.goals.goal import Goal
from penjing.goals.judging import choose
from penjing.records import Candidate, Energy, Latency, Measured, from_dict, to_json
from penjing.records.figures import FIGURES
from penjing.records.record import GoalResult

LATENCY = Latency(median=2.0, p95=2.5, spread=0.01, batch=1, threads=1, calls=9)
ENERGY = Energy(value=3.0, method="model")


def test_every_measured_figure_is_declared_and_read():
    fields = {f.name for f in dataclasses.fields(Measured)}
    assert {figure.name for figure in FIGURES.values() if figure.read is not None} == fields
    for name, figure in FIGURES.items():
        if figure.read is not None:
            value = {"latency_ms": LATENCY, "energy_mj": ENERGY}.get(name, 7)
            assert figure.read(Measured(**{name: value})) in (2.0, 3.0, 7)
            assert figure.read(Measured()) is None


def test_an_alias_means_one_figure():
    aliases = [alias for figure in FIGURES.values() for alias in figure.aliases]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & set(FIGURES)


def test_a_comparison_is_a_field_of_the_candidate():
    candidate = Candidate(name="a", runtime="r", precision="fp32", folder="a", measured=Measured(), drop=0.25)
    assert FIGURES["drop"].of(candidate) == 0.25 and FIGURES["relative_drop"].of(candidate) is None
    broken = dataclasses.replace(candidate, drop=float("nan"))
    assert FIGURES["drop"].of(broken) is None


def test_the_limits_of_a_goal_stand_in_its_result_and_survive_the_file():
    result = choose(Goal.parse("drop<=1%, latency_ms<=5us"), [])
    assert [(m.figure, m.op, m.value, m.text) for m in result.limits] == [
        ("latency_ms", "<=", 0.005, "latency_ms<=0.005"),
        ("drop", "<=", 0.01, "drop<=1%"),
    ]
    assert from_dict(GoalResult, json.loads(to_json(result))) == result
