"""Folders of image files: classes by folder, and images as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from penjing.errors import MissingDependency, TaskError
from penjing.records import reading
from penjing.tasks.usercode import suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue, for values from 0 to 1
IMAGENET_STD = (0.229, 0.224, 0.225)
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_EVALUATION_SHARE = 5  # in a folder without train and val, every fifth image of a class is held out for evaluation

MOST_BYTES = 1 << 28  # of the image file
MOST_PIXELS = 1 << 26  # of an image after resizing: one of 1 × 100,000 would exhaust the memory

Files = tuple[tuple[Path, int], ...]  # paths and class numbers


@dataclass(frozen=True)
class Images:
    """Image files read as (3, size, size) float32: short side resized, centre-cropped, normalized.

    Attributes:
        files: Paths and class numbers, in a fixed order.
        size: Side of the square in pixels.
        resize: Length of the short side before the crop, in pixels.
        mean: Mean of red, green and blue, for values from 0 to 1.
        std: Their standard deviation.
    """

    files: Files
    size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.files)

    def inputs(self, indices: Sequence[int]) -> torch.Tensor:
        """Return these images as (batch, 3, size, size) float32.

        Raises:
            TaskError: A file is not an image.
        """
        return torch.stack([self._read(self.files[i][0]) for i in indices])

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Return their classes as (batch,) int64."""
        return torch.tensor([self.files[i][1] for i in indices])

    def _read(self, path: Path) -> torch.Tensor:
        def resized(width: int, height: int) -> tuple[int, int]:
            scale = self.resize / min(width, height)
            return max(self.resize, round(width * scale)), max(self.resize, round(height * scale))

        picture, _ = read_rgb(path, resized)
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        pixels = np.asarray(picture.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255
        normal = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


def read_rgb(path: Path, resized: Callable[[int, int], tuple[int, int]]) -> tuple[Any, tuple[int, int]]:
    """Read an image file as a Pillow image in RGB, and return the file's own width and height with it.

    Args:
        path: PNG or JPEG.
        resized: From the file's width and height to those that are wanted.

    Raises:
        TaskError: The file is not an image, or is too large when resized.
    """
    image = pillow()
    try:
        with reading.regular(path, MOST_BYTES) as stream, image.open(stream) as file:
            width, height = file.size
            size = resized(width, height)
            if size[0] * size[1] > MOST_PIXELS:
                raise ValueError(f"{width:,} × {height:,} pixels, which are {size[0]:,} × {size[1]:,} when resized")
            picture = file.convert("RGB")
    except (*reading.UNREADABLE, image.DecompressionBombError) as cause:
        raise TaskError(
            "an image can't be read",
            code="unreadable",
            got=f"{path}: {cause}",
            expected=f"a PNG or JPEG file that has at most {MOST_PIXELS:,} pixels when it is resized",
            remedy="remove or replace this file",
        ) from cause
    return picture.resize(size, image.Resampling.BILINEAR), (width, height)


def pillow() -> ModuleType:
    """Import Pillow's Image module.

    Raises:
        MissingDependency: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as cause:
        raise MissingDependency(
            "a folder of images needs Pillow",
            code="not-installed",
            got=str(cause),
            expected="the package pillow",
            remedy="pip install pillow",
        ) from cause
    return Image


def image_files(root: Path) -> tuple[Files, Files]:
    """List the files for training and for evaluation with their class numbers, sorted by name.

    ``root/<class>/*.png`` or ``.jpg``, or the same below ``root/train`` and ``root/val`` (or ``test``). Without these,
    every fifth image of a class is held out for evaluation.

    Raises:
        TaskError: There are no images, or the evaluation part has a class that is missing in the training part.
    """
    if not root.is_dir():
        raise TaskError("the folder of images is missing", code="missing", got=str(root), expected="an existing folder")
    parts = [
        next((root / name for name in names if (root / name).is_dir()), None) for names in (("train",), ("val", "test"))
    ]
    if parts[0] is None and parts[1] is None:
        classes = _classes(root)
        train: list[tuple[Path, int]] = []
        test: list[tuple[Path, int]] = []
        for number, files in enumerate(classes.values()):
            for i, file in enumerate(files):
                (test if i % _EVALUATION_SHARE == _EVALUATION_SHARE - 1 else train).append((file, number))
        return tuple(train), tuple(test)
    part_classes = [_classes(part) if part is not None else {} for part in parts]
    names = sorted(part_classes[0] or part_classes[1])
    strangers = sorted(set(part_classes[1]) - set(names))
    if strangers:
        raise TaskError(
            f"{parts[1]} has classes that {parts[0]} does not have",
            code="unknown-classes",
            got=", ".join(strangers[:5]),
            expected=f"some of {', '.join(names[:10])}",
            remedy=suggest(strangers[0], names) or "give both the same class folders",
        )
    number_of = {name: i for i, name in enumerate(names)}
    train_files, test_files = (
        tuple((file, number_of[name]) for name, files in classes.items() for file in files) for classes in part_classes
    )
    return train_files, test_files


def all_images(root: Path) -> Files:
    """List all image files of a folder, whatever its classes, sorted by path; class numbers are 0.

    They lie in the folder itself, or in one or two levels of folders below it.

    Raises:
        TaskError: There are no images.
    """
    paths = {
        path
        for pattern in ("*", "*/*", "*/*/*")
        for path in root.glob(pattern)
        if path.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    if not paths:
        raise TaskError(
            "the folder holds no images",
            code="no-images",
            got=str(root),
            expected=".png or .jpg files, in it or in folders of classes",
        )
    return tuple((path, 0) for path in sorted(paths))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name → its images, both sorted by name. A class folder without images keeps its number."""
    classes = {}
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = (p for p in entry.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
            classes[entry.name] = sorted(files, key=lambda path: path.name)
    if not any(classes.values()):
        raise TaskError(
            "the folder holds no images",
            code="no-images",
            got=f"{folder} with {', '.join(list(classes)[:5]) or 'no folders'}",
            expected="one folder per class with .png or .jpg files: root/cat/1.png",
            remedy="give the folder whose subfolders are the classes (or train and val)",
        )
    return classes
