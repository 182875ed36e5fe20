"""Operators between the scores of an attention and its softmax, where masks are added: they stay in floating point."""

from __future__ import annotations

from torch import fx

from penjing.network.graph import kind, tensor_inputs

REASON = "it feeds a softmax, where a mask would dominate its range"
SOFTMAX = frozenset({"softmax", "log_softmax"})
ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "clip", "clamp_min", "clamp_max", "maximum", "minimum"}
)
SELECTING = frozenset({"where", "masked_fill", "gather", "index", "slice", "select", "index_select", "narrow"})
MOVING = frozenset(
    {"reshape", "transpose", "expand", "identity", "dropout", "to", "type_as", "squeeze", "repeat", "broadcast_to"}
)
BETWEEN = ARITHMETIC | SELECTING | MOVING


def before_softmax(network: fx.GraphModule) -> dict[str, str]:
    """Return name of every arithmetic node that leads to a softmax → why it stays in floating point.

    A mask (−10,000, the lowest finite number, −infinity) is an ordinary value there: it would dominate the range and
    leave no resolution for the scores. Scales, position biases and sums of several masks lie on the same path, also
    behind reshapes. The softmax itself is computed in floating point, so integers in front of it would save no time.
    """
    reached: dict[str, str] = {}
    waiting = [n for end in network.graph.nodes if kind(network, end) in SOFTMAX for n in tensor_inputs(end)[:1]]
    while waiting:
        node = waiting.pop()
        if node.name in reached or kind(network, node) not in BETWEEN:
            continue
        reached[node.name] = REASON
        waiting += tensor_inputs(node)
    return reached
