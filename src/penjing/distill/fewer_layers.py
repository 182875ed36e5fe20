"""A student with fewer layers: some of the teacher's repeated layers, with their weights.

Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3: every second layer.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from penjing.errors import RecipeError
from penjing.network.graph import shapes, site, tensor_inputs
from penjing.steps.draft import Draft, Edit
from penjing.steps.settings import Rule, check, instance, whole
from penjing.steps.step import Context
from penjing.surgery import skip
from penjing.tasks.task import Call


def _layers(keep: Any) -> bool:
    if not isinstance(keep, tuple):
        return COUNT.holds(keep)
    return bool(keep) and all(isinstance(i, int) for i in keep) and sorted(set(keep)) == list(keep)


COUNT = whole()
LAYERS = Rule(_layers, "3, or ascending indices of layers: (0, 2, 4)")


@dataclass(frozen=True, kw_only=True)
class FewerLayers:
    """Keep some layers of a stack and remove the others.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        of: The stack, for example "encoder.layer", whose layers are called "encoder.layer.0", "encoder.layer.1", …
        keep: The number of layers to keep, evenly spaced starting with the first; or the indices of those to keep.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    of: str
    keep: int | tuple[int, ...]

    def __post_init__(self) -> None:
        check(self, of=instance(str, '"encoder.layer"'), keep=LAYERS)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft without the layers.

        Raises:
            RecipeError: There is no such stack, or a layer's output can't be replaced by its input.
        """
        layers = self._layers(draft.network)
        remaining = _spread(len(layers), self.keep) if isinstance(self.keep, int) else self.keep
        if wrong := [i for i in remaining if not 0 <= i < len(layers)]:
            raise RecipeError(
                f"FewerLayers keeps a layer that {self.of} does not have",
                code="no-layer",
                got=", ".join(map(str, wrong)),
                expected=f"numbers from 0 to {len(layers) - 1}",
            )
        if isinstance(self.keep, int) and self.keep > len(layers):
            raise RecipeError(
                f"FewerLayers keeps more layers than {self.of} has",
                code="no-layer",
                got=self.keep,
                expected=len(layers),
            )
        network = copy.deepcopy(draft.network)
        edits: list[Edit] = []
        for number, name in enumerate(layers):
            if number not in remaining:
                edits.append(skip(network, *_ends(network, name, context.task.call())))
        context.events("layers", of=self.of, kept=sorted(remaining), removed=len(edits))
        return replace(draft, network=network, edits=(*draft.edits, *edits))

    def _layers(self, network: fx.GraphModule) -> list[str]:
        """The stack's layers in execution order."""
        parts: dict[str, None] = {}
        stacks: dict[str, None] = {}
        for node in network.graph.nodes:
            words = site(node).replace("/", ".").split(".")
            for depth, word in enumerate(words):
                if word.isdigit() and depth and depth < len(words) - 1:
                    stacks[".".join(words[:depth])] = None
                    if ".".join(words[:depth]) == self.of:
                        parts[".".join(words[: depth + 1])] = None
        if not parts:
            near = difflib.get_close_matches(self.of, stacks, n=3, cutoff=0.3) or list(stacks)[:3]
            raise RecipeError(
                "the network has no such stack of layers",
                code="no-stack",
                got=self.of,
                expected="the name of a list of layers, without an index",
                remedy=f"did you mean {' or '.join(near)}?" if near else "`penjing inspect` lists the layers",
            )
        return list(parts)


def _spread(count: int, keep: int) -> tuple[int, ...]:
    """
    >>> _spread(6, 3), _spread(12, 4), _spread(5, 2)
    ((0, 2, 4), (0, 3, 6, 9), (0, 2))
    """
    return tuple(dict.fromkeys(i * count // keep for i in range(keep)))


def _ends(network: fx.GraphModule, name: str, call: Call) -> tuple[str, str]:
    """The operator whose value leaves a layer, and the one outside whose value of the same shape enters it."""
    sizes = {node: tuple(value.shape) for node, value in shapes(network, call).items()}
    inside = [n for n in network.graph.nodes if site(n).startswith((f"{name}.", f"{name}/")) and n.op != "placeholder"]
    members = set(inside)
    leaving = [n for n in inside if any(user not in members for user in n.users)]
    entering = [x for n in inside for x in tensor_inputs(n) if x not in members and x.op != "get_attr"]
    alike = [
        x for x in dict.fromkeys(entering) if len(leaving) == 1 and sizes.get(x.name) == sizes.get(leaving[0].name)
    ]
    if not alike:
        outgoing = ", ".join(f"{site(n)} {sizes.get(n.name)}" for n in leaving)
        raise RecipeError(
            f"{name} can't be removed",
            code="irremovable",
            got=f"out of it: {outgoing or 'nothing'}; into it: {', '.join(str(sizes.get(x.name)) for x in entering)}",
            expected="exactly one value that leaves it, with the shape of one that enters",
            remedy="prune.Channels makes layers narrower",
        )
    return site(leaving[0]), site(alike[0])
