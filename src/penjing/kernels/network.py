"""A captured network as a list of operations on NHWC values: what a library of kernels computes.

Batch norms are folded into the convolution before them, exactly for binary ones too: their scale and shift are those of
the kernel. A linear layer is a convolution whose window is the whole image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from penjing.errors import ExportError
from penjing.kernels.binary import Convolution
from penjing.network.graph import arguments, kind, line, operator_name, shapes, site

MOST_TAPS = 31  # of a binary window along an axis, whose borders a library tells apart
Shape = tuple[int, int, int]  # height, width, channels


@dataclass(frozen=True)
class Operation:
    """One operation on values of one sample.

    Attributes:
        kind: "convolution", "binary", "ternary" (of weights), "add", "relu", "add_relu", "average" (of all pixels),
            "maximum" (of a window), "planes" (an image laid out as a vector, channel by channel), "sign" (as numbers).
        inputs: Names of the values that it reads.
        output: Name of the value that it writes.
        window: Of a convolution or a maximum.
        arrays: float32: "weights" (filters, height, width, channels), "scale", "shift" and, of binary layers,
            "threshold". Weights that are whole multiples of a step are int8, and the step is in "scale".
        site: The network's name of it; "" where it has none.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    window: Convolution | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    site: str = ""


@dataclass
class Described:
    """A network as operations.

    Attributes:
        operations: In execution order.
        shapes: Value → height, width, channels.
        input: Name of the input's value.
        output: Name of the output's value.
    """

    operations: list[Operation]
    shapes: dict[str, Shape]
    input: str
    output: str


def described(network: fx.GraphModule, input_shape: tuple[int, ...]) -> Described:
    """Return the operations of a network of one input and one output.

    Args:
        network: A captured network in floating point, such as `penjing.quantize.Binary` leaves it.
        input_shape: Channels, height, width of an image, or channels of a vector.

    Raises:
        ExportError: There is an operator that these kernels lack; the error names it.
    """
    return _Reader(network, input_shape).read()


