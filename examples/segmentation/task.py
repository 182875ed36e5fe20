"""Segmentation of scenes made of stamps, at half their size: 80×80 pixels, five classes and the background.

How the scenes are made stands in examples/stamps.py. The stamps of the test are not among those of the training.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples.stamps import CLASSES, SELECT_SCENES, TEST_SCENES, TRAIN_SCENES, Scenes, augmented, normalise, scenes

CALIBRATION = 256


def halved(data: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 80, 80) uint8, every pixel the mean of four, and masks (N, 80, 80)."""
    count, channels, height, width = data.images.shape
    quarters = data.images.reshape(count, channels, height // 2, 2, width // 2, 2)
    return np.stack([quarter.mean(axis=(2, 4)).astype(np.uint8) for quarter in quarters]), data.masks[:, ::2, ::2]


class Batches:
    """Train batches (N, 3, 80, 80) float32 and (N, 80, 80) int64, mirrored and with changed colours at random."""

    def __init__(self, images: np.ndarray, masks: np.ndarray, batch: int = 32) -> None:
        self.images, self.masks, self.batch = images, masks, batch

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.images))[: len(self) * self.batch].split(self.batch):
            images, mirrored = augmented(self.images[index])
            masks = torch.from_numpy(self.masks[index]).long()
            yield images, torch.where(mirrored[:, None, None], masks.flip(-1), masks)


def task() -> pj.Task:
    """Create the task: mean IoU of the background and five classes."""
    images, masks = halved(scenes("train", TRAIN_SCENES))
    shown, labels = halved(scenes("test", SELECT_SCENES + TEST_SCENES))
    return pj.tasks.segmentation(
        (normalise(shown[SELECT_SCENES:]), labels[SELECT_SCENES:]),
        classes=len(CLASSES) + 1,
        select=(normalise(shown[:SELECT_SCENES]), labels[:SELECT_SCENES]),
        train=Batches(images, masks),
        calibration=normalise(images[:CALIBRATION]),
        name="stamps",
    )
