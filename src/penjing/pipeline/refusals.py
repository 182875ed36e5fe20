"""Which operators a runtime can't take: the network is exported, opened and run there.

Where that fails, parts of it are tried, until what is left fails alone: the smallest part, which is what the runtime's
makers want to see. A runtime works in a process of its own, so that a crash is a failure like any other.
"""

from __future__ import annotations

import operator
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing import runtimes
from penjing.errors import OutputError, PenjingError
from penjing.network.graph import flat_inputs, kind, line, site
from penjing.onnx_files import write as onnx_file
from penjing.pipeline import evidence
from penjing.pipeline.building import build
from penjing.records.folder import check_writable, writing
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

Nodes = list[fx.Node]
OF_THE_WHOLE = ("no-levels", "ports", "varying-sizes")
"""Codes of errors that say something of a network as a whole: no operator of it is to blame, no part either."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The smallest part of a network that a runtime can't take.

    Attributes:
        sites: Its operators, usually one.
        kind: Of the last of them; "network" where the network as a whole is refused.
        where: The line of the user's code, or the node of the ONNX file; "" where unknown.
        stage: "export", "open" or "run".
        reason: What the exporter or the runtime says.
        alike: Sites of further operators that are the same but for their place.
        shapes: Whether it fails only where sizes vary.
        saved: The file that it was written to; None where none was asked for.
    """

    sites: tuple[str, ...]
    kind: str
    where: str
    stage: str
    reason: str
    alike: tuple[str, ...] = ()
    shapes: bool = False
    saved: str | None = None


@dataclass(frozen=True)
class _Trouble:
    stage: str
    reason: str
    code: str = ""


def refused(
    network: fx.GraphModule,
    task: Task,
    runtime: str,
    save: Path | None = None,
    events: Callable[..., None] | None = None,
) -> tuple[Refusal, ...]:
    """The parts of a captured network that a runtime can't take; none where it runs there.

    Args:
        network: The captured network.
        task: Gives an example, and the axes that vary.
        runtime: The runtime's name.
        save: Write the smallest failing part there, as ``.onnx``, or ``.pt2`` where it has no ONNX form; further ones
            get a number.
        events: Reports the parts that are tried.

    Raises:
        OutputError: `save` can't be written, or parts of an earlier call lie there.
    """
    if save is not None:
        check_files(save)
    search = _Search(network, task, runtime, events)
    refused_parts = search.refusals()
    if save is None:
        return tuple(refusal for refusal, _ in refused_parts)
    paths = [save if i == 0 else save.with_name(f"{save.stem}-{i + 1}{save.suffix}") for i in range(len(refused_parts))]
    return tuple(
        replace(refusal, saved=str(_saved(part, path)))
        for (refusal, part), path in zip(refused_parts, paths, strict=True)
    )


def check_files(save: Path) -> None:
    """Raise OutputError where parts can't be written under a name, or files of such names are there already.

    They might be the user's own, such as the source; and where nothing fails they would be taken for what does.
    """
    check_writable(save)
    names = re.compile(rf"{re.escape(save.stem)}(-({'|'.join(runtimes.SPECS)}))?(-\d+)?\.(onnx|pt2)")
    taken = [file for file in sorted(save.parent.glob("*")) if names.fullmatch(file.name)]
    if taken:
        raise OutputError(
            "the file for what fails exists already",
            code="exists",
            got=", ".join(str(file) for file in taken),
            expected="a new name",
            remedy="choose another name with --save-failing, or remove it first",
        )


@dataclass(frozen=True)
class _Part:
    """Some operators of a network as a network of their own, its example inputs, and the axes of them that vary."""

    network: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    dynamic: Any


