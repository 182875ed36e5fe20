"""What a search leaves alone after failures: no more than they tell."""

from dataclasses import replace

from penjing.search.choice import Choice
from penjing.search.failures import OFTEN, Failures

PLAIN, INTEGERS = Choice(), Choice(integers="rounded")


def pruned(keep, **more):
    return Choice(technique="channels", keep=keep, **more)


def test_what_removes_as_much_or_more_fails_and_what_removes_less_may_work():
    failures = Failures([pruned(0.5)], [PLAIN, INTEGERS])
    assert failures.expects(pruned(0.5, epochs=1.0)) and failures.expects(pruned(0.3))
    assert failures.expects(pruned(0.5, blocks=1))
    assert not failures.expects(pruned(0.7)) and not failures.expects(replace(pruned(0.3), technique="low rank"))


def test_a_structure_that_worked_is_not_to_blame():
    failures = Failures([pruned(0.5, epochs=1.0)], [PLAIN, INTEGERS, pruned(0.4)])
    assert not failures.expects(pruned(0.5, epochs=2.0)) and not failures.expects(pruned(0.3))


def test_training_that_never_works_is_left_alone():
    lengths = (0.5, 1.0, 2.0)
    assert len(lengths) == OFTEN
    broken = [pruned(0.5, epochs=epochs) for epochs in lengths]
    failures = Failures(broken, [PLAIN, INTEGERS, pruned(0.5)])
    assert failures.expects(Choice(epochs=4.0, integers="trained")) and failures.expects(pruned(0.85, epochs=4.0))
    assert not failures.expects(pruned(0.4))
    once = Failures(broken, [PLAIN, INTEGERS, pruned(0.5), pruned(0.7, epochs=1.0)])
    assert not once.expects(pruned(0.85, epochs=4.0))


def test_a_technique_that_never_works_is_left_alone():
    failures = Failures([pruned(keep) for keep in (0.5, 0.6, 0.7)], [PLAIN, INTEGERS])
    assert failures.expects(pruned(0.85))
    assert not failures.expects(replace(pruned(0.85), technique="low rank"))


def test_integers_that_fail_by_themselves_are_not_laid_to_structures():
    broken = [INTEGERS, pruned(0.5, integers="corrected"), pruned(0.25, integers="corrected")]
    failures = Failures(broken, [PLAIN])
    assert failures.expects(pruned(0.85, integers="rounded"))
    assert not failures.expects(pruned(0.25))


def test_a_way_to_make_integers_that_never_works_is_left_alone():
    few = [Choice(epochs=e, integers="trained", weight_bits=4) for e in (0.5, 1.0, 2.0)]
    failures = Failures(few, [PLAIN, INTEGERS, Choice(epochs=1.0, integers="trained")])
    assert failures.expects(Choice(epochs=4.0, integers="trained", weight_bits=4))
    assert not failures.expects(Choice(epochs=4.0, integers="trained"))
