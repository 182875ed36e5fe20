"""Masks from importance scores: unstructured, N:M and block sparsity; pure maths on tensors.

Scores have the shape (out, in, *kernel) of a convolution's or linear layer's weight; (out, in) is the case without a
kernel. Weights with larger scores stay. Ties are broken by position, so the same scores give the same mask.

| pattern | what is removed | source |
|---|---|---|
| ``unstructured`` | any weight | Han et al., "Learning both Weights and Connections", NeurIPS 2015 |
| ``N:M`` | all but N of every M neighbours | Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 |
| ``RxC`` | whole blocks of R outputs by C inputs | Narang et al., "Block-Sparse Recurrent Neural Networks", 2017 |

Neighbours lie along the *input channels* of one output at one position of the kernel, and so do the columns of a
block: the weight (out, in, kh, kw) is read as kh·kw matrices (out, in). Where M, R or C does not divide a dimension,
the remainder is not pruned; a depthwise convolution has nothing but a remainder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from penjing.errors import RecipeError
from penjing.steps.settings import number, one_of, require

SCOPES = ("per_layer", "row", "global")


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern, parsed.

    Attributes:
        kept: N of "N:M"; 0 in other patterns.
        of: M of "N:M"; 0 in other patterns.
        rows: R of "RxC", else 1.
        columns: C of "RxC", else 1.
    """

    kept: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def unstructured(self) -> bool:
        """Whether every weight is pruned on its own."""
        return not self.of and self.rows * self.columns == 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "unstructured", "2:4" or "1x4".

        Raises:
            RecipeError: The text is not a pattern.
        """
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", text) if isinstance(text, str) else None
        if match and match[2] == ":" and int(match[1]) < int(match[3]):
            return cls(kept=int(match[1]), of=int(match[3]))
        if match and match[2] == "x" and int(match[1]) * int(match[3]) > 1:
            return cls(rows=int(match[1]), columns=int(match[3]))
        raise RecipeError(
            "this sparsity pattern does not exist",
            code="settings",
            field="pattern",
            got=repr(text),
            expected='"unstructured", "N:M" with N below M (for example "2:4"), or a block "RxC" (for example "1x4")',
        )


def fraction(sparsity: float | None, pattern: str) -> float:
    """The sparsity: `sparsity`, or that of the pattern "N:M"; without either one half.

    Raises:
        RecipeError: It is not a fraction, or contradicts the pattern "N:M".
    """
    read = Pattern.parse(pattern)
    of_pattern = 1 - read.kept / read.of if read.of else None
    if sparsity is None:
        return 0.5 if of_pattern is None else of_pattern
    sparsity = float(require("the sparsity", sparsity, number(least=0, below=1), field="sparsity"))
    if of_pattern is not None and abs(sparsity - of_pattern) > 1e-9:
        raise RecipeError(
            "the sparsity and the pattern contradict each other",
            code="contradiction",
            field="sparsity",
            got=f"sparsity={sparsity:g}, pattern={pattern!r}",
            expected=f"sparsity={of_pattern:g}, the sparsity of {pattern!r}",
            remedy="leave sparsity out",
        )
    return sparsity


def check_scope(scope: str, pattern: str) -> None:
    """Raise RecipeError for a scope that does not exist, or that the pattern does not support."""
    require("the scope", scope, one_of(*SCOPES), field="scope")
    if scope == "global" and not Pattern.parse(pattern).unstructured:
        raise RecipeError(
            f"the pattern {pattern!r} is not compared between layers",
            code="contradiction",
            field="scope",
            got="scope='global'",
            expected="scope='per_layer' or scope='row'",
        )


def removed_count(sparsity: float, count: int) -> int:
    """How many of `count` weights are removed: rounded down, so that the sparsity is never exceeded."""
    return int(sparsity * count + 1e-6)  # 0.29 · 100 is 28.999999999999996


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at exactly the `count` smallest scores of every row; ties are broken by position.

    Args:
        scores: (rows, n), no NaN.
        count: 0 to n.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < edge, scores == edge
    missing = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= missing))


def keep(
    scores: torch.Tensor, sparsity: float, pattern: str = "unstructured", scope: str = "per_layer"
) -> torch.Tensor:
    """The mask of a layer: True where a weight stays.

    The count is exact: with "unstructured" and the scope "per_layer" ⌊sparsity · weights⌋ are removed, with the scope
    "row" the same fraction of every output. With blocks it is that fraction of the complete blocks (with "row": of
    every row of blocks). With "N:M" the pattern alone determines it.

    Args:
        scores: (out, in, *kernel).
        sparsity: The fraction that is removed.
        pattern: "unstructured", "N:M" or "RxC".
        scope: "per_layer" or "row".
    """
    read = Pattern.parse(pattern)
    if read.of:
        return _neighbours(scores, read)
    if not read.unstructured:
        return _blocks(scores, sparsity, read, scope)
    flat = scores.reshape(1, -1) if scope == "per_layer" else scores.reshape(len(scores), -1)
    return ~smallest(flat, removed_count(sparsity, flat.shape[1])).reshape(scores.shape)


def keep_each(
    scores: Mapping[str, torch.Tensor], sparsity: float, pattern: str = "unstructured", scope: str = "per_layer"
) -> dict[str, torch.Tensor]:
    """The masks of several layers: one by one as `keep`, or with the scope "global" compared across layers.

    With "global", ⌊sparsity · weights⌋ of all weights are removed; ties are broken in the order of the layers.
    """
    if scope != "global":
        return {name: keep(value, sparsity, pattern, scope) for name, value in scores.items()}
    if not scores:
        return {}
    every = torch.cat([value.reshape(-1) for value in scores.values()])[None]
    gone = smallest(every, removed_count(sparsity, every.shape[1]))[0]
    parts = torch.split(gone, [value.numel() for value in scores.values()])
    return {name: ~part.reshape(scores[name].shape) for (name, part) in zip(scores, parts, strict=True)}


def _neighbours(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    lines = scores.movedim(1, -1)  # (out, *kernel, in)
    whole = lines.shape[-1] // pattern.of * pattern.of
    mask = torch.ones_like(lines, dtype=torch.bool)
    groups = lines[..., :whole].reshape(-1, pattern.of)
    mask[..., :whole] = ~smallest(groups, pattern.of - pattern.kept).reshape(*lines.shape[:-1], whole)
    return mask.movedim(-1, 1).contiguous()


def _blocks(scores: torch.Tensor, sparsity: float, pattern: Pattern, scope: str) -> torch.Tensor:
    taps = scores.reshape(*scores.shape[:2], -1).permute(0, 2, 1)  # (out, taps, in)
    high, wide = taps.shape[0] // pattern.rows, taps.shape[2] // pattern.columns
    mask = torch.ones_like(taps, dtype=torch.bool)
    if not high * wide:  # no complete block
        return mask.permute(0, 2, 1).reshape(scores.shape)
    whole = taps[: high * pattern.rows, :, : wide * pattern.columns]
    sums = whole.reshape(high, pattern.rows, taps.shape[1], wide, pattern.columns).sum((1, 4))  # (high, taps, wide)
    flat = sums.reshape(1, -1) if scope == "per_layer" else sums.reshape(high, -1)
    gone = smallest(flat, removed_count(sparsity, flat.shape[1])).reshape(high, 1, taps.shape[1], wide, 1)
    spread = gone.expand(-1, pattern.rows, -1, -1, pattern.columns).reshape(whole.shape)
    mask[: high * pattern.rows, :, : wide * pattern.columns] = ~spread
    return mask.permute(0, 2, 1).reshape(scores.shape)


__all__ = ["SCOPES", "Pattern", "check_scope", "fraction", "keep", "keep_each", "removed_count", "smallest"]
