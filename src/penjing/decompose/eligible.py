"""Which layers can be decomposed, and why the others can't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penjing.analyze.lockstep import countable
from penjing.decompose.candidates import Place, forms_of, places
from penjing.errors import DecompositionError
from penjing.network.graph import kind
from penjing.network.selection import named
from penjing.steps.draft import Draft
from penjing.tasks.task import Call

KINDS = ("conv", "linear", "conv_transpose")


@dataclass(frozen=True)
class Eligible:
    """Layers that can be decomposed, in execution order.

    Attributes:
        places: Layer → where it stands.
        forms: Layer → the forms that it can have.
        refused: Other layers → why they stay; layers without a gain are added to it.
    """

    places: Mapping[str, Place]
    forms: Mapping[str, tuple[str, ...]]
    refused: dict[str, str] = field(default_factory=dict)


def eligible(draft: Draft, call: Call, layers: Sequence[str], keep: Sequence[str], methods: Sequence[str]) -> Eligible:
    """Look at every layer of a draft.

    Args:
        draft: Its network is a captured one.
        call: Example inputs.
        layers: Layers, or parts of the network; empty takes all.
        keep: Layers, or parts of the network, that stay.
        methods: Forms that are allowed.

    Raises:
        RecipeError: A named layer does not exist.
        DecompositionError: No layer can be decomposed.
    """
    network = draft.network
    every = {
        str(node.target): network.get_submodule(str(node.target))
        for node in network.graph.nodes
        if node.op == "call_module" and kind(network, node) in KINDS
    }
    listed, left_out = named(every, network, layers) if layers else set(every), named(every, network, keep)
    single = set(countable(network))
    refused: dict[str, str] = {}
    forms: dict[str, tuple[str, ...]] = {}
    for name, module in every.items():
        if name in left_out or name not in listed:
            continue
        if reason := _reason(name, module, single):
            refused[name] = reason
        elif of_layer := forms_of(module, methods):
            forms[name] = of_layer
        else:
            refused[name] = f"methods={tuple(methods)} has no form for it"
    if not forms:
        reasons = [f"{name} ({reason})" for name, reason in list(refused.items())[:3]]
        raise DecompositionError(
            "no layer can be decomposed",
            code="nothing-to-decompose",
            got=", ".join(reasons) or f"{len(every)} layers, all of them left out by layers= and keep=",
            expected="a linear layer, or a convolution without groups, that is called once",
        )
    return Eligible(places(network, {name: every[name] for name in forms}, call), forms, refused)


def _reason(name: str, module: Any, single: set[str]) -> str | None:
    """Why a layer stays; None where it can be decomposed."""
    if getattr(module, "transposed", False):
        return "a transposed convolution"
    if getattr(module, "groups", 1) != 1:
        return f"a convolution in {module.groups} groups"
    if name not in single:
        return "it is called several times, or shares its weights"
    if not module.weight.is_floating_point() or min(module.weight.shape[:2]) < 2:
        return "its matrix has a single row or column"
    return None


__all__ = ["Eligible", "eligible"]
