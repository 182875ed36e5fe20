"""Fashion-MNIST as a Penjing task: 60,000 train and 10,000 test images of clothing, 28×28, ten classes.

Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.data import fashion_mnist
from penjing.tasks.task import Task

MEAN, STD = 0.2860, 0.3530  # of the train images, for values from 0 to 1
HELD_OUT = 5000  # the last train images, held out for selection
CALIBRATION = 512
PADDING = 2  # padding of random crops, in pixels


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images (N, 1, 28, 28) to float32 with mean 0 and standard deviation 1 over the train set."""
    return (images.float() / 255 - MEAN) / STD


class Batches:
    """Train batches, augmented on every iteration: (N, 1, 28, 28) float32 images and (N,) int64 labels.

    Order, crops and flips all come from torch's global generator, so seeding it reproduces the batches.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int = 256) -> None:
        self.labels = labels
        self.batch = batch
        side = images.shape[-1]
        padded = F.pad(images, (PADDING,) * 4)
        # Every crop as a view, (N, 1, offsets, offsets, side, side), so that selecting one copies only the crop.
        self.crops = padded.unfold(2, side, 1).unfold(3, side, 1)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.labels)).split(self.batch):
            down, right = torch.randint(0, 2 * PADDING + 1, (2, len(index)))
            images = self.crops[index, :, down, right]
            flipped = torch.rand(len(index), 1, 1, 1) < 0.5
            yield normalise(torch.where(flipped, images.flip(-1), images)), self.labels[index]


def accuracy(images: torch.Tensor, labels: torch.Tensor) -> Callable[[Callable[..., np.ndarray]], float]:
    """Create the accuracy on these images as a function of `predict`."""

    def evaluate(predict: Callable[..., np.ndarray]) -> float:
        right = 0
        for some, truth in zip(images.split(500), labels.split(500), strict=True):
            right += int((predict(normalise(some).numpy()).argmax(1) == truth.numpy()).sum())
        return right / len(labels)

    return evaluate


def task(batch: int = 256) -> Task:
    """Create the Fashion-MNIST task, with training batches of `batch` images."""
    arrays = {name: torch.from_numpy(array) for name, array in fashion_mnist().items()}
    train, labels = arrays["train_images"][:, None], arrays["train_labels"].long()
    train_size = len(labels) - HELD_OUT
    return Task(
        name="fashion-mnist",
        metric_name="accuracy",
        example=normalise(train[:2]),
        calibration=list(normalise(train[:CALIBRATION]).split(64)),
        train=Batches(train[:train_size], labels[:train_size], batch),
        select=accuracy(train[train_size:], labels[train_size:]),
        evaluate=accuracy(arrays["test_images"][:, None], arrays["test_labels"].long()),
        loss=F.cross_entropy,
    )
