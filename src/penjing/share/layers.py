"""Layers that share their weights.

Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR 2020: all layers of a
stack are one. Here trained layers of equal shapes become one, wholly or in groups, and are trained on together.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import fx

from penjing.analyze.output_gradients import in_floating_point
from penjing.analyze.samples import batches
from penjing.errors import RecipeError, SharingError
from penjing.modes import in_eval_mode
from penjing.steps.draft import Draft
from penjing.steps.settings import Rule, check, instance, one_of, optional, whole
from penjing.steps.step import Context
from penjing.surgery import tie


def _groups(value: Any) -> bool:
    if not isinstance(value, tuple) or not all(isinstance(group, tuple) for group in value):
        return False
    words = [word for group in value for word in group]
    return all(len(group) > 1 for group in value) and all(isinstance(w, str) for w in words) and _different(words)


def _different(words: Sequence[str]) -> bool:
    return len(set(words)) == len(words)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Make layers, or parts of the network, share all their parameters; norms' statistics stay each one's own.

    Lan et al., "ALBERT", ICLR 2020. `Finetune` behind this step trains the shared weights: right after it, the network
    computes something else.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        groups: The parts that become one, by name: ``(("layers.0", "layers.1"), ("layers.2", "layers.3"))``.
        of: Instead of `groups`: a stack, for example "encoder.layer", whose layers are called "encoder.layer.0",
            "encoder.layer.1", …; with `every` or `count`.
        every: So many neighbours of the stack become one.
        count: So many different layers are left of the stack; the most similar ones become one.
        similarity: What is compared for `count`: "outputs", the noise at the network's outputs when two of them are
            one, on calibration data without labels; "weights", their distance relative to their size; "auto" is
            "outputs" where there is calibration data.
        value: Of the shared weights: the "mean" of the layers, or the "first".
        samples: Calibration samples that are read.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    groups: tuple[tuple[str, ...], ...] = ()
    of: str = ""
    every: int | None = None
    count: int | None = None
    similarity: Literal["auto", "outputs", "weights"] = "auto"
    value: Literal["mean", "first"] = "mean"
    samples: int = 64

    def __post_init__(self) -> None:
        check(
            self,
            groups=Rule(_groups, 'groups of two names or more, all different: (("layers.0", "layers.1"),)'),
            of=instance(str, '"encoder.layer"'),
            every=optional(whole(2)),
            count=optional(whole()),
            similarity=one_of("auto", "outputs", "weights"),
            value=one_of("mean", "first"),
            samples=whole(),
        )
        ways = [bool(self.groups), self.every is not None, self.count is not None]
        if sum(ways) != 1 or bool(self.of) == bool(self.groups):
            raise RecipeError(
                "Layers does not say which layers become one",
                code="contradiction",
                field="groups",
                got=f"groups={self.groups!r}, of={self.of!r}, every={self.every!r}, count={self.count!r}",
                expected='groups=, or of="encoder.layer" with either every=2 or count=3',
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft whose layers share parameters.

        Raises:
            RecipeError: A name does not exist.
            SharingError: The layers have parameters of different names or shapes, or none.
            CalibrationError: `similarity="outputs"` without calibration data.
        """
        draft = draft.copy()
        groups = self.groups or self._of_stack(draft.network, context)
        tensors = [names for group in groups for names in _alike(draft.network, group)]
        _give_values(draft.network, tensors, self.value)
        edit = tie(draft.network, tensors)
        context.events("tied", groups=[list(group) for group in groups], tensors=len(tensors))
        return replace(draft, edits=(*draft.edits, edit))

    def _of_stack(self, network: fx.GraphModule, context: Context) -> tuple[tuple[str, ...], ...]:
        """The groups of two and more layers of the stack."""
        layers = stack(network, self.of)
        if self.every is not None:
            parts = [layers[i : i + self.every] for i in range(0, len(layers), self.every)]
        else:
            assert self.count is not None
            if self.count >= len(layers):
                raise RecipeError(
                    f"{self.of} has fewer layers than are asked for, or as many",
                    code="no-layer",
                    got=f"count={self.count}",
                    expected=f"a number below {len(layers)}, the number of its layers",
                )
            _alike(network, layers)  # before anything is computed
            parts = grouped(layers, self._distances(network, layers, context), self.count)
        return tuple(tuple(part) for part in parts if len(part) > 1)

    def _distances(
        self, network: fx.GraphModule, layers: Sequence[str], context: Context
    ) -> dict[tuple[int, int], float]:
        """How different two layers are, for every two of them."""
        pairs = list(itertools.combinations(range(len(layers)), 2))
        known = context.task.calibration is not None
        if self.similarity == "weights" or (self.similarity == "auto" and not known):
            return {(a, b): _distance(network, _alike(network, (layers[a], layers[b]))) for a, b in pairs}
        calls = list(batches(context, self.samples))
        answers = _answers(network, calls)
        distances = {}
        for done, (a, b) in enumerate(pairs):
            trial = copy.deepcopy(network)
            tensors = _alike(trial, (layers[a], layers[b]))
            _give_values(trial, tensors, self.value)
            distances[a, b] = float((_answers(trial, calls) - answers).square().mean())
            context.events("progress", label="similarity", done=done + 1, total=len(pairs))
        return distances


