"""Layers that a setting names: one by one, or as a part of the network."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from penjing.errors import RecipeError


def named(known: Mapping[str, Any], network: nn.Module, words: Iterable[str]) -> set[str]:
    """The layers of `known` that the words name: a layer itself, or all layers of a part of the network.

    Raises:
        RecipeError: There is no such layer or part.
    """
    modules = {name for name, _ in network.named_modules()}
    names: set[str] = set()
    for word in words:
        if word not in modules:
            near = difflib.get_close_matches(word, known, n=3)
            raise RecipeError(
                "this layer does not exist",
                code="no-layer",
                got=word,
                expected="the name of a layer or of a part of the network",
                remedy=f"did you mean {' or '.join(near)}?" if near else None,
            )
        names |= {name for name in known if name == word or name.startswith(f"{word}.")}
    return names
