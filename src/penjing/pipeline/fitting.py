"""Whether a network, a plan or an artifact fits into a device, and the layer that breaks the limit if it does not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from penjing.analyze.activations import Activations, activations
from penjing.analyze.cost import FREE, cost
from penjing.errors import TargetError
from penjing.measure import vela
from penjing.network.graph import is_tensor, kind, line, sites, tensor_inputs
from penjing.recipes.recipe import Recipe
from penjing.records import DeviceFigures, LayerRow, Rejection
from penjing.report.numbers import figure
from penjing.steps.plan import Plan
from penjing.targets import Target
from penjing.targets.narrowing import INTEGERS
from penjing.tasks.call import Call

_SHRINKS = ("replace", "structure", "share")  # stages of steps that may make a network fit


@dataclass(frozen=True, kw_only=True)
class Excess:
    """One limit that is broken.

    Attributes:
        code: "storage", "memory", "operator" or "format".
        site: The layer that breaks it.
        got: What it is, in words.
        limit: What the device has.
        remedy: What can be done.
    """

    code: str
    site: str
    got: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.site}: {self.got}; {self.limit}: {self.remedy}"


def check_source(target: Target, network: fx.GraphModule, call: Call, recipe: Recipe) -> None:
    """Refuse a network that no format of the device makes fit, where the recipe has no step that makes it smaller.

    Raises:
        TargetError: Names the layer and the limit.
    """
    if any(step.stage in _SHRINKS for step in recipe):
        return
    integers = any(p in INTEGERS for p in target.precisions) and recipe.quantizes
    bits = min(target.weights.bits) if integers else 16 if "fp16" in target.precisions else 32
    rows = tuple(cost(network, call))
    over = _over(target, network, call, rows, bits, 1 if integers else None)
    for excess in (*illegal_operators(target, network), *over):
        raise TargetError(
            f"the network does not fit into {target.name}",
            code=excess.code,
            field=excess.site,
            got=f"{excess.site}: {excess.got}",
            expected=excess.limit,
            remedy=excess.remedy,
        )


def would_break(target: Target, network: fx.GraphModule, call: Call) -> tuple[Excess, ...]:
    """The limits that a network breaks in the device's narrowest usual format: 8 bits where it has integers."""
    bits, element = _usual(target)
    over = _over(target, network, call, tuple(cost(network, call)), bits, element)
    return (*illegal_operators(target, network), *over)


