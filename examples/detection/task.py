"""Detection in scenes made of stamps: 160×160 pixels, one to four objects of five classes.

How the scenes are made stands in examples/stamps.py. The stamps of the test are not among those of the training.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples.detection.loss import detection_loss
from examples.stamps import SELECT_SCENES, SIDE, TEST_SCENES, TRAIN_SCENES, Scenes, augmented, normalise, scenes

CALIBRATION = 256


class Batches:
    """Train batches (N, 3, 160, 160) float32 and (N, 4, 5), mirrored and with changed colours at random."""

    def __init__(self, data: Scenes, batch: int = 32) -> None:
        self.data, self.batch = data, batch

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.data))[: len(self) * self.batch].split(self.batch):
            images, mirrored = augmented(self.data.images[index])
            boxes = torch.from_numpy(self.data.boxes[index])
            edges = torch.stack([SIDE - boxes[..., 2], SIDE - boxes[..., 0]], -1)
            changed = (boxes[..., 4] >= 0) & mirrored[:, None]
            boxes[..., [0, 2]] = torch.where(changed[..., None], edges, boxes[..., [0, 2]])
            yield images, boxes


def task() -> pj.Task:
    """Create the task: mAP@0.5:0.95."""
    train, test = scenes("train", TRAIN_SCENES), scenes("test", SELECT_SCENES + TEST_SCENES)
    shown = normalise(test.images)
    return pj.tasks.detection(
        (shown[SELECT_SCENES:], test.boxes[SELECT_SCENES:]),
        boxes="cxcywh",
        select=(shown[:SELECT_SCENES], test.boxes[:SELECT_SCENES]),
        train=Batches(train),
        calibration=normalise(train.images[:CALIBRATION]),
        loss=detection_loss,
        name="stamps",
    )
