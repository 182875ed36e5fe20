"""What choices are believed to give: the prior, what observations make of it, and what a choice is worth."""

import math

import pytest

from penjing.goals.goal import Goal
from penjing.search.beliefs import FLOOR, Beliefs, Believed, Observation
from penjing.search.choice import Choice
from penjing.search.promise import Aim, promise, promises

ARTIFACT = "onnxruntime-int8"
INTEGERS = Choice(integers="rounded")


def pruned(keep, **more):
    return Choice(technique="channels", keep=keep, **({"epochs": 2.0, "integers": "trained"} | more))


def seen(choice, **figures):
    return Observation(choice=choice, artifact=ARTIFACT, figures=figures)


def power_law(exponent, *keeps):
    """Observations of a network whose size is 1000 bytes times keep to the power of `exponent`."""
    return [seen(INTEGERS, size_bytes=1000.0, drop=0.001)] + [
        seen(pruned(keep), size_bytes=1000.0 * keep**exponent) for keep in keeps
    ]


def test_what_is_kept_makes_figures_smaller_before_anything_was_seen():
    beliefs = Beliefs([seen(INTEGERS, size_bytes=1000.0, latency_ms=1.0)])
    for figure, whole in (("size_bytes", 1000.0), ("latency_ms", 1.0)):
        values = [beliefs.figure(figure, pruned(keep), ARTIFACT).value for keep in (0.8, 0.5, 0.2)]
        assert whole > values[0] > values[1] > values[2] > 0.1 * whole


def test_observations_teach_the_exponent():
    beliefs = Beliefs(power_law(1.5, 0.7, 0.4))
    assert beliefs.figure("size_bytes", pruned(0.25), ARTIFACT).value == pytest.approx(1000 * 0.25**1.5, rel=0.08)


def test_observations_make_it_surer():
    before = Beliefs(power_law(1.0)).figure("size_bytes", pruned(0.25), ARTIFACT)
    after = Beliefs(power_law(1.0, 0.5, 0.3)).figure("size_bytes", pruned(0.25), ARTIFACT)
    assert after.sd < before.sd


def test_drops_grow_with_what_is_removed_and_shrink_with_training():
    beliefs = Beliefs([seen(INTEGERS, drop=0.001)])

    def drop(choice):
        return beliefs.figure("drop", choice, ARTIFACT).value

    assert drop(pruned(0.2)) > drop(pruned(0.5)) > drop(pruned(0.8))
    assert drop(pruned(0.5, epochs=8.0)) < drop(pruned(0.5)) < drop(pruned(0.5, epochs=0.0, integers="rounded"))
    assert drop(Choice(integers="rounded", weight_bits=4)) > drop(INTEGERS)


def test_nothing_is_believed_of_an_artifact_that_was_never_seen():
    beliefs = Beliefs([seen(INTEGERS, size_bytes=1000.0)])
    assert beliefs.figure("size_bytes", pruned(0.5), "litert-int8") is None
    assert beliefs.figure("latency_ms", pruned(0.5), ARTIFACT) is None


def test_probabilities_and_improvements_of_a_normal_logarithm():
    believed = Believed(math.log(2.0), 0.5)
    assert believed.value == pytest.approx(2.0)
    assert believed.below(2.0) == pytest.approx(0.5) and believed.below(0.0) == 0.0
    assert believed.below(2.0 * math.exp(0.5)) == pytest.approx(0.8413, abs=1e-4)
    sure = Believed(math.log(2.0), 1e-9)
    assert sure.improvement(4.0) == pytest.approx(math.log(2)) and sure.improvement(1.0) == pytest.approx(0, abs=1e-9)


def test_a_goal_in_the_figures_of_beliefs():
    aim = Aim.of(Goal.parse("drop<=1%, metric>=0.85, latency_ms<=5, minimize size_bytes"), 0.9)
    assert (aim.objective, aim.sign) == ("size_bytes", 1)
    limits = {(figure, op): value for figure, op, value in aim.limits if figure != "drop"}
    assert limits == {("latency_ms", "<="): 5.0}
    assert sorted(v for f, _, v in aim.limits if f == "drop") == pytest.approx([0.01 / 0.9, 0.05 / 0.9])
    assert Aim.of(Goal.parse("maximize metric"), 0.9).objective == "drop"
    assert Aim.of(Goal.parse("drop<=0%"), 0.9).limits == (("drop", "<=", FLOOR),)


def test_a_choice_that_breaks_a_limit_is_worth_less_than_one_that_keeps_it():
    beliefs = Beliefs(power_law(1.0, 0.5))
    aim = Aim.of(Goal.parse("drop<=1%, minimize size_bytes"), 0.9)
    ranked = promises(beliefs, aim, [pruned(0.02), pruned(0.5), pruned(0.95)], best=1000.0)
    assert [p.choice.keep for p in ranked][0] == 0.5
    assert next(p for p in ranked if p.choice.keep == 0.02).meets < 0.1


