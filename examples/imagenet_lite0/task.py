"""Agreement of EfficientNet-Lite0 with its fp32 version, on 796 unlabelled images.

300 images are the calibration set; the metric is the share of the other 496 for which a compressed network has the
same top-1 prediction as the fp32 network in torch.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples import data
from penjing.tasks.task import Task

SIDE = 224
RESIZED = 256  # short side before the crop: 224 / 0.875
CALIBRATION = 300
BATCH = 10


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Normalize uint8 images (N, 3, 224, 224) to float32 as in the network's training."""
    return (pixels.astype(np.float32) - 127) / 128


class Batches:
    """Batches of (10, 3, 224, 224) float32, created on every iteration to save memory (0.6 MB per image)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return -(-len(self.pixels) // BATCH)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.pixels), BATCH):
            yield torch.from_numpy(normalise(self.pixels[start : start + BATCH]))


def prepared(path: Path) -> np.ndarray:
    """Preprocess an image: white background, short side 256 (bicubic), centre crop: uint8 (3, 224, 224)."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    ratio = RESIZED / min(image.size)
    width, height = (max(RESIZED, round(side * ratio)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).transpose(2, 0, 1)


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8: (300, 3, 224, 224) for calibration, (496, 3, 224, 224) held out."""
    paths = data.pictures()
    name = f"lite0-pictures-{len(paths)}-{RESIZED}-{SIDE}-pillow-{PIL.__version__}"
    array = _cached(name, lambda: _shuffled(np.stack([prepared(path) for path in paths])))
    return array[:CALIBRATION], array[CALIBRATION:]


def answers(images: np.ndarray) -> np.ndarray:
    """Return the top-1 prediction of the fp32 network in torch for each of the uint8 images: int64 (N,)."""

    def compute() -> np.ndarray:
        print(f"Asking the fp32 network about {len(images)} images, once.", file=sys.stderr)
        with torch.inference_mode():
            return np.concatenate([network(batch).argmax(1).numpy() for batch in Batches(images)])

    network = data.lite0()
    seen = hashlib.sha256(np.ascontiguousarray(images).data)
    for name, tensor in network.state_dict().items():
        seen.update(name.encode())
        seen.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return _cached(f"lite0-answers-{seen.hexdigest()[:16]}", compute)


def agreement(images: np.ndarray) -> Callable[[Callable[..., np.ndarray]], float]:
    """Create the agreement with the fp32 network's predictions as a function of `predict`."""

    def evaluate(predict: Callable[..., np.ndarray]) -> float:
        expected = answers(images)
        predictions = np.concatenate([predict(batch.numpy()).argmax(1) for batch in Batches(images)])
        return float((predictions == expected).mean())

    return evaluate


def task() -> Task:
    """Create the task, which has no training data."""
    calibration, held_out = pixels()
    return Task(
        name="tux-paint-stamps",
        metric_name="agreement",
        example=torch.from_numpy(normalise(held_out[:2])),
        calibration=Batches(calibration),
        evaluate=agreement(held_out),
    )


def _shuffled(images: np.ndarray) -> np.ndarray:
    """Order images by the hash of their pixels: a shuffle that does not depend on a library's generator.

    Some stamps are identical after preprocessing; this way they are adjacent, and on the same side of the split.
    """
    return images[np.argsort([hashlib.sha256(image.tobytes()).hexdigest() for image in images], kind="stable")]


def _cached(name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    file = data.cache() / f"{name}.npy"
    if not file.is_file():
        aside = file.with_suffix(f".{os.getpid()}.npy")
        np.save(aside, compute())
        aside.replace(file)
    return np.load(file, allow_pickle=False)
