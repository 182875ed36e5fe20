"""Draft: what every step receives and returns."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import GraphModule

from penjing.steps.plan import Plan

Edit = dict[str, Any]  # one JSON object: {"edit": "fold", ...}; the vocabulary is in penjing.surgery


@dataclass(frozen=True)
class Draft:
    """A captured network, its quantization plan, and the log of the edits that led to it from the source.

    Attributes:
        network: The captured network (`penjing.network.capture.capture_network`), with floating-point weights.
        plan: Which edges become integers; empty until a step quantizes.
        edits: Every structural edit, in order; replaying them on the source gives this network's structure.
    """

    network: GraphModule
    plan: Plan = field(default_factory=Plan)
    edits: tuple[Edit, ...] = ()

    @property
    def sparse(self) -> tuple[str, ...]:
        """Names of the parameters whose zeros are preserved by training."""
        marked = (edit["tensors"] for edit in self.edits if edit.get("edit") == "sparse")
        return tuple(dict.fromkeys(name for tensors in marked for name in tensors))

    @property
    def codebooks(self) -> tuple[Edit, ...]:
        """The entries of the log that mark parameters as values of a codebook; training keeps them so.

        Of a parameter that was marked twice, the later mark counts: its values replaced those of the earlier one.
        """
        marks: list[Edit] = []
        marked: set[str] = set()
        for edit in reversed(self.edits):
            if edit.get("edit") == "residual_codebook" and edit["tensor"] not in marked:
                marks.append(edit)
                marked.add(edit["tensor"])
            elif edit.get("edit") == "codebook" and (names := [n for n in edit["tensors"] if n not in marked]):
                marks.append(edit if len(names) == len(edit["tensors"]) else edit | {"tensors": names})
                marked.update(names)
        return tuple(reversed(marks))

    def copy(self) -> Draft:
        """Return a draft whose network can be edited without affecting this one."""
        return replace(self, network=copy.deepcopy(self.network))
