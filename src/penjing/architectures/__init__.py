"""Built-in lightweight networks, one family a file, built by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from penjing.architectures import resnet
from penjing.errors import SourceError

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet50": resnet.resnet50,
    "resnet56": resnet.resnet56,
}


def names() -> tuple[str, ...]:
    """Every name that `build` knows, sorted.

    >>> "resnet20" in names()
    True
    """
    return tuple(sorted(_BUILDERS))


def build(name: str, **settings: Any) -> nn.Module:
    """A new network with random weights, drawn from torch's global generator.

    Args:
        name: One of `names()`.
        settings: What the family's factory takes, for example ``in_channels=1, classes=10``.

    Raises:
        SourceError: The name is unknown, or a setting does not fit the family.

    >>> build("resnet20", in_channels=1).classifier.out_features
    10
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5) or names()
        raise SourceError(
            "There is no built-in architecture of that name.",
            got=repr(name),
            expected="one of " + ", ".join(names()),
            remedy="Did you mean " + " or ".join(near) + "?",
        )
    try:
        return builder(**settings)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"The architecture {name} can't be built with these settings.",
            got=f"{settings} ({error})",
            expected="settings that its factory takes, with positive whole numbers",
            remedy=f"See help(penjing.architectures.resnet.{name}).",
        ) from error


__all__ = ["build", "names"]
