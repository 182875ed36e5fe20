"""Scenes with boxes and masks by construction, for detection and segmentation.

The pictures are the stamps of Tux Paint, cut-outs with transparency. One to four of them are resized, turned, and
pasted at random places on a random background, so that the box, the class and the mask of each are known exactly. The
class is the folder that the stamp comes from. Every fourth stamp is seen in test scenes alone, and never trained on.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also loads from another folder

from examples import data

FOLDERS = {  # class → folders of its stamps
    "animal": ("animals",),
    "food": ("food",),
    "building": ("town/houses", "town/monuments"),
    "vehicle": ("vehicles",),
    "letter": ("symbols/alphabets/english", "symbols/alphabets/german", "symbols/alphabets/spanish"),
}
CLASSES = tuple(FOLDERS)
SIDE = 160  # of a scene, in pixels
TRAIN_SCENES, SELECT_SCENES, TEST_SCENES = 6000, 300, 600
MOST = 4  # stamps in a scene
SMALLEST, LARGEST = 28, 104  # long side of a stamp, in pixels
OVERLAP = 0.3  # largest share of a stamp's box that a later one may cover


@dataclass(frozen=True)
class Scenes:
    """Labelled scenes.

    Attributes:
        images: (N, 3, 160, 160) uint8.
        boxes: (N, 4, 5) float32: left, top, right and bottom edge in pixels, and the class; unused rows are -1.
        masks: (N, 160, 160) uint8: 0 for the background, otherwise the class plus 1.
    """

    images: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> "Scenes":
        """Return the scenes from `start` to before `stop`."""
        return Scenes(self.images[start:stop], self.boxes[start:stop], self.masks[start:stop])


def scenes(part: str, count: int) -> Scenes:
    """Return `count` scenes of the "train" or the "test" stamps, made once and kept in the cache.

    Scene i is the same whatever the count. Test scenes are of stamps that no train scene holds.
    """
    file = data.cache() / f"stamp-scenes-{part}-{count}-{SIDE}-pillow-{PIL.__version__}.npz"
    if not file.is_file():
        stamps = _stamps(part)
        drawn = [_scene(np.random.default_rng([part == "test", i]), stamps) for i in range(count)]
        images, boxes, masks = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        aside = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(aside, images=images, boxes=boxes, masks=masks)
        aside.replace(file)
    with np.load(file, allow_pickle=False) as arrays:
        return Scenes(arrays["images"], arrays["boxes"], arrays["masks"])


def normalise(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images to float32 from -1 to 1."""
    return (images.astype(np.float32) - 127.5) / 127.5


def augmented(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized images, each mirrored with probability 1/2 and with changed colours, and which were mirrored (N,)."""
    pixels = torch.from_numpy(normalise(images))
    mirrored = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    gains = 1 + 0.3 * (2 * torch.rand(len(pixels), 3, 1, 1) - 1)
    shifts = 0.2 * (2 * torch.rand(len(pixels), 1, 1, 1) - 1)
    return (pixels * gains + shifts).contiguous(memory_format=torch.channels_last), mirrored


def _stamps(part: str) -> list[list[Image.Image]]:
    """The cut-outs of every class, at most 128 pixels on the long side."""
    paths = data.pictures()
    root = Path(os.path.commonpath(paths))
    classes = []
    for folders in FOLDERS.values():
        prefixes = tuple(f"{folder}/" for folder in folders)
        names = [path for path in paths if path.relative_to(root).as_posix().startswith(prefixes)]
        classes.append([_opened(path) for path in names if _held_out(path) == (part == "test")])
    return classes


def _held_out(path: Path) -> bool:
    """Whether a stamp is for the test; a picture and its mirror image are on the same side."""
    name = f"{path.parent.name}/{path.stem.removesuffix('_mirror')}"
    return hashlib.sha256(name.encode()).digest()[0] % 4 == 0


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image.thumbnail((128, 128), Image.Resampling.BICUBIC)
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def _scene(random: np.random.Generator, stamps: list[list[Image.Image]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    canvas = _background(random)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    boxes = np.full((MOST, 5), -1, np.float32)
    for row in range(int(random.integers(1, MOST + 1))):
        label = int(random.integers(len(stamps)))
        stamp = stamps[label][int(random.integers(len(stamps[label])))]
        stamp = _changed(stamp, random)
        place = _free_place(stamp.size, boxes[:row], random)
        if place is None:
            continue
        canvas.paste(stamp, place, stamp)
        solid = np.asarray(stamp)[..., 3] > 127
        (left, top), (width, height) = place, stamp.size
        mask[top : top + height, left : left + width][solid] = label + 1
        down, right = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        boxes[row] = left + right[0], top + down[0], left + right[-1] + 1, top + down[-1] + 1, label
    return np.asarray(canvas).transpose(2, 0, 1), boxes, mask


def _background(random: np.random.Generator) -> Image.Image:
    """Smooth colours with grain and some faint shapes, so that an edge alone doesn't give a stamp away."""
    smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    cells = int(random.integers(8, 40))
    rough = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
    canvas = Image.blend(smooth, rough.resize((SIDE, SIDE), Image.Resampling.BILINEAR), float(random.uniform(0, 0.35)))
    for _ in range(int(random.integers(0, 5))):
        left, top = (int(edge) for edge in random.integers(-20, SIDE, 2))
        width, height = (int(side) for side in random.integers(10, 90, 2))
        colour = Image.new("RGB", (width, height), tuple(int(value) for value in random.integers(0, 256, 3)))
        canvas.paste(colour, (left, top), Image.new("L", colour.size, int(random.integers(30, 180))))
    return canvas


def _changed(stamp: Image.Image, random: np.random.Generator) -> Image.Image:
    side = SMALLEST * (LARGEST / SMALLEST) ** float(random.uniform())
    ratio = side / max(stamp.size)
    stamp = stamp.resize(tuple(max(8, round(edge * ratio)) for edge in stamp.size), Image.Resampling.BILINEAR)
    if random.uniform() < 0.5:
        stamp = stamp.rotate(float(random.uniform(-15, 15)), Image.Resampling.BILINEAR, expand=True)
    return stamp.crop(stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def _free_place(size: tuple[int, int], boxes: np.ndarray, random: np.random.Generator) -> tuple[int, int] | None:
    """A place where the stamp covers little of the others; None if none was found in ten tries."""
    width, height = size
    for _ in range(10):
        left, top = int(random.integers(0, SIDE - width + 1)), int(random.integers(0, SIDE - height + 1))
        across = np.minimum(boxes[:, 2], left + width) - np.maximum(boxes[:, 0], left)
        down = np.minimum(boxes[:, 3], top + height) - np.maximum(boxes[:, 1], top)
        shared = np.clip(across, 0, None) * np.clip(down, 0, None)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if (shared <= OVERLAP * np.minimum(areas, width * height)).all():
            return left, top
    return None