class _Reader:
    """Reads a graph, node by node."""

    def __init__(self, network: fx.GraphModule, input_shape: tuple[int, ...]) -> None:
        self.network, self.input_shape = network, input_shape
        self.real = shapes(network, ((torch.zeros(2, *input_shape),), {}))  # in torch, of two samples
        self.operations: list[Operation] = []
        self.shapes: dict[str, Shape] = {}
        self.values: dict[fx.Node, str] = {}  # a node's value; nodes that change nothing share one
        self.signs: dict[fx.Node, np.ndarray] = {}  # node of signs → thresholds

    def read(self) -> Described:
        entry = output = ""
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                if entry:
                    raise self._refused(node, "a second input")
                channels, height, width = (*self.input_shape, 1, 1)[:3]
                entry = self._new(node, (height, width, channels))
            elif node.op == "output":
                given = node.args[0]
                (given,) = given if isinstance(given, tuple | list) and len(given) == 1 else (given,)
                output = self._result(node, given)
                if output == entry:
                    raise self._refused(node, "an output that is the input")
            elif node.op != "get_attr":
                handler = _HANDLERS.get(_word(self.network, node))
                if handler is None:
                    raise self._refused(node, _word(self.network, node))
                handler(self, node)
                self._compare(node)
        return Described(self.operations, self.shapes, entry, output)

    def _result(self, node: fx.Node, given: Any) -> str:
        """The value of the output."""
        if not isinstance(given, fx.Node) or given not in self.values:
            raise self._refused(node, "several outputs, or an output of signs")
        return self.values[given]

    def _compare(self, node: fx.Node) -> None:
        """Refuse a node whose value has other axes in torch: those of an image, or all of them as one."""
        if node not in self.values:
            return
        height, width, channels = self.shapes[self.values[node]]
        real = tuple(self.real[node.name].shape[1:])
        if real not in ((channels, height, width), (channels * height * width,)):
            raise self._refused(node, f"{_word(self.network, node)} to the shape {list(real)}")

    def _refused(self, node: fx.Node, what: str) -> ExportError:
        return ExportError(
            "a library of kernels can't compute this network",
            code="operator",
            got=f"{what} at {site(node)}{line(node)}",
            expected=f"one of {', '.join(sorted(_HANDLERS))}",
            remedy="write that operator with others, or choose another runtime",
        )

    def _new(self, node: fx.Node, shape: Shape) -> str:
        self.values[node] = node.name
        self.shapes[node.name] = shape
        return node.name

    def _value(self, node: fx.Node, place: int = 0) -> str:
        given: Any = node.args[place]
        if given not in self.values:
            raise self._refused(node, "a constant, or signs outside a binary layer")
        return self.values[given]

    def _same(self, node: fx.Node) -> None:
        self.values[node] = self._value(node)

    def _last(self, name: str, node: fx.Node) -> Operation | None:
        """The operation that writes this value, if `node` alone reads it."""
        given: Any = node.args[0]
        wrote = [o for o in self.operations if o.output == name]
        return wrote[0] if wrote and len(given.users) == 1 and given.name == name else None

    def convolution(self, node: fx.Node) -> None:
        module: Any = self.network.get_submodule(str(node.target))
        given: Any = node.args[0]
        threshold = self.signs.get(given)
        if threshold is not None and not _two_levels(module.weight):
            name, threshold = self._signs(node, given, threshold), None
        else:
            name = self.values[given.args[0]] if threshold is not None else self._value(node)
        height, width, channels = self.shapes[name]
        if isinstance(module, nn.Linear):
            if self.real[given.name].dim() != 2:
                raise self._refused(node, "a linear layer along one axis of an image")
            weight = module.weight.reshape(module.out_features, -1, height, width)
            if threshold is not None and height * width > 1:
                name, height, width, channels = self._vector(name, node)
                weight = module.weight[..., None, None]
            settings: dict[str, Any] = {"kernel": (height, width)}
        else:
            weight = module.weight
            settings = {word: tuple(getattr(module, word)) for word in ("stride", "dilation")}
            pad = _padding(module)
            settings |= {"kernel": tuple(module.kernel_size), "pad": pad}
            if module.groups != 1 or not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or pad is None:
                raise self._refused(node, "a convolution with groups, not in two dimensions, or with uneven padding")
        filters = len(weight)
        if weight.shape[1] != channels:
            raise self._refused(node, "a layer of another input than its own")
        window = Convolution(height=height, width=width, channels=channels, filters=filters, **settings)
        arrays = {"weights": _array(weight).transpose(0, 2, 3, 1), "scale": np.ones(filters, np.float32)}
        arrays["shift"] = np.zeros(filters, np.float32) if module.bias is None else _array(module.bias)
        if threshold is not None:
            if max(window.kernel) > MOST_TAPS:
                raise self._refused(node, f"a binary window of more than {MOST_TAPS} taps along an axis")
            scale = np.abs(arrays["weights"]).max((1, 2, 3))
            arrays |= {"scale": scale, "threshold": threshold, "weights": arrays["weights"] >= 0}
        which = "convolution" if threshold is None else "binary"
        if threshold is None and (scale := _levels(arrays["weights"])) is not None:
            arrays |= {"weights": np.sign(arrays["weights"]).astype(np.int8), "scale": scale}
            which = "ternary"
        elif threshold is None and (step := _steps(arrays["weights"])) is not None:
            every = step[:, None, None, None]
            whole = np.divide(arrays["weights"], every, out=np.zeros_like(arrays["weights"]), where=every > 0)
            arrays |= {"weights": np.rint(whole).astype(np.int8), "scale": step}
        output = self._new(node, (*window.outputs, filters))
        self.operations.append(Operation(which, (name,), output, window, arrays, site(node)))

    def _signs(self, node: fx.Node, given: fx.Node, threshold: np.ndarray) -> str:
        """Signs as numbers, for weights of more than two levels; the name of the value."""
        before: Any = given.args[0]
        name = self.values[before]
        if self.shapes[name][2] != len(threshold):
            raise self._refused(node, "signs of a flattened image that weights of more than two levels read")
        self.shapes[given.name] = self.shapes[name]
        self.operations.append(Operation("sign", (name,), given.name, arrays={"threshold": threshold}))
        return given.name

    def _vector(self, name: str, node: fx.Node) -> tuple[str, int, int, int]:
        """An image as a vector whose channels are those of a flattened image; its name, height, width, channels."""
        height, width, channels = self.shapes[name]
        laid = f"{node.name}_vector"
        self.shapes[laid] = (1, 1, height * width * channels)
        self.operations.append(Operation("planes", (name,), laid))
        return laid, *self.shapes[laid]

    def batch_norm(self, node: fx.Node) -> None:
        name = self._value(node)
        if node.op != "call_module" or self.network.get_submodule(str(node.target)).running_var is None:
            raise self._refused(node, "a batch norm with the statistics of its batch")
        before = self._last(name, node)
        if before is None or before.kind not in ("convolution", "binary", "ternary"):
            raise self._refused(node, "a batch norm that is not behind a convolution of its own")
        module: Any = self.network.get_submodule(str(node.target))
        factor = _array(
            torch.rsqrt(module.running_var + module.eps) * (1.0 if module.weight is None else module.weight)
        )
        shift = -_array(module.running_mean) * factor + (0.0 if module.bias is None else _array(module.bias))
        arrays = before.arrays | {
            "scale": before.arrays["scale"] * factor, "shift": before.arrays["shift"] * factor + shift,
        }  # fmt: skip
        self.operations[self.operations.index(before)] = replace(before, arrays=arrays)
        self._same(node)
        self._rename(name, node)

    def _rename(self, name: str, node: fx.Node) -> None:
        """Let a value have the name of the node that is now its last."""
        self.operations = [replace(o, output=node.name) if o.output == name else o for o in self.operations]
        self.shapes[node.name] = self.shapes.pop(name)
        self.values = {n: node.name if v == name else v for n, v in self.values.items()}

    def sign(self, node: fx.Node) -> None:
        self._value(node)
        module: Any = self.network.get_submodule(str(node.target))
        self.signs[node] = _array(module.threshold)

    def relu(self, node: fx.Node) -> None:
        name = self._value(node)
        before = self._last(name, node)
        if before is not None and before.kind == "add":
            self.operations[self.operations.index(before)] = replace(before, kind="add_relu")
            self._same(node)
            self._rename(name, node)
        else:
            self.operations.append(Operation("relu", (name,), self._new(node, self.shapes[name])))

    def add(self, node: fx.Node) -> None:
        names = self._value(node), self._value(node, 1)
        if arguments(node).get("alpha", 1) != 1:
            raise self._refused(node, "a weighted addition")
        if self.shapes[names[0]] != self.shapes[names[1]]:
            raise self._refused(node, "an addition that broadcasts")
        self.operations.append(Operation("add", names, self._new(node, self.shapes[names[0]]), site=site(node)))

    def average(self, node: fx.Node) -> None:
        name = self._value(node)
        self.operations.append(Operation("average", (name,), self._new(node, (1, 1, self.shapes[name][2]))))

    def maximum(self, node: fx.Node) -> None:
        given, name = arguments(node), self._value(node)
        height, width, channels = self.shapes[name]
        if given["ceil_mode"]:
            raise self._refused(node, "a maximum with ceil_mode")
        window = Convolution(
            height=height, width=width, channels=channels, filters=channels, kernel=_pair(given["kernel_size"]),
            stride=_pair(given["stride"] or given["kernel_size"]), pad=_pair(given["padding"]),
            dilation=_pair(given["dilation"]),
        )  # fmt: skip
        self.operations.append(Operation("maximum", (name,), self._new(node, (*window.outputs, channels)), window))


