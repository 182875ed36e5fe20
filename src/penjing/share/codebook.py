"""Codebooks: the weights of a tensor take one of a few values.

Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding",
ICLR 2016. Weighted by sensitivity: Choi et al., "Towards the Limit of Network Quantization", ICLR 2017.

The weights stay floating-point numbers, of which only a few are different. `Finetune` behind this step moves weights
that share an entry together (`penjing.surgery.codebooks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from penjing.errors import RecipeError, SharingError
from penjing.numerics.codebooks import GRIDS, kmeans, nearest, placed
from penjing.share.weights import KINDS, matrices, sensitivities
from penjing.steps.draft import Draft
from penjing.steps.settings import NAMES, Rule, check, one_of, optional, whole
from penjing.steps.step import Context
from penjing.surgery import mark_codebooks

GRID_BITS = range(2, 7)
MOST_BITS = 8  # an index is stored in a byte


def _bits(value: Any) -> bool:
    each = list(value.values()) if isinstance(value, Mapping) else [value]
    kinds = set(value) <= set(KINDS) if isinstance(value, Mapping) else True
    return kinds and bool(each) and all(type(b) is int and 1 <= b <= MOST_BITS for b in each)


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Give every weight the nearest of a few values; biases and norms are left as they are.

    Han et al., "Deep Compression", ICLR 2016.

    A weight that is exactly 0 stays 0, beside the entries of its codebook. `Finetune` behind this step trains the
    entries: each moves with the mean of its weights' gradients, and zeros stay.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        bits: 2 to this power entries, 1 to 8; or a mapping from the kind of a layer ("conv", "linear",
            "conv_transpose", "embedding", "lstm", "gru") to it, where kinds that are not named stay as they are.
        entries: The number of entries, in the place of `bits`.
        scope: What has one codebook in common: a "tensor", `rows` output "channels" of it, or all tensors of the same
            number of entries ("global").
        rows: With the scope "channels": positions of the weight's first axis.
        sensitivity: What an error counts, by weight: "outputs" the squared derivative of the network's outputs, from
            calibration data without labels; "none" the same for all; "auto" is "outputs" where there is calibration
            data.
        samples: Calibration samples for the sensitivity.
        grid: "kmeans" places every entry by itself; "uniform", "powers_of_two", "additive_powers_of_two" and
            "piecewise" (smaller steps in the middle than in the tails) place a grid of 2 to the power of `bits`, by its
            scale: 2 to 6 bits, one of whose entries is 0. Training scales a grid as a whole.
        layers: Layers, or parts of the network; empty takes all.
        keep: Layers, or parts of the network, that are left as they are.
    """

    stage: ClassVar[str] = "share"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    bits: int | Mapping[str, int] = 5
    entries: int | None = None
    scope: Literal["tensor", "channels", "global"] = "tensor"
    rows: int = 32
    sensitivity: Literal["auto", "outputs", "none"] = "auto"
    samples: int = 256
    grid: str = "kmeans"
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(
            self,
            bits=Rule(_bits, f"a whole number from 1 to {MOST_BITS}, or one for each of {', '.join(KINDS)}"),
            entries=optional(whole(2, 1 << MOST_BITS)),
            scope=one_of("tensor", "channels", "global"),
            rows=whole(),
            sensitivity=one_of("auto", "outputs", "none"),
            samples=whole(),
            grid=one_of("kmeans", *GRIDS),
            layers=NAMES,
            keep=NAMES,
        )
        each = self.bits.values() if isinstance(self.bits, Mapping) else (self.bits,)
        if self.grid != "kmeans" and (self.entries is not None or not set(each) <= set(GRID_BITS)):
            raise RecipeError(
                "Codebook can't place this grid",
                code="contradiction",
                field="grid",
                got=f"grid={self.grid!r}, bits={self.bits}, entries={self.entries}",
                expected=f"{GRID_BITS[0]} to {GRID_BITS[-1]} bits, and no entries=",
                remedy='grid="kmeans" takes any number of entries',
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft whose weights are values of codebooks.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            SharingError: No weight is left, or a codebook would have more entries than its part has weights.
            CalibrationError: `sensitivity="outputs"` without calibration data.
        """
        draft = draft.copy()
        counts = self._counts(draft.network)
        weights = sensitivities(draft.network, counts, context, self.sensitivity, self.samples)
        rows = self.rows if self.scope == "channels" else None
        edits = []
        for names in self._books(counts):
            tensors = [draft.network.get_parameter(name).detach() for name in names]
            scores = [weights[name] for name in names]
            for part in zip(*(_blocks(t, rows) for t in (*tensors, *scores)), strict=True):
                share(part[: len(names)], part[len(names) :], counts[names[0]], self.grid)
            edits.append(mark_codebooks(draft.network, names, rows=rows, proportional=self.grid != "kmeans"))
        context.events("shared", step="Codebook", tensors=len(counts), codebooks=len(edits))
        return replace(draft, edits=(*draft.edits, *edits))

    def _counts(self, network: fx.GraphModule) -> dict[str, int]:
        """Parameter → the number of its entries, for every parameter that gets a codebook.

        One that has fewer weights than entries is left as it is, unless `layers` names it.
        """
        counts: dict[str, int] = {}
        for name, what in matrices(network, self.layers, self.keep).items():
            bits = self.bits.get(what) if isinstance(self.bits, Mapping) else self.bits
            count = self.entries or (bits and 1 << bits)
            if not count:
                continue
            tensor = network.get_parameter(name)
            size = tensor[: self.rows].numel() if self.scope == "channels" else tensor.numel()
            if size > count:
                counts[name] = count
            elif self.layers:
                raise SharingError(
                    f"the codebook would be as large as what it stands for, {name}",
                    code="larger-than-tensor",
                    got=f"{count} entries for {size} weights of shape {tuple(tensor.shape)}",
                    expected="fewer entries than weights; a gain needs a fraction of them",
                    remedy="take fewer bits, or leave the layer out with keep=",
                )
        if not counts:
            raise SharingError(
                "no layer is left whose weights can be shared",
                code="nothing-to-share",
                got=f"bits={self.bits}, entries={self.entries}",
                expected="a layer of these kinds that has more weights than entries",
                remedy="take fewer bits",
            )
        return counts

    def _books(self, counts: Mapping[str, int]) -> list[list[str]]:
        """The parameters that have codebooks in common."""
        if self.scope != "global":
            return [[name] for name in counts]
        return [[n for n in counts if counts[n] == count] for count in dict.fromkeys(counts.values())]


def _blocks(tensor: torch.Tensor, rows: int | None) -> tuple[torch.Tensor, ...]:
    """The parts of a tensor that have a codebook of their own."""
    return (tensor,) if rows is None else torch.split(tensor, rows)


def share(
    weights: Sequence[torch.Tensor], sensitivities: Sequence[torch.Tensor], entries: int, grid: str = "kmeans"
) -> None:
    """Give the weights the values of one codebook, in place. A weight that is exactly 0 stays 0 and takes no entry.

    Args:
        weights: Any shapes.
        sensitivities: What the squared error of each weight counts, in the same shapes.
        entries: Of the codebook. With zeros beside them 256 are one too many for a byte: 255 are taken.
        grid: How entries are placed, see `Codebook`.
    """
    every = torch.cat([w.reshape(-1) for w in weights])
    zero = every == 0
    if zero.all():
        return
    importance = torch.cat([s.reshape(-1) for s in sensitivities])
    most = min(entries, (1 << MOST_BITS) - bool(zero.any()))
    if grid == "kmeans":
        book = kmeans(every[~zero], importance[~zero], most)
    else:
        book = placed(every[~zero], importance[~zero], grid, entries.bit_length() - 1)
    for weight in weights:
        weight.copy_(torch.where(weight == 0, weight, book[nearest(weight, book)]))


__all__ = ["Codebook", "share"]