def expected(target: Target, network: fx.GraphModule, call: Call) -> DeviceFigures:
    """What a network needs there in that format: its weights without a file around them, and its activations."""
    bits, element = _usual(target)
    size = sum(-(-row.parameters * bits // 8) for row in cost(network, call))
    return figures(target, activations(network, call, element), size)


def _usual(target: Target) -> tuple[int, int | None]:
    """Bits of a weight, and bytes of an activation (None: its own), in the device's narrowest usual format."""
    if any(p in INTEGERS for p in target.precisions):
        return min(8, max(target.weights.bits)), 1
    return 16 if "fp16" in target.precisions else 32, None


def needed(network: fx.GraphModule, call: Call, plan: Plan, precision: str) -> Activations:
    """What an artifact's activations need: one byte a value in integers, four where the plan leaves floats.

    Args:
        network: That the artifact is built from.
        call: Example inputs.
        plan: Its plan; empty for one in floating point.
        precision: Of the artifact.
    """
    integers = precision in INTEGERS
    return activations(network, call, 1 if integers else None, plan.floats if integers else ())


def figures(target: Target, needs: Activations, size_bytes: int) -> DeviceFigures:
    """What an artifact needs on the device; `size_bytes` is that of its files."""
    return DeviceFigures(
        storage_bytes=size_bytes,
        memory_bytes=needs.size_bytes + (size_bytes if target.limits.weights_in == "memory" else 0),
        activation_bytes=needs.size_bytes,
        activation_bytes_as_given=needs.graph_bytes,
        site=needs.site,
        alive=needs.alive,
        proved=needs.proved,
    )


def broken(
    target: Target, network: fx.GraphModule, plan: Plan, rows: Collection[LayerRow], needs: DeviceFigures
) -> tuple[Excess, ...]:
    """The limits that an artifact breaks.

    Args:
        target: The device.
        network: That the artifact was built from.
        plan: Its plan; empty for one in floating point.
        rows: Its layers, with the bytes of their weights as they are stored.
        needs: What it needs.
    """
    sizes = {row.name: row.weight_bytes for row in rows}
    return (
        *illegal_operators(target, network),
        *_illegal_formats(target, plan),
        *_storage(target, needs.storage_bytes, sizes),
        *_memory(target, needs.memory_bytes, needs.activation_bytes, needs.site, needs.alive),
        *_estimated(target, needs),
    )


def compiled(target: Target, file: Path, needs: DeviceFigures) -> tuple[DeviceFigures, tuple[str, ...]]:
    """The figures with the estimate of the device's compiler, and the operators that it leaves to the processor.

    Args:
        target: The device; without a compiler, nothing is added.
        file: What the compiler takes.
        needs: The figures as far as they are known.

    Raises:
        MissingDependency: The compiler is not installed.
        ArtifactError: It can't compile the file.
    """
    check = target.check
    if check is None:
        return needs, ()
    told = vela.estimate(file, check.accelerator, check.system, check.memory)
    return replace(needs, compiler=told.compiler, estimate=told.figures), told.left


def rejection(
    target: Target, network: fx.GraphModule, plan: Plan, rows: Collection[LayerRow], needs: DeviceFigures
) -> Rejection | None:
    """Why an artifact is not offered for a device, with the layer; None where it fits."""
    excesses = broken(target, network, plan, rows, needs)
    if not excesses:
        return None
    return Rejection(reason="; ".join(map(str, excesses)), operator=excesses[0].site)


def illegal_operators(target: Target, network: fx.GraphModule) -> tuple[Excess, ...]:
    """The operators that a device does not have at all, one of each kind."""
    if target.legal is None:
        return ()
    first: dict[str, tuple[str, fx.Node]] = {}
    for name, node in sites(network).items():
        what = kind(network, node)
        if what not in target.legal and what not in FREE and not _is_arithmetic_on_sizes(node):
            first.setdefault(what, (name, node))
    return tuple(
        Excess(
            code="operator",
            site=name,
            got=f"the operator {what}{line(node)}",
            limit=f"{target.name} has {', '.join(sorted(target.legal))}",
            remedy=f"write it with operators that {target.name} has",
        )
        for what, (name, node) in first.items()
    )


def _is_arithmetic_on_sizes(node: fx.Node) -> bool:
    return node.op == "call_function" and (not is_tensor(node) or not tensor_inputs(node))


def _illegal_formats(target: Target, plan: Plan) -> Iterator[Excess]:
    """The first edge of a plan whose integers the device does not have."""
    for edge, entry in sorted(plan.entries.items()):
        weight = edge.endswith(":weight")
        formats = target.weights if weight else target.activations
        refusal = formats.refusal(entry.spec)
        if refusal is not None:
            yield Excess(
                code="format",
                site=edge,
                got=refusal.got,
                limit=f"{target.name} takes {refusal.takes} for {'weights' if weight else 'activations'}",
                remedy="change the step's settings, or leave them to the target",
            )
            return


def _over(
    target: Target, network: fx.GraphModule, call: Call, rows: Collection[LayerRow], bits: int, element: int | None
) -> Iterator[Excess]:
    sizes = {row.name: -(-row.parameters * bits // 8) for row in rows}
    size = sum(sizes.values())
    yield from _storage(target, size, sizes, f" at {bits} bits a weight")
    if target.limits.memory_bytes is None:
        return
    needs = activations(network, call, element)
    weights = size if target.limits.weights_in == "memory" else 0
    yield from _memory(target, needs.size_bytes + weights, needs.size_bytes, needs.site, needs.alive)


def _storage(target: Target, size: int, sizes: Mapping[str, int], how: str = "") -> Iterator[Excess]:
    limit = target.limits.storage_bytes
    if limit is None or size <= limit:
        return
    name, largest = max(sizes.items(), key=lambda item: item[1], default=("the artifact", size))
    yield Excess(
        code="storage",
        site=name,
        got=f"the largest layer with {_bytes(largest)}, of {_bytes(size)} in all{how}",
        limit=f"{target.name} stores {_bytes(limit)}",
        remedy="prune it (--recipe joint), give its weights fewer bits or ranks (decompose.LowRank), or share them",
    )


def _memory(target: Target, size: int, live: int, site: str, alive: Mapping[str, int]) -> Iterator[Excess]:
    limit = target.limits.memory_bytes
    if limit is None or size <= limit:
        return
    largest = ", ".join(f"{name} {_bytes(one)}" for name, one in list(alive.items())[:3])
    beside = f" beside {_bytes(size - live)} of weights" if size > live else ""
    yield Excess(
        code="memory",
        site=site,
        got=f"while it runs, {_bytes(live)} of activations are alive{beside} ({largest})",
        limit=f"{target.name} has {_bytes(limit)}",
        remedy="smaller inputs, an earlier stride or pooling, or fewer channels there (prune.Channels)",
    )


def _estimated(target: Target, needs: DeviceFigures) -> Iterator[Excess]:
    """What the device's compiler needs beyond a limit."""
    memory, storage = target.limits.memory_bytes, target.limits.storage_bytes
    for name, code, limit in (("sram_bytes", "memory", memory), ("flash_bytes", "storage", storage)):
        size = needs.estimate.get(name, 0.0)
        if limit is not None and size > limit:
            yield Excess(
                code=code,
                site=needs.site,
                got=f"{needs.compiler} needs {_bytes(int(size))} of {name.removesuffix('_bytes')}",
                limit=f"{target.name} has {_bytes(limit)}",
                remedy="smaller inputs, fewer channels at the peak, or another memory mode in the profile",
            )


def _bytes(size: int) -> str:
    return figure(size, "bytes")