def stack(network: fx.GraphModule, of: str) -> list[str]:
    """The layers "of.0", "of.1", … of a stack, in the order of their numbers.

    Raises:
        RecipeError: There is no such stack.
    """
    stacks: dict[str, set[int]] = {}
    for name, _ in network.named_parameters(remove_duplicate=False):
        words = name.split(".")
        for depth, word in enumerate(words[:-1]):
            if depth and word.isdigit():
                stacks.setdefault(".".join(words[:depth]), set()).add(int(word))
    if len(stacks.get(of, ())) < 2:
        near = difflib.get_close_matches(of, stacks, n=3, cutoff=0.3) or list(stacks)[:3]
        raise RecipeError(
            "the network has no such stack of layers",
            code="no-stack",
            got=of,
            expected="the name of a list of layers, without an index",
            remedy=f"did you mean {' or '.join(near)}?" if near else "name the layers with groups=",
        )
    return [f"{of}.{number}" for number in sorted(stacks[of])]


def grouped(layers: Sequence[str], distances: Mapping[tuple[int, int], float], count: int) -> list[list[str]]:
    """The layers in `count` groups, those of the smallest mean distance together (average linkage).

    Args:
        layers: Their names.
        distances: Of every two of them, by their numbers in ascending order.
        count: At least 1.
    """
    condensed = [distances[pair] for pair in itertools.combinations(range(len(layers)), 2)]
    labels = fcluster(linkage(condensed, "average"), count, "maxclust")
    groups: dict[int, list[str]] = {}
    for name, label in zip(layers, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return list(groups.values())


def _alike(network: fx.GraphModule, parts: Sequence[str]) -> list[list[str]]:
    """The parameters of each part, by their name within it; those of equal name become one.

    Raises:
        RecipeError: There is no such part.
        SharingError: The parts have parameters of different names or shapes.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    inside: dict[str, dict[str, str]] = {}
    for part in parts:
        own = {name.removeprefix(f"{part}."): name for name in parameters if name.startswith(f"{part}.")}
        if not own:
            known = {name.rsplit(".", depth)[0] for name in parameters for depth in range(1, name.count(".") + 1)}
            near = difflib.get_close_matches(part, known, n=3)
            raise RecipeError(
                "this layer does not exist, or has no parameters",
                code="no-layer",
                got=part,
                expected="the name of a layer or of a part of the network",
                remedy=f"did you mean {' or '.join(near)}?" if near else None,
            )
        inside[part] = own
    first = inside[parts[0]]
    for part, own in inside.items():
        shapes = {role: tuple(parameters[name].shape) for role, name in own.items()}
        due = {role: tuple(parameters[name].shape) for role, name in first.items()}
        if shapes != due:
            role = next(r for r in (*due, *shapes) if shapes.get(r) != due.get(r))
            raise SharingError(
                f"{part} and {parts[0]} can't share their parameters",
                code="different-shapes",
                got=f"{role}: {shapes.get(role, 'none')} in {part}, {due.get(role, 'none')} in {parts[0]}",
                expected="parameters of the same names and shapes",
                remedy="group layers of the same shape; share.Codebook(scope='global') shares values, not layers",
            )
    return [[inside[part][role] for part in parts] for role in first]


def _give_values(network: fx.GraphModule, tensors: Sequence[Sequence[str]], value: str) -> None:
    """Give the parameters of each group the value that they will share, in place."""
    with torch.no_grad():
        for names in tensors:
            each = [network.get_parameter(name) for name in names]
            shared = torch.stack([p.detach() for p in each]).mean(0) if value == "mean" else each[0].detach().clone()
            for parameter in each:
                parameter.copy_(shared)


def _distance(network: fx.GraphModule, tensors: Sequence[Sequence[str]]) -> float:
    """The squared distance of two layers over the product of their norms."""
    one, other = (
        torch.cat([network.get_parameter(names[i]).detach().reshape(-1).double() for names in tensors]) for i in (0, 1)
    )
    return float((one - other).square().sum() / (one.norm() * other.norm()).clamp(min=1e-30))


def _answers(network: fx.GraphModule, calls: Sequence[Any]) -> torch.Tensor:
    """All floating-point outputs for these calls, flat."""
    values = []
    with torch.no_grad(), in_eval_mode(network):
        for args, kwargs in calls:
            values += [tensor.reshape(-1).double() for tensor in in_floating_point(network(*args, **kwargs))]
    return torch.cat(values)


__all__ = ["Layers", "grouped", "stack"]
