"""Scikit-learn's 1,797 handwritten digits, 8×8, as a Penjing task; the demo's fallback for Fashion-MNIST."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.data import digits
from penjing.tasks.task import Task

TEST, HELD_OUT, CALIBRATION = 500, 200, 256


class Batches:
    """Train batches, reshuffled on every iteration with torch's global generator."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int = 64) -> None:
        self.images, self.labels, self.batch = images, labels, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.labels)).split(self.batch):
            yield self.images[index], self.labels[index]


def accuracy(images: torch.Tensor, labels: torch.Tensor) -> Callable[[Callable[..., np.ndarray]], float]:
    """Create the accuracy on these images as a function of `predict`."""

    def evaluate(predict: Callable[..., np.ndarray]) -> float:
        return float((predict(images.numpy()).argmax(1) == labels.numpy()).mean())

    return evaluate


def task() -> Task:
    """Create the digits task: 1,097 images for training, 200 for selection, 500 for the test."""
    values, classes = digits()
    # The file is ordered by writer: every third image, then the next third, mixes them without a generator.
    order = np.concatenate([np.arange(start, len(classes), 3) for start in range(3)])
    images = torch.from_numpy((values[order, None] - 4.9) / 6.0)  # approximately mean 0 and standard deviation 1
    labels = torch.from_numpy(classes[order])
    train_size = len(labels) - TEST - HELD_OUT
    return Task(
        name="digits",
        metric_name="accuracy",
        example=images[:2],
        calibration=list(images[:CALIBRATION].split(64)),
        train=Batches(images[:train_size], labels[:train_size]),
        select=accuracy(images[train_size:-TEST], labels[train_size:-TEST]),
        evaluate=accuracy(images[-TEST:], labels[-TEST:]),
        loss=F.cross_entropy,
    )