def test_the_more_is_better_the_other_way_round():
    beliefs = Beliefs([seen(INTEGERS, throughput_per_s=100.0)])
    aim = Aim.of(Goal.parse("maximize throughput_per_s"), None)
    few, many = (promise(beliefs, aim, pruned(keep), 100.0) for keep in (0.9, 0.3))
    assert many.worth > few.worth > 0


def test_integers_are_not_expected_of_a_choice_without_them():
    beliefs = Beliefs([seen(INTEGERS, size_bytes=1000.0)])
    assert promise(beliefs, Aim.of(Goal.parse("minimize size_bytes"), None), Choice(), 1000.0) is None


def test_what_is_in_progress_counts_as_expected():
    beliefs = Beliefs(power_law(1.0))
    imagined = Beliefs([*beliefs.observations, *beliefs.imagined(pruned(0.5))])
    near = imagined.figure("size_bytes", pruned(0.5), ARTIFACT)
    assert near.sd < beliefs.figure("size_bytes", pruned(0.5), ARTIFACT).sd
    assert near.value == pytest.approx(beliefs.figure("size_bytes", pruned(0.5), ARTIFACT).value, rel=1e-6)


def test_how_far_figures_are_beyond_limits():
    aim = Aim.of(Goal.parse("size_bytes<=100, throughput_per_s>=50, drop<=1%"), 0.5)
    assert aim.excess({"size_bytes": 90.0, "throughput_per_s": 60.0, "drop": -0.1}) == 0
    assert aim.excess({"size_bytes": 150.0, "throughput_per_s": 25.0, "drop": 0.03}) == pytest.approx(0.5 + 0.5 + 0.5)


def test_out_of_reach_the_choice_that_comes_nearest_is_told_from_others():
    beliefs = Beliefs(power_law(1.0, 0.5))
    aim = Aim.of(Goal.parse("size_bytes<=1"), None)
    far, near = (promise(beliefs, aim, pruned(keep), 1000.0) for keep in (0.5, 0.2))
    assert far.worth < 1e-6 and near.worth < 1e-6 and far.excess > 2 * near.excess > 0


def test_artifacts_share_a_law_and_deviate_from_it():
    integers, floats = "onnxruntime-int8", "onnxruntime-fp32"
    whole = {integers: INTEGERS, floats: Choice()}
    seen = [Observation(choice=c, artifact=a, figures={"latency_ms": 1.0}) for a, c in whole.items()]
    halved = pruned(0.5)
    seen.append(Observation(choice=halved, artifact=integers, figures={"latency_ms": 0.98}))
    beliefs = Beliefs(seen)
    slow, fast = (beliefs.figure("latency_ms", pruned(0.25), a) for a in (integers, floats))
    before = Beliefs(seen[:2]).figure("latency_ms", pruned(0.25), floats)
    assert slow.value > fast.value > before.value  # a call's overhead was measured in one, and is likely in the other
    assert slow.sd < fast.sd


def test_a_drop_is_that_of_the_structure_and_that_of_the_integers():
    structure, few = pruned(0.5, integers="none"), Choice(integers="rounded", weight_bits=4)
    beliefs = Beliefs([seen(INTEGERS, drop=0.001), seen(few, drop=0.04), seen(structure, drop=0.01)])
    both = pruned(0.5, integers="rounded", weight_bits=4)
    parts = [beliefs.figure("drop", c, ARTIFACT).value for c in (structure, few)]
    assert beliefs.figure("drop", both, ARTIFACT).value == pytest.approx(sum(parts))
    unchanged = Beliefs([seen(Choice(), drop=0.0)])
    assert unchanged.figure("drop", structure, ARTIFACT) == Beliefs([]).figure("drop", structure, ARTIFACT)


def test_a_law_that_does_not_hold_is_believed_less():
    near = [seen(pruned(k), drop=0.004 / k) for k in (0.8, 0.5, 0.3)]
    scattered = [seen(pruned(k), drop=d) for k, d in ((0.8, 0.05), (0.5, 0.001), (0.3, 0.06))]
    straight, crooked = (Beliefs(o).figure("drop", pruned(0.4), ARTIFACT) for o in (near, scattered))
    assert crooked.sd > 2 * straight.sd


def test_drops_that_samples_hardly_tell_apart_count_as_one():
    aim = Aim.of(Goal.parse("drop<=1%, minimize size_bytes"), 0.5)
    assert aim.floor == pytest.approx(0.2 * 0.02)
    one, other = (Beliefs([seen(INTEGERS, drop=d)], aim.floor).figure("drop", INTEGERS, ARTIFACT) for d in (0, 0.004))
    assert one == other
    assert Aim.of(Goal.parse("maximize metric"), 0.5).floor == FLOOR
