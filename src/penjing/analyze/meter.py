"""What a draft costs, in the unit that a target is given in."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from penjing.analyze.cost import Call, cost, totals
from penjing.errors import PruningError
from penjing.steps.draft import Draft
from penjing.steps.step import Context


def amount(unit: str, network: fx.GraphModule, call: Call) -> float:
    """Multiply-accumulates of one sample ("macs"), numbers of all parameters ("params"), or their and buffers' bytes.

    Args:
        unit: "macs", "params" or "size" (bytes).
        network: A captured network.
        call: Example inputs.
    """
    if unit == "macs":
        return float(totals(cost(network, call)).macs)
    if unit == "params":
        return float(sum(p.numel() for p in network.parameters()))
    return float(sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())))


def latency_left(context: Context, precision: str) -> Callable[[Draft, Draft], float]:
    """A function that measures two drafts side by side: the latency of the second as a part of the first's.

    Raises:
        PruningError: Nothing can be measured, because no runtime was named.
    """
    if context.latency is None:
        raise PruningError(
            "a latency can only be aimed at in a runtime",
            got="no runtime",
            expected="pj.run(..., runtime=...) or penjing compress",
        )
    measure = context.latency

    def left(before: Draft, after: Draft) -> float:
        whole, part = measure([before, after], precision)
        return part / whole

    return left


__all__ = ["amount", "latency_left"]