class _Search:
    def __init__(self, network: fx.GraphModule, task: Task, runtime: str, events: Callable[..., None] | None) -> None:
        self.network, self.task, self.runtime = network, task, runtime
        self.events = events or (lambda kind, **values: None)
        self.nodes: Nodes = [n for n in network.graph.nodes if n.op in ("call_module", "call_function")]
        self.values: dict[fx.Node, Any] = {}
        self.axes = _axes(network, task)
        self.varying = False
        self.tried = 0

    def refusals(self) -> list[tuple[Refusal, _Part]]:
        whole = self._ask(self.network, self.task)
        if whole is None:
            return []
        self.values = _values(self.network, self.task)
        if whole.code in OF_THE_WHOLE:
            refusal, part = self._told(self.nodes, whole=whole)
            return [(replace(refusal, kind="network", where=""), part)]
        self.varying = self._fails(self.nodes) is None  # with the example's sizes it runs
        if self.varying:
            return [self._first(whole)]
        found: list[Nodes] = []
        left = self.nodes
        while (trouble := self._fails(left)) is not None:
            smallest = self._named(left, trouble) or self._smallest(left)
            found += smallest
            known = {self._likeness(part) for part in smallest}
            gone = {node for part in smallest for node in part}
            left = [n for n in left if n not in gone and self._likeness([n]) not in known]
        return [self._told(part, alike) for part, alike in self._grouped(found)]

    def _grouped(self, found: Iterable[Nodes]) -> Iterator[tuple[Nodes, list[str]]]:
        """One part for every likeness, in the order of execution, with the sites of all others."""
        place = {node: i for i, node in enumerate(self.nodes)}
        in_order = sorted(found, key=lambda part: place[part[-1]])
        first = {self._likeness(part): part for part in reversed(in_order)}
        first = dict(reversed(first.items()))
        for likeness, part in first.items():
            yield part, [site(n) for n in self.nodes if self._likeness([n]) == likeness and n not in part]

    def _told(self, nodes: Nodes, alike: Sequence[str] = (), whole: _Trouble | None = None) -> tuple[Refusal, _Part]:
        trouble = self._fails(nodes) or whole
        assert trouble is not None
        last = nodes[-1]
        refusal = Refusal(
            sites=tuple(site(node) for node in nodes),
            kind=kind(self.network, last),
            where=line(last).removeprefix(" (").removesuffix(")"),
            stage=trouble.stage,
            reason=trouble.reason,
            alike=tuple(alike),
            shapes=self.varying,
        )
        part = self._part(nodes)
        assert part is not None
        return refusal, part

    def _first(self, whole: _Trouble) -> tuple[Refusal, _Part]:
        """Where sizes have to vary: the shortest beginning of the network that fails, for its inputs are the user's."""
        low, high = 0, len(self.nodes)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fails(self.nodes[:middle]) is not None else (middle, high)
        return self._told(self.nodes[:high], whole=whole)

    def _named(self, nodes: Nodes, trouble: _Trouble) -> list[Nodes]:
        """Operators that the failure names and that fail alone, one of each likeness."""
        candidates: dict[Any, fx.Node] = {}
        for node in nodes:
            name = str(node.target).removesuffix(".default").rpartition(".")[2]
            if site(node) in trouble.reason or (node.op == "call_function" and name in trouble.reason):
                candidates.setdefault(self._likeness([node]), node)
        return [[node] for node in list(candidates.values())[:8] if self._fails([node]) is not None]

    def _smallest(self, nodes: Nodes) -> list[Nodes]:
        """Parts that fail, none of which can be made smaller: halves, and where both run, what is left of the whole."""
        if len(nodes) == 1:
            return [nodes]
        middle = len(nodes) // 2
        parts = [half for half in (nodes[:middle], nodes[middle:]) if self._fails(half) is not None]
        if parts:
            return [smallest for half in parts for smallest in self._smallest(half)]
        first, last = 0, len(nodes)
        first = self._end(lambda at: nodes[at:last], 0, middle)
        last = len(nodes) - self._end(lambda at: nodes[first : len(nodes) - at], 0, len(nodes) - middle)
        return [nodes[first:last]]

    def _end(self, rest: Callable[[int], Nodes], low: int, high: int) -> int:
        """How many operators can be taken away so that the rest still fails: `low` can, `high` can't."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fails(rest(middle)) is not None else (low, middle)
        return low

    def _fails(self, nodes: Nodes) -> _Trouble | None:
        part = self._part(nodes)
        if part is None:
            return None
        self.tried += 1
        self.events("progress", label=f"parts tried in {self.runtime}", done=self.tried, total=self.tried + len(nodes))
        trouble = self._ask(part.network, Task(example=part.inputs, dynamic=part.dynamic))
        return None if trouble is not None and trouble.code in OF_THE_WHOLE else trouble

    def _ask(self, network: fx.GraphModule, task: Task) -> _Trouble | None:
        """What goes wrong when the runtime is given a network; None where it runs."""
        stage, aside = "export", ""
        args, kwargs = task.call()
        try:
            with tempfile.TemporaryDirectory(prefix="penjing-") as aside, torch.no_grad():
                structure = flatten_outputs(network(*args, **kwargs))[1]
                manifest = build(Draft(network), self.runtime, "fp32", task, structure, Path(aside), tuned=False)
                stage = "open"
                session = isolated.open_artifact(aside, 1)
                stage = "run"
                session.run(evidence.arrays(manifest, (args, kwargs)))
        except Exception as error:  # of torch, of the exporter, of the runtime, or that its process has ended
            text, code = f"{type(error).__name__}: {error}", ""
            if isinstance(error, PenjingError):
                code = error.code
                stage = "open" if error.code == "unreadable" else stage
                text = f"{error.what}: {error.got}" if error.got else error.what
            words = text.replace(f"{aside}: ", "").replace(f"{aside}/", "").split()
            return _Trouble(stage, " ".join(words)[:600], code)
        return None

    def _likeness(self, nodes: Nodes) -> Any:
        """What operators have in common that differ in their place alone."""

        def of(node: fx.Node) -> Any:
            def read(n: fx.Node) -> Any:
                value = self.values.get(n)
                return f"{value.dtype} {value.dim()}" if isinstance(value, torch.Tensor) else type(value).__name__

            target = self.network.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            return repr((target, fx.node.map_arg((node.args, node.kwargs), read)))

        return tuple(of(node) for node in nodes)

    def _part(self, nodes: Nodes) -> _Part | None:
        """These operators alone; None where they take or give no tensor."""
        graph, env = fx.Graph(), {}
        inputs: list[torch.Tensor] = []
        axes: dict[str | int, dict[int, str]] = {}
        inside = set(nodes)

        def given(value: Any, read: fx.Node | None) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(given(one, None) for one in value)
            if not isinstance(value, torch.Tensor):
                return value  # a size: what it is in the example
            if self.varying and read in self.axes:
                axes[len(inputs)] = self.axes[read]
            inputs.append(value)
            return graph.placeholder(f"input_{len(inputs)}")

        for node in nodes:  # all inputs stand first
            for read in node.all_input_nodes:
                if read not in inside and read not in env and read.op != "get_attr":
                    env[read] = given(self.values[read], read)
        for node in nodes:
            for read in node.all_input_nodes:
                if read not in env:
                    env[read] = graph.node_copy(read)
            env[node] = graph.node_copy(node, lambda n: env[n])
        results = []
        for node in nodes:
            value = self.values[node]
            if node.users and all(user in inside for user in node.users):
                continue
            if isinstance(value, torch.Tensor):
                results.append(env[node])
            elif isinstance(value, tuple | list):
                tensors = [i for i, one in enumerate(value) if isinstance(one, torch.Tensor)]
                results += [graph.call_function(operator.getitem, (env[node], i)) for i in tensors]
        if not inputs or not results:
            return None
        graph.output(tuple(results))
        return _Part(fx.GraphModule(self.network, graph).eval(), tuple(inputs), axes)


def _axes(network: fx.GraphModule, task: Task) -> dict[fx.Node, dict[int, str]]:
    """The axes of the network's inputs that vary."""
    inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
    if task.dynamic is None:
        return {node: {0: "batch"} for node in inputs}
    named = [(node, task.dynamic.get(str(node.target), task.dynamic.get(i))) for i, node in enumerate(inputs)]
    return {node: dict(axes) for node, axes in named if axes}


def _values(network: fx.GraphModule, task: Task) -> dict[fx.Node, Any]:
    """The result of every node for the task's example."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(network).run(*flat_inputs(network, task.call()), enable_io_processing=False)
    return values


def _saved(part: _Part, path: Path) -> Path:
    """Write a part as ONNX, or as an exported program where it has no ONNX form; the path that it was written to."""
    names = [f"output_{i}" for i in range(len(flatten_outputs(part.network(*part.inputs))[0]))]
    with writing(path.parent, what="the file for what fails", remedy="free some space, or choose another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.with_suffix(".onnx")
            onnx_file.write(part.network, (part.inputs, {}), part.dynamic, names, file)
        except OSError:
            raise
        except Exception:  # of the exporter
            file = path.with_suffix(".pt2")
            with torch.no_grad():
                torch.export.save(torch.export.export(part.network, part.inputs), file)
    return file
