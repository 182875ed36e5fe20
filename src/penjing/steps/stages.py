"""The stages of compression: a table of which step may follow which.

A step names its stage. What holds for a network after a stage (`leaves`) is what later stages need or refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WORK = "work"  # the network was changed
PLAN = "plan"  # ranges and scales were chosen
DYNAMIC = "dynamic ranges"  # activation ranges are computed at run time
SHARED = "shared weights"  # weights are values of a codebook
ON_GRIDS = "weights on grids"  # weights are whole numbers of a step
REPAIRED = "repaired"  # the weights are no longer those the plan was made for


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        needs: What must hold before it, each with the remedy if it does not.
        refuses: What must not hold before it, each with the reason, shown as "expected" in the error.
        leaves: What holds after it, besides WORK.
        only_prepares: It only serves quantization: if it fails, floating-point candidates continue without it.
    """

    needs: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    leaves: frozenset[str] = frozenset()
    only_prepares: bool = False


_TWICE = (
    "one step that quantizes: the second would choose its scales for values that the first has already rounded; "
    "quantize.MixedPrecision gives layers other bits in one step"
)
_NOT_SHARED = {SHARED: "this step before share.Codebook: it would give weights values that are not in their codebook"}
_NEEDS_PLAN = {PLAN: "a step that quantizes before it, such as quantize.Static"}
_UNROUNDED = (
    "one of BiasCorrection, CoordinateRounding (which corrects biases too) and Rollback (which repairs by itself): "
    "each compares with the weights that the plan was made for"
)

STAGES: dict[str, Stage] = {
    "replace": Stage(
        refuses={
            WORK: "this step first: it builds a new network, and nothing that was done before is left of the old one"
        }
    ),
    "structure": Stage(
        refuses={
            PLAN: "this step before the one that quantizes: ranges and scales belong to the channels of their network",
            **_NOT_SHARED,
        }
    ),
    "train": Stage(
        refuses={
            PLAN: "this step before the one that quantizes, or quantize.QAT after that one: ranges belong to weights",
            ON_GRIDS: "this step before the one that puts weights on grids: it would move them off",
        }
    ),
    "share": Stage(
        refuses={
            PLAN: "this step before the one that quantizes: a plan is made for the weights that it finds",
            ON_GRIDS: "either this step or the one that put weights on grids: each decides which values they have",
        },
        leaves=frozenset({SHARED}),
    ),
    "round": Stage(
        refuses={
            PLAN: "this step without one that quantizes: integers have grids of their own",
            SHARED: "either this step or share.Codebook: each decides which values weights have",
        },
        leaves=frozenset({SHARED, ON_GRIDS}),
    ),
    "levels": Stage(
        refuses={
            PLAN: "this step without one that quantizes: its weights have two or three levels of their own",
            SHARED: "either this step or share.Codebook: each decides which values weights have",
            ON_GRIDS: "either this step or share.Grid: each decides which values weights have",
        },
        leaves=frozenset({SHARED, ON_GRIDS}),
    ),
    "prepare": Stage(
        refuses={
            PLAN: "this step before the one that quantizes: it scales weights and activations, to which ranges belong",
            **_NOT_SHARED,
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
"""The stages in order, by the name that a step declares as its `stage`."""