def has_levels(network: fx.GraphModule) -> bool:
    """Whether a layer has weights of two or three levels, which these kernels are for."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return any(_levels(_array(layer.weight)) is not None for layer in layers)


def _levels(weights: np.ndarray) -> np.ndarray | None:
    """α of every filter where all weights, (filters, …), are −α, 0 or α, and some filter has several; else None."""
    rows = np.abs(weights).reshape(len(weights), -1)
    scale: np.ndarray = rows.max(1)
    fits = ((rows == 0) | (rows == scale[:, None])).all() and rows.shape[1] > 1 and scale.any()
    return scale if fits else None


def _steps(weights: np.ndarray) -> np.ndarray | None:
    """The step of every filter of which all weights, (filters, …), are whole multiples up to 127; None: they are not.

    As `penjing.numerics.signs.in_bytes` makes them, up to their rounding.
    """
    rows = np.abs(weights).reshape(len(weights), -1)
    step: np.ndarray = rows.max(1) / np.float32(127)
    whole = np.rint(np.divide(rows, step[:, None], out=np.zeros_like(rows), where=step[:, None] > 0))
    fits = np.abs(whole * step[:, None] - rows) <= rows * np.float32(2**-21)
    return step if fits.all() and step.any() else None


def _two_levels(weight: Any) -> bool:
    """Whether all weights of every filter have one magnitude."""
    rows = weight.detach().abs().flatten(1)
    return bool((rows == rows[:, :1]).all())


def _padding(module: Any) -> tuple[int, ...] | None:
    """Of a convolution, in pixels at both ends of every axis; None where the ends differ."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    pairs = zip(module.kernel_size, module.dilation, strict=True)
    reach = [d * (k - 1) if module.padding == "same" else 0 for k, d in pairs]
    return None if any(n % 2 for n in reach) else tuple(n // 2 for n in reach)


def _word(network: fx.GraphModule, node: fx.Node) -> str:
    """What a node does, in one word."""
    if node.op == "call_module":
        return kind(network, node)
    name = operator_name(node)
    if name == "mean" and kind(network, node) == "avg_pool":
        return "mean of all pixels"
    return "global average" if name == "adaptive_avg_pool2d" and list(node.args[1]) == [1, 1] else name  # type: ignore[arg-type]


def _array(tensor: Any) -> np.ndarray:
    out: np.ndarray = tensor.detach().float().cpu().numpy()
    return out


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = [value] if isinstance(value, int) else value
    return first, (rest or [first])[0]


_HANDLERS: dict[str, Callable[[_Reader, fx.Node], None]] = {
    "conv": _Reader.convolution,
    "linear": _Reader.convolution,
    "batch_norm": _Reader.batch_norm,
    "batchnorm2d": _Reader.batch_norm,
    "sign": _Reader.sign,
    "relu": _Reader.relu,
    "add": _Reader.add,
    "global average": _Reader.average,
    "mean of all pixels": _Reader.average,
    "max_pool2d": _Reader.maximum,
    "flatten": _Reader._same,
    "view": _Reader._same,
    "reshape": _Reader._same,
    "dropout": _Reader._same,
    "identity": _Reader._same,
}

__all__ = ["Described", "Operation", "described", "has_levels"]
