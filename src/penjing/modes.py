"""Training and eval mode of a module: each of its parts has one, and gets its own back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Run a block with every part of `module` in eval mode; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    if any(training for _, training in modes):
        with contextlib.suppress(NotImplementedError):  # an exported program's module has one mode only
            module.eval()
    try:
        yield
    finally:
        if modes[0][1] and not module.training:
            module.train()  # a module's own `train` may do more than to note the mode
        for part, training in modes:
            part.training = training


__all__ = ["in_eval_mode"]
