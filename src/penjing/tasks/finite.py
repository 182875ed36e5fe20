"""NaN in what the source answers to the samples that its artifacts are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from penjing.errors import TaskError
from penjing.tasks.outputs import output_names


def check_answers(outputs: Sequence[torch.Tensor], structure: Any) -> None:
    """Raise where the source answers NaN to the samples that artifacts are compared on.

    Infinities may be meant (a masked score); artifacts have to give the same ones.

    Args:
        outputs: Flat, samples first.
        structure: How they are nested.

    Raises:
        TaskError: Names the output and counts the samples.
    """
    for name, output in zip(output_names(structure), outputs, strict=True):
        wrong = output.isnan() if output.is_floating_point() else torch.zeros(())
        if wrong.any():
            rows = wrong.reshape(len(wrong), -1).any(1) if wrong.dim() else wrong.reshape(1)
            raise TaskError(
                f"the network returns NaN in {name}",
                got=f"NaN for {int(rows.sum())} of {len(rows)} samples of the calibration data (or of the example)",
                expected="numbers: with NaN no artifact can be compared",
                remedy="look for a division by zero, a logarithm of a negative number, or a row that is masked "
                "everywhere before a softmax; and whether these inputs are as the network expects them",
            )
