"""The order of operators in which the fewest bytes are alive at once.

Liberis & Lane, "Neural networks on microcontrollers: saving memory at inference via operator reordering", 2019
(arXiv:1910.05110): the bytes that are alive after some operators depend on which were executed and not on their order,
so that the best order is a path through sets of operators whose largest step is smallest. Here that path is searched
best-first, within a bound that a beam search gives, and operators that free as much as they take are executed at once.
Buffers and operators are numbers; no network enters.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STATES = 20_000  # sets of operators that the exact search looks at
BEAM = 24  # sets of each size that the beam search keeps


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator.

    Attributes:
        reads: Buffers that it reads.
        writes: Buffers that it fills; each has one writer.
        over: Of those it reads, the ones whose place an equally large output may take, where nobody reads them later.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    over: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An order, and what it needs.

    Attributes:
        order: Indices of the operators.
        size_bytes: The most bytes that are alive at once.
        position: Index of the operator that runs at that moment; None where no operator needs anything.
        proved: Whether no other order needs less.
    """

    order: tuple[int, ...]
    size_bytes: int
    position: int | None
    proved: bool


class Problem:
    """Operators with their buffers.

    Args:
        operations: In an order in which they can be executed.
        sizes: Bytes of every buffer.
        outputs: Buffers that are alive to the end.
    """

    def __init__(self, operations: Sequence[Operation], sizes: Sequence[int], outputs: frozenset[int]) -> None:
        self.operations, self.sizes, self.outputs = tuple(operations), tuple(sizes), outputs
        writer = {buffer: i for i, operation in enumerate(operations) for buffer in operation.writes}
        self.readers = [0] * len(sizes)
        for i, operation in enumerate(operations):
            for buffer in operation.reads:
                self.readers[buffer] |= 1 << i
        self.needs = [sum({1 << writer[b] for b in op.reads if b in writer}) for op in operations]
        given = set(range(len(sizes))) - writer.keys()
        # What nobody reads is alive from its writer on, or, of the inputs, never.
        self.given = sum(sizes[b] for b in given if self.readers[b] or b in outputs)
        self.all = (1 << len(operations)) - 1

    def after(self, done: int, alive: int, i: int) -> tuple[int, int]:
        """Bytes alive while operator `i` runs behind those of the set `done`, and after it.

        Args:
            done: Bit set of the operators that were executed.
            alive: Bytes that are alive after them.
            i: An operator that can run now.
        """
        operation, later = self.operations[i], ~(done | 1 << i)
        dying = [b for b in operation.reads if b not in self.outputs and not self.readers[b] & later]
        out = sum(self.sizes[b] for b in operation.writes)
        place = 0
        if len(operation.writes) == 1 and out:
            place = next((out for b in dying if b in operation.over and self.sizes[b] == out), 0)
        during = alive + out - place
        unread = sum(self.sizes[b] for b in operation.writes if not self.readers[b] and b not in self.outputs)
        return during, alive + out - sum(self.sizes[b] for b in dying) - unread

    def ready(self, done: int) -> Iterator[int]:
        """The operators that can run behind those of a set."""
        left = self.all & ~done
        while left:
            bit = left & -left
            left ^= bit
            i = bit.bit_length() - 1
            if not self.needs[i] & ~done:
                yield i

    def least(self) -> int:
        """Bytes that no order can do without: of the inputs together, and of the largest operator."""
        bound = self.given
        for operation in self.operations:
            read = sum(self.sizes[b] for b in operation.reads)
            out = sum(self.sizes[b] for b in operation.writes)
            shared = any(self.sizes[b] == out for b in operation.over) and len(operation.writes) == 1
            bound = max(bound, read + (0 if shared else out))
        return bound


def cost(problem: Problem, order: Sequence[int], *, proved: bool = False) -> Schedule:
    """What an order needs.

    Raises:
        ValueError: An operator stands before one that it reads, or the order lacks one.
    """
    done, alive, most, position = 0, problem.given, problem.given, None
    for i in order:
        if problem.needs[i] & ~done or done >> i & 1:
            raise ValueError(f"operator {i} can't run at its place")
        during, alive = problem.after(done, alive, i)
        done |= 1 << i
        if during > most or position is None:
            most, position = max(during, most), i
    if done != problem.all:
        raise ValueError("an operator is missing")
    return Schedule(order=tuple(order), size_bytes=most, position=position, proved=proved)


def best(problem: Problem, states: int = STATES) -> Schedule:
    """The order that needs least, or the best that was seen where there are too many.

    Args:
        problem: The operators.
        states: Sets of operators that the exact search may look at.
    """
    given = cost(problem, range(len(problem.operations)))
    if given.size_bytes == problem.least():
        return cost(problem, given.order, proved=True)
    beam = cost(problem, _beam(problem))
    bound = min(given, beam, key=lambda schedule: schedule.size_bytes)  # equal ones: as the graph has it
    if bound.size_bytes == problem.least():
        return cost(problem, bound.order, proved=True)
    exact, complete = _exact(problem, bound.size_bytes, states)
    return cost(problem, bound.order if exact is None else exact, proved=complete)


def _beam(problem: Problem) -> tuple[int, ...]:
    """A good order: of every number of executed operators the sets that needed least are followed."""
    states = {0: (problem.given, problem.given)}
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for _ in problem.operations:
        following: dict[int, tuple[int, int, int, int]] = {}
        for done, (most, alive) in states.items():
            for i in problem.ready(done):
                during, after = problem.after(done, alive, i)
                row = (max(most, during), after, done, i)
                key = done | 1 << i
                if key not in following or row < following[key]:
                    following[key] = row
        nearest = sorted(following.items(), key=lambda item: item[1])[:BEAM]
        paths = {key: (*paths[row[2]], row[3]) for key, row in nearest}
        states = {key: (row[0], row[1]) for key, row in nearest}
    return paths[problem.all]


def _exact(problem: Problem, bound: int, states: int) -> tuple[tuple[int, ...] | None, bool]:
    """An order that needs less than `bound`, best first; and whether the search came to its end.

    None with True: no order needs less.
    """
    came: dict[int, tuple[int, int]] = {}  # set → the one before it, and the operator between
    heap = [(problem.given, 0, 0, problem.given, -1, -1)]  # most, operators left to execute, set, alive, before, last
    while heap:
        most, left, done, alive, before, last = heapq.heappop(heap)
        if done in came:
            continue
        came[done] = (before, last)
        if done == problem.all:
            return _path(came, done), True
        if len(came) > states:
            return None, False
        steps = [(i, *problem.after(done, alive, i)) for i in problem.ready(done)]
        # One that frees as much as it takes, and needs no more than was needed before, is never worth waiting with.
        free = next((step for step in steps if step[1] <= most and step[2] <= alive), None)
        for i, during, after in [free] if free is not None else steps:
            if max(most, during) < bound:
                heapq.heappush(heap, (max(most, during), left - 1, done | 1 << i, after, done, i))
    return None, True


def _path(came: dict[int, tuple[int, int]], done: int) -> tuple[int, ...]:
    order = []
    while done:
        done, last = came[done]
        order.append(last)
    return tuple(reversed(order))
