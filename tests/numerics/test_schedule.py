"""The order that needs least memory, against every order there is."""

import itertools
import random

import pytest

from penjing.numerics.schedule import Operation, Problem, best, cost


def slow(operations, sizes, outputs):
    """The least peak over all orders, by the obvious simulation: sets of names, nothing shared with the search."""
    writer = {b: i for i, op in enumerate(operations) for b in op.writes}
    least = None
    for order in itertools.permutations(range(len(operations))):
        place = {i: n for n, i in enumerate(order)}
        if any(place[writer[b]] > place[i] for i, op in enumerate(operations) for b in op.reads if b in writer):
            continue
        peak = 0
        alive = {b for b in range(len(sizes)) if b not in writer and (b in outputs or read_by(operations, b))}
        peak = sum(sizes[b] for b in alive)
        for n, i in enumerate(order):
            later = {b for j in order[n + 1 :] for b in operations[j].reads} | set(outputs)
            dying = operations[i].reads - later
            during = sum(sizes[b] for b in alive | operations[i].writes)
            if len(operations[i].writes) == 1:
                (out,) = operations[i].writes
                if any(sizes[b] == sizes[out] for b in dying & operations[i].over):
                    during -= sizes[out]
            peak = max(peak, during)
            alive = {b for b in alive | operations[i].writes if b in later}
        least = peak if least is None else min(least, peak)
    return least


def read_by(operations, buffer):
    return any(buffer in op.reads for op in operations)


def draw(seed):
    """Up to seven operators over random earlier buffers."""
    chance = random.Random(seed)
    sizes = [chance.randint(1, 9) for _ in range(chance.randint(1, 2))]
    operations = []
    for _ in range(chance.randint(1, 7)):
        reads = frozenset(chance.sample(range(len(sizes)), min(len(sizes), chance.randint(1, 3))))
        in_place = chance.random() < 0.4
        count = 1 if in_place or chance.random() < 0.8 else 2
        writes = frozenset(range(len(sizes), len(sizes) + count))
        sizes += [sizes[min(reads)] if in_place else chance.randint(1, 9) for _ in range(count)]
        operations.append(Operation(reads=reads, writes=writes, over=reads if in_place else frozenset()))
    unread = frozenset(b for b in range(len(sizes)) if not read_by(operations, b) and chance.random() < 0.8)
    return operations, sizes, unread


@pytest.mark.parametrize("seed", range(120))
def test_no_order_needs_less(seed):
    operations, sizes, outputs = draw(seed)
    problem = Problem(operations, sizes, outputs)
    schedule = best(problem)
    assert schedule.proved and schedule.size_bytes == slow(operations, sizes, outputs)
    assert cost(problem, schedule.order).size_bytes == schedule.size_bytes
    assert schedule.size_bytes >= problem.least()


def branches(count, wide=100, narrow=1):
    """`count` branches from one value: widened, narrowed, and all joined."""
    operations, sizes, ends = [], [10], []
    for _ in range(count):
        middle, end = len(sizes), len(sizes) + 1
        sizes += [wide, narrow]
        operations.append(Operation(reads=frozenset({0}), writes=frozenset({middle})))
        operations.append(Operation(reads=frozenset({middle}), writes=frozenset({end})))
        ends.append(end)
    sizes.append(count)
    operations.append(Operation(reads=frozenset(ends), writes=frozenset({len(sizes) - 1})))
    order = [i for half in (0, 1) for i in range(half, 2 * count, 2)] + [2 * count]
    return [operations[i] for i in order], sizes, frozenset({len(sizes) - 1})


def test_branches_are_computed_one_after_the_other():
    operations, sizes, outputs = branches(4)
    problem = Problem(operations, sizes, outputs)
    given, chosen = cost(problem, range(len(operations))), best(problem)
    assert given.size_bytes == 410 and chosen.size_bytes == 10 + 100 + 3 and chosen.proved


def test_many_branches_are_no_trouble():
    problem = Problem(*branches(25))
    assert best(problem).size_bytes == 10 + 100 + 24


def test_where_the_search_is_cut_short_it_says_so():
    operations, sizes, outputs = draw(3)
    for seed in range(200):
        operations, sizes, outputs = draw(seed)
        problem = Problem(operations, sizes, outputs)
        short = best(problem, states=0)
        assert short.size_bytes >= best(problem).size_bytes
        if not short.proved:
            return
    raise AssertionError("every problem was solved by the beam alone")


def test_in_place_takes_no_room_of_its_own():
    chain = [Operation(reads=frozenset({i}), writes=frozenset({i + 1}), over=frozenset({i})) for i in range(3)]
    assert best(Problem(chain, [8, 8, 8, 8], frozenset({3}))).size_bytes == 8
    copied = [Operation(reads=op.reads, writes=op.writes) for op in chain]
    assert best(Problem(copied, [8, 8, 8, 8], frozenset({3}))).size_bytes == 16
    # ... unless what it would overwrite is read later, or is an output
    assert best(Problem(chain, [8, 8, 8, 8], frozenset({0, 3}))).size_bytes == 16


def test_an_order_that_cannot_run_is_refused():
    operations, sizes, outputs = branches(2)
    problem = Problem(operations, sizes, outputs)
    with pytest.raises(ValueError, match="can't run"):
        cost(problem, [4, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="missing"):
        cost(problem, [0, 1, 2, 3])


def test_nothing_to_do_needs_nothing():
    assert best(Problem([], [4], frozenset())).size_bytes == 0
    assert best(Problem([], [4], frozenset({0}))).size_bytes == 4
