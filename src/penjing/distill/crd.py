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

FOLLOW = 0.1  # how fast the scale follows the samples, a batch


def contrastive(
    anchors: torch.Tensor, same: torch.Tensor, others: torch.Tensor, temperature: float, log_scale: torch.Tensor
) -> torch.Tensor:
    """Noise-contrastive loss: is this pair of one sample, or of two?

    With r = exp(anchor·other / temperature) / scale and K others, a pair is taken for one sample's with r / (r + K).

    Args:
        anchors: (samples, dimensions), of length 1.
        same: (samples, dimensions), of the same samples in the other network, of length 1.
        others: (K, dimensions), of other samples in the other network, of length 1.
        temperature: What products are divided by, above 0.
        log_scale: Logarithm of the scale, the mean of exp(anchor·other / temperature), with which r is a ratio of
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
    """Both networks' samples told apart by each other (`contrastive`), the sum over all pairs of features.

    Linear layers embed both sides; they are trained beside the student and thrown away. The others are the last samples
    that were seen, of earlier batches: the paper draws them from all. The scale follows them: features of an untrained
    network all point one way, and with the scale of the first batch, which the authors keep, thousands of others that
    look alike would outweigh every label.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, whose last value is meant; none takes the
            outputs. A name alone stands for the same name in both.
        dimensions: Of the embedding.
        negatives: How many other samples a sample is told from, the last that were seen: fewer than the data has, or a
            sample is told from itself.
        temperature: What products of embeddings are divided by.
        weight: Of this term in the training loss.
    """

    features: tuple[tuple[str, str], ...] = ()
    dimensions: int = 128
    negatives: int = 1024
    temperature: float = 0.07
    weight: float = 0.8

    def __post_init__(self) -> None:
        check(self, dimensions=whole(), negatives=whole(), temperature=above(0), weight=at_least(0))
        object.__setattr__(self, "features", paired(self, self.features, least=0))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch, a module with two embeddings a pair and the samples that were seen."""
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
    """Both embeddings of one pair of features, and the last samples seen in each."""

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
        # The first batch has nothing but itself to be told from.
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
    """(samples, values): images of many channels and sequences are averaged over places."""
    if x.dim() > 3:
        return x.flatten(2).mean(2)
    return x.mean(1) if x.dim() == 3 else x.reshape(len(x), -1)
