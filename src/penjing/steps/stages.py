"""The stages of compression: which step may follow which, as one table.

A step names its stage. What is true of a network after a stage (`leaves`) is what the next ones need or refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WORK = "work"  # something was done to the network
PLAN = "plan"  # ranges and scales were chosen
DYNAMIC = "dynamic ranges"  # those of activations are taken at run time
REPAIRED = "repaired"  # the weights are no longer those that the plan was made for


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        needs: What must hold before, each with what is to be done for it.
        refuses: What must not hold before, each with the reason, "expected" of the error.
        leaves: What holds after it, besides WORK.
        only_prepares: It is of use to integers alone: where it fails, floating-point candidates go on without it.
    """

    needs: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    leaves: frozenset[str] = frozenset()
    only_prepares: bool = False


_TWICE = (
    "one step that quantizes: the second would choose its scales for values that the first has already rounded; "
    "quantize.MixedPrecision gives layers other bits in one step"
)
_NEEDS_PLAN = {PLAN: "a step that quantizes before it, such as quantize.Static"}
_UNROUNDED = (
    "one of BiasCorrection, CoordinateRounding (which corrects biases too) and Rollback (which repairs by itself): "
    "each compares with the weights that the plan was made for"
)

STAGES: dict[str, Stage] = {
    "replace": Stage(refuses={WORK: "it first: it is a new network, on which nothing that was done before is left"}),
    "structure": Stage(
        refuses={PLAN: "it before the step that quantizes: ranges and scales belong to the channels of their network"}
    ),
    "train": Stage(
        refuses={PLAN: "it before the step that quantizes, or quantize.QAT after it: ranges belong to their weights"}
    ),
    "prepare": Stage(
        refuses={
            PLAN: "it before the step that quantizes: it scales weights and activations, and ranges belong to them"
        },
        only_prepares=True,
    ),
    "quantize": Stage(refuses={PLAN: _TWICE}, leaves=frozenset({PLAN})),
    "quantize at run time": Stage(refuses={PLAN: _TWICE}, leaves=frozenset({PLAN, DYNAMIC})),
    "quantize and repair": Stage(refuses={PLAN: _TWICE}, leaves=frozenset({PLAN, REPAIRED})),
    "repair": Stage(needs=_NEEDS_PLAN, refuses={REPAIRED: _UNROUNDED}, leaves=frozenset({REPAIRED})),
    "train integers": Stage(
        needs=_NEEDS_PLAN,
        refuses={DYNAMIC: "quantize.Static before it: it trains ranges, and those of Dynamic are taken at run time"},
        leaves=frozenset({REPAIRED}),
    ),
}
"""In the order in which they come, by the name that a step gives as its `stage`."""
