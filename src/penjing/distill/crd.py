"""Contrastive representation distillation: a sample in the student is nearest to the same sample in the teacher.

Tian, Krishnan & Isola, "Contrastive Representation Distillation", ICLR 2020, equations 10, 17 and 18.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import above, at_least, check, whole

FOLLOW = 0.1  # weight of a batch in the moving average of the scale


def contrastive(
    anchors: torch.Tensor, same: torch.Tensor, others: torch.Tensor, temperature: float, log_scale: torch.Tensor
) -> torch.Tensor:
    """Noise-contrastive loss: do the two embeddings of a pair belong to the same sample?

    With r = exp(anchor·other / temperature) / scale and K negatives, a pair is positive with probability r / (r + K).

    Args:
        anchors: (samples, dimensions), unit length.
        same: (samples, dimensions), the same samples in the other network, unit length.
        others: (K, dimensions), other samples in the other network (negatives), unit length.
        temperature: Divides the inner products, above 0.
        log_scale: Logarithm of the scale, the mean of exp(anchor·other / temperature), which makes r a ratio of
            probabilities.

    Returns:
        A scalar, in nats: the mean over all samples.
    """
    count = len(others)
    one = (anchors * same).sum(1) / temperature - log_scale  # log r
    two = anchors @ others.t() / temperature - log_scale
    log_count = torch.log(torch.tensor(float(count), device=one.device))
    # log(r / (r + K)) and log(K / (r + K)), without overflow
    accepted = F.logsigmoid(one - log_count)
    refused = F.logsigmoid(log_count - two).sum(1)
    return -(accepted + refused).mean()


@dataclass(frozen=True, kw_only=True)
class CRD:
    """Contrast the samples of both networks with each other (`contrastive`), summed over all feature pairs.

    Linear layers embed both sides; they are trained with the student and discarded. The negatives are the most recent
    samples of earlier batches, where the paper draws them from the whole data set. The scale is a moving average: the
    features of an untrained network all point in one direction, and with the scale of the first batch, which the
    authors keep, thousands of similar negatives would outweigh every label.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, which stand for their last output; without
            any, the networks' outputs. A single name stands for the same name in both.
        dimensions: Size of the embedding.
        negatives: Number of negatives, the most recent samples: fewer than the data set has, or a sample would be its
            own negative.
        temperature: Divides the inner products of embeddings.
        weight: Weight of this loss in the training objective.
    """

    features: tuple[tuple[str, str], ...] = ()
    dimensions: int = 128
    negatives: int = 1024
    temperature: float = 0.07
    weight: float = 0.8

    def __post_init__(self) -> None:
        check(self, dimensions=whole(), negatives=whole(), temperature=above(0), weight=at_least(0))
        object.__setattr__(self, "features", paired(self, least=0))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch, a module with two embeddings per feature pair and the recent samples."""
        return _CRD(self, inputs)


class _CRD(nn.Module):
    def __init__(self, settings: CRD, inputs: DistillationInputs) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = nn.ModuleList(_Pair(settings, *pair) for pair in inputs.pairs(settings.features))

    def forward(self, inputs: DistillationInputs) -> torch.Tensor:
        pairs = zip(self.pairs, inputs.pairs(self.settings.features), strict=True)
        return torch.stack([pair(*values) for pair, values in pairs]).sum()


class _Pair(nn.Module):
    """Both embeddings of a feature pair, and the most recent samples in each."""

    def __init__(self, settings: CRD, student: torch.Tensor, teacher: torch.Tensor) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.embed = nn.ModuleList(nn.Linear(_vectors(x).shape[1], settings.dimensions) for x in (student, teacher))
        for name in ("seen_by_student", "seen_by_teacher"):
            self.register_buffer(name, torch.zeros(settings.negatives, settings.dimensions))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_scales", torch.zeros(2))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        mine, theirs = (
            F.normalize(embed(_vectors(x)), dim=1) for embed, x in zip(self.embed, (student, teacher), strict=True)
        )
        banks = self.get_buffer("seen_by_student"), self.get_buffer("seen_by_teacher")
        seen, log_scales = self.get_buffer("seen"), self.get_buffer("log_scales")
        count = min(int(seen), len(banks[0]))
        # The first batch has only itself as negatives.
        by_student, by_teacher = (
            bank[-count:].clone() if count else x.detach() for bank, x in zip(banks, (mine, theirs), strict=True)
        )
        with torch.no_grad():
            pairs = (mine, by_teacher), (theirs, by_student)
            now = torch.stack([_log_scale(anchors, others, self.temperature) for anchors, others in pairs])
            log_scales.copy_(torch.lerp(log_scales, now, FOLLOW if count else 1.0))
        loss = contrastive(mine, theirs, by_teacher, self.temperature, log_scales[0].clone())
        loss = loss + contrastive(theirs, mine, by_student, self.temperature, log_scales[1].clone())
        with torch.no_grad():
            for bank, new in zip(banks, (mine, theirs), strict=True):
                bank.copy_(torch.cat([bank, new])[-len(bank) :])
            seen += len(mine)
        return loss


def _log_scale(anchors: torch.Tensor, others: torch.Tensor, temperature: float) -> torch.Tensor:
    products = (anchors @ others.t() / temperature).flatten()
    return torch.logsumexp(products, 0) - math.log(products.numel())


def _vectors(x: torch.Tensor) -> torch.Tensor:
    """(samples, values): feature maps and sequences are averaged over positions."""
    if x.dim() > 3:
        return x.flatten(2).mean(2)
    return x.mean(1) if x.dim() == 3 else x.reshape(len(x), -1)
