"""A result is computed once for all that it depends on, and anew where one of it is another."""

import dataclasses

import pytest

from penjing.steps.cache import Cache, Identity, Key

KEY = Key(kind=list, network="one", data=Identity([1, 2]), samples=3)


@pytest.fixture
def computed():
    """A cache, and the results that it has computed in their order."""
    cache, results = Cache(), []

    def ask(key):
        def compute():
            results.append(key.kind())
            return results[-1]

        return cache.once(key, compute)

    ask.cache = cache
    return ask, results


def test_the_same_key_gets_the_same_object(computed):
    ask, results = computed
    assert ask(KEY) is ask(dataclasses.replace(KEY)) and len(results) == 1


@pytest.mark.parametrize(
    "change",
    [{"kind": dict}, {"network": "two"}, {"data": Identity([1, 2])}, {"samples": 4}, {"settings": ("x",)}],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_the_key_counts(computed, change):
    """Data that are equal but another object are other data: what an iterator gives may have changed."""
    ask, results = computed
    ask(KEY)
    ask(dataclasses.replace(KEY, **change))
    assert len(results) == 2


def test_an_object_that_is_gone_is_not_taken_for_a_new_one(computed):
    """Python gives the address of an object that is gone to the next one; the key keeps its object alive."""
    ask, results = computed
    for _ in range(50):
        ask(dataclasses.replace(KEY, data=Identity(object())))  # nothing else holds it
    assert len(results) == 50


def test_a_failed_computation_is_tried_again():
    cache = Cache()
    with pytest.raises(ZeroDivisionError):
        cache.once(KEY, lambda: 1 // 0)
    assert cache.once(KEY, lambda: [5]) == [5]


class Named(dict):
    """Results by name."""


NAMED = Key(kind=Named, network="one", data=Identity([1, 2]), samples=3)


def test_of_names_those_are_computed_that_are_not_there_yet():
    cache, asked = Cache(), []

    def compute(names):
        asked.append(names)
        return {name: name.upper() for name in names if name != "none"}

    assert cache.by_name(NAMED, ["a", "none"], compute) == {"a": "A"}
    assert cache.by_name(NAMED, {"b": 0, "a": 1, "none": 2}, compute) == {"b": "B", "a": "A"}
    assert cache.by_name(NAMED, ["none", "a"], compute) == {"a": "A"}
    assert asked == [["a", "none"], ["b"]]
    cache.by_name(dataclasses.replace(NAMED, samples=4), ["a"], compute)
    assert asked[2:] == [["a"]]


def test_names_whose_computation_failed_are_asked_for_again():
    cache = Cache()
    with pytest.raises(ZeroDivisionError):
        cache.by_name(NAMED, ["a"], lambda names: {"a": 1 // 0})
    assert cache.by_name(NAMED, ["a"], lambda names: {"a": 5}) == {"a": 5}


def test_what_is_forgotten_is_computed_again(computed):
    ask, results, cache = *computed, computed[0].cache
    other = dataclasses.replace(KEY, samples=4)
    ask(KEY), ask(other)
    cache.forget(list, but=KEY), cache.forget(dict)
    ask(KEY), ask(other)
    assert len(results) == 3
    cache.forget(list)
    ask(KEY), ask(other)
    assert len(results) == 5
