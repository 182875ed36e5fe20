"""Gradients of a network's own outputs: how much each weight moves them, without labels.

The squared gradient of outputs that are multiplied by random signs has the sum of the squared derivatives of all
outputs as its mean (Hutchinson's estimator). That sum is the diagonal of the Gauss-Newton matrix of the squared error
of the outputs, and of the Fisher information of a normal distribution around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.analyze.samples import chunks
from penjing.errors import TaskError
from penjing.modes import in_eval_mode
from penjing.steps.step import Context

DRAWS = 16  # of random signs, at least, if there are as many samples: one alone is as noisy as it is large


def projected(outputs: Any, generator: torch.Generator) -> torch.Tensor:
    """The floating-point outputs of a network times random signs, summed; each output over the root of its size.

    Args:
        outputs: A tensor, or tensors in containers.
        generator: Draws the signs.

    Returns:
        A number, ().

    Raises:
        TaskError: No output is in floating point.
    """
    tensors = in_floating_point(outputs)
    return torch.stack(
        [
            (x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x.device)).sum() / x.numel() ** 0.5
            for x in tensors
        ]
    ).sum()


def in_floating_point(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors among the outputs of a network.

    Raises:
        TaskError: There are none.
    """
    tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    if not floats:
        raise TaskError(
            "the network's outputs do not tell how much a weight moves them",
            code="integer-outputs",
            got=", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors})) or "no tensor",
            expected="an output in floating point, such as the scores of the classes",
            remedy="return the scores too, or choose a measure that reads the weights alone",
        )
    return floats


def squared_gradients(
    network: fx.GraphModule, names: Iterable[str], context: Context, samples: int
) -> dict[str, torch.Tensor]:
    """Parameter → the mean squared derivative of the outputs for each of its values, in the parameter's shape.

    Args:
        network: It is left unchanged.
        names: The parameters.
        context: Has the calibration data and the seed; it is told the progress.
        samples: Calibration samples that are read.

    Raises:
        CalibrationError: There is no calibration data.
        TaskError: No output is in floating point.
    """
    parameters = {name: network.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(context.seed % 2**63)
    with in_eval_mode(network), all_trainable(network):
        calls = chunks(context, network, samples, pieces=DRAWS)
        for number, (args, kwargs) in enumerate(calls):
            value = projected(network(*args, **kwargs), generator)
            gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.add_(gradient.square(), alpha=1 / len(calls))
            context.events("progress", label="sensitivity", done=number + 1, total=len(calls))
    return {name: value.detach() for name, value in sums.items()}


@contextmanager
def all_trainable(network: nn.Module) -> Iterator[None]:
    """Enable gradients for every floating-point parameter, frozen ones too, and restore the flags afterwards."""
    before = {p: p.requires_grad for p in network.parameters()}
    for p in before:
        p.requires_grad_(p.is_floating_point())
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, trainable in before.items():
            p.requires_grad_(trainable)
