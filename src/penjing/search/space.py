"""The space of a search: what may vary for this network, its data and what its runtimes compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace

from torch import fx, nn

from penjing.analyze.bypasses import bypasses
from penjing.analyze.coupling import couple
from penjing.decompose.eligible import eligible
from penjing.errors import PenjingError
from penjing.pipeline.building import INTEGER
from penjing.pipeline.prepare import Prepared
from penjing.search.beliefs import USUAL_EPOCHS
from penjing.search.choice import INTEGERS, Choice, Integers, Learning, Technique
from penjing.steps.draft import Draft
from penjing.tasks.call import Call

KEEPS = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12)
EPOCHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # where a pass has USUAL_STEPS or more; of less data, more passes
USUAL_STEPS = 200
MOST_TIMES = 8  # so many passes, lest a few samples are learned by heart
FEW_BITS = (8, 4, 3)
METHODS = ("svd", "tucker")
DEEPEST = 0.5  # of all blocks are removed at most


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may vary.

    Attributes:
        techniques: That the network's structure allows.
        blocks: Numbers of residual blocks that may go.
        epochs: Lengths of trainings; empty where nothing can be trained.
        learning: How trainings go.
        integers: Ways to make them; "none" alone where no runtime computes integers, or no data calibrates them.
        weight_bits: Of the integers of weights.
        notes: What is left out, and why.
    """

    techniques: tuple[Technique, ...]
    blocks: tuple[int, ...]
    epochs: tuple[float, ...]
    learning: Learning
    integers: tuple[Integers, ...]
    weight_bits: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def usual_epochs(self) -> float:
        """The length of training that is usual for this data."""
        return USUAL_EPOCHS * self.epochs[0] / EPOCHS[0] if self.epochs else USUAL_EPOCHS

    def __iter__(self) -> Iterator[Choice]:
        """Every choice, in a fixed order."""
        structures: list[tuple[Technique, float]] = [("none", 1.0)]
        structures += [(technique, keep) for technique in self.techniques[1:] for keep in KEEPS]
        for (technique, keep), blocks in itertools.product(structures, self.blocks):
            structure = Choice(technique=technique, keep=keep, blocks=blocks)
            for epochs, way, bits in itertools.product((0.0, *self.epochs), self.integers, self.weight_bits):
                choice = replace(structure, epochs=epochs, integers=way, weight_bits=bits)
                if self.sensible(choice):
                    yield choice

    def sensible(self, choice: Choice) -> bool:
        """Whether a choice says one thing, and one that may pay."""
        if choice.integers == "none" and choice.weight_bits != self.weight_bits[0]:
            return False
        if choice.integers == "trained" and not choice.epochs:
            return False
        if choice.integers == "corrected" and choice.epochs:  # rounding is cheap beside a training
            return False
        if choice.epochs and not choice.structural and choice.integers != "trained":
            return False  # nothing was changed that a training could mend
        if choice.weight_bits == 8:
            return choice.integers != "mixed"
        return choice.integers in ("rounded", "mixed", "trained")

    def structures(self) -> Iterator[Choice]:
        """Structures without training, few and far apart: what trials in seconds look at first."""
        way: Integers = "corrected" if "corrected" in self.integers else "none"
        deep = self.blocks[-1]
        for technique in self.techniques[1:]:
            for keep in (0.5, 0.25):
                yield Choice(technique=technique, keep=keep, integers=way)
        if deep:
            yield Choice(blocks=deep, integers=way)
        if deep and "channels" in self.techniques:
            yield Choice(technique="channels", keep=0.5, blocks=deep, integers=way)


def space(prepared: Prepared) -> Space:
    """The space of a network: techniques that change nothing in it, or lack their data, are left out with a note."""
    run, task, notes = prepared.run, prepared.run.task, []
    call = task.call()
    techniques: list[Technique] = ["none"]
    try:
        if couple(run.network, call).groups:
            techniques.append("channels")
    except PenjingError as error:
        notes.append(f"channels are not pruned: {error.what}")
    try:
        eligible(Draft(run.network), call, (), (), METHODS)
        techniques.append("low rank")
    except PenjingError as error:
        notes.append(f"no layer becomes a product of smaller ones: {error.what}")
    deepest = int(DEEPEST * removable_blocks(run.network, call)) if task.calibration is not None else 0
    labels = task.train is not None and task.loss is not None
    data = task.train if labels else task.calibration
    if not labels:
        notes.append("the task has no labelled training data: trainings imitate the source's outputs")
    integers: tuple[Integers, ...] = ("none",)
    precisions = {p for name in prepared.order.runtimes for p in run.capabilities(name).precisions}
    if task.calibration is None:
        notes.append("the task has no calibration data: nothing becomes integers")
    elif precisions & set(INTEGER):
        integers = INTEGERS if data is not None else INTEGERS[:-1]
    return Space(
        techniques=tuple(techniques),
        blocks=tuple(dict.fromkeys((0, deepest // 2, deepest))),
        epochs=() if data is None else lengths(data),
        learning=_learning(run.network, labels),
        integers=integers,
        weight_bits=FEW_BITS if len(integers) > 1 else FEW_BITS[:1],
        notes=tuple(notes),
    )


def lengths(data: Iterable[object]) -> tuple[float, ...]:
    """Passes over data that trains: as many more, in powers of two, as a pass has fewer steps than is usual.

    >>> lengths(range(215)), lengths(range(18))
    ((0.5, 1.0, 2.0, 4.0, 8.0), (4.0, 8.0, 16.0, 32.0, 64.0))
    """
    steps = len(data) if isinstance(data, Sized) else USUAL_STEPS
    more = 2 ** max(0, math.floor(math.log2(USUAL_STEPS / max(1, steps))))
    return tuple(min(MOST_TIMES, more) * epochs for epochs in EPOCHS)


def removable_blocks(network: fx.GraphModule, call: Call) -> int:
    """Residual blocks whose shortcut can stand for them."""
    return sum(part.kind == "block" for part in bypasses(network, call))


def _learning(network: fx.GraphModule, labels: bool) -> Learning:
    """Momentum for networks with batch norms, as they were trained; Adam at a small rate for all others."""
    normed = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for part in network.modules())
    return Learning(labels=labels) if normed else Learning(labels=labels, optimizer="adamw", rate=3e-4)
