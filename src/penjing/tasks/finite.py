"""NaN in the source's outputs on the samples that artifacts are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from penjing.errors import TaskError
from penjing.tasks.outputs import output_names


def check_answers(outputs: Sequence[torch.Tensor], structure: Any) -> None:
    """Raise if the source's outputs on the samples that artifacts are compared on contain NaN.

    Infinities may be intended (a masked score); artifacts have to reproduce them.

    Args:
        outputs: Flat list of outputs, samples first.
        structure: Their nesting.

    Raises:
        TaskError: An output contains NaN; the error names it and counts the samples.
    """
    for name, output in zip(output_names(structure), outputs, strict=True):
        wrong = output.isnan() if output.is_floating_point() else torch.zeros(())
        if wrong.any():
            rows = wrong.reshape(len(wrong), -1).any(1) if wrong.dim() else wrong.reshape(1)
            raise TaskError(
                f"the network returns NaN in {name}",
                code="not-finite",
                got=f"NaN for {int(rows.sum())} of {len(rows)} samples of the calibration data (or of the example)",
                expected="outputs without NaN, which can't be compared with an artifact's",
                remedy="look for a division by zero, a logarithm of a negative number, or a fully masked row before a "
                "softmax; and check that these inputs are preprocessed as the network expects",
            )
