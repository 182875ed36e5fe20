"""The built-in tasks: a folder of images, and a file of NumPy arrays.

Loaders start over on every pass. The train loaders shuffle with torch's global generator and nothing else, so that
``torch.manual_seed`` repeats an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.errors import TaskError
from penjing.records import reading
from penjing.tasks.images import IMAGENET_MEAN, IMAGENET_STD, Images, image_files, pillow
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task
from penjing.tasks.usercode import suggest

Array = np.ndarray[Any, Any]
Predict = Callable[..., Any]

ARRAYS = ("x_train", "y_train", "x_test", "y_test", "x_calibration")


@dataclass(frozen=True)
class Arrays:
    """Samples and targets in memory.

    Attributes:
        x: (samples, ...) inputs.
        y: (samples,) classes as int64, or (samples, ...) float32 values; None without targets.
    """

    x: torch.Tensor
    y: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self, indices: Sequence[int]) -> torch.Tensor:
        """Return these samples as a batch."""
        return self.x[list(indices)]

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Return their targets as a batch."""
        assert self.y is not None
        return self.y[list(indices)]


Samples = Images | Arrays


@dataclass(frozen=True)
class TrainLoader:
    """(inputs, target) batches, reshuffled on every pass with torch's global generator."""

    samples: Samples
    batch: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.samples)).tolist()
        for chunk in _chunks(order, self.batch):
            yield self.samples.inputs(chunk), self.samples.targets(chunk)


@dataclass(frozen=True)
class InputLoader:
    """Input batches in a fixed order, without targets: `count` samples evenly spaced over the data."""

    samples: Samples
    batch: int
    count: int

    def __len__(self) -> int:
        return -(-min(self.count, len(self.samples)) // self.batch)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for chunk in _chunks(_spread(len(self.samples), self.count), self.batch):
            yield self.samples.inputs(chunk)


def image_folder(
    root: Path | str,
    *,
    size: int = 224,
    resize: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    batch: int = 32,
    calibration_samples: int = 512,
) -> Task:
    """Create an image-classification task from ``root/<class>/*.png`` (or jpg), or ``root/train/...`` with val or test.

    Classes are numbered in the order of their sorted names. Without ``train`` and ``val``, every fifth image of a
    class (by name) is held out for evaluation. Calibration reads train images, evenly spaced over the classes. The
    metric is top-1 accuracy; the loss is cross entropy on the first output. Train images are not augmented.

    Args:
        root: The folder.
        size: Side of the network's square input, in pixels.
        resize: Length of the short side before the centre crop; None is 8/7 of `size` (256 for 224).
        mean: Mean of the red, green and blue channels, for values from 0 to 1.
        std: Standard deviation of the channels.
        batch: Batch size.
        calibration_samples: Largest number of calibration samples.

    Raises:
        TaskError: There are no images, or val has a class that is missing in train.
        MissingDependency: Pillow is not installed.
    """
    pillow()
    root = Path(root)
    resize = max(size, resize if resize is not None else round(size * 8 / 7))
    train_files, test_files = image_files(root)
    train, test = (Images(files, size, resize, mean, std) for files in (train_files, test_files))
    return Task(
        example=torch.zeros(1, 3, size, size),
        calibration=InputLoader(train, batch, calibration_samples) if train_files else None,
        train=TrainLoader(train, batch) if train_files else None,
        evaluate=_accuracy(test, batch) if test_files else None,
        loss=_cross_entropy,
        metric_name="top-1 accuracy",
        name=root.resolve().name,
    )


def npz_arrays(path: Path | str, *, batch: int = 64, calibration_samples: int = 512) -> Task:
    """Create a task from an ``.npz`` file with any of ``x_train, y_train, x_test, y_test, x_calibration``.

    Inputs are used as stored, except that float64 and float16 become float32. Integer targets are classes: the metric
    is accuracy, the loss cross entropy. Floating-point targets are regression values: the metric is R², the explained
    share of the targets' variance (1 is perfect, 0 no better than the mean), which is dimensionless, so that
    ``drop<=1%`` means the same for every data set; the loss is the mean squared error. Calibration reads x_calibration,
    or else x_train, evenly spaced.

    Args:
        path: The file.
        batch: Batch size.
        calibration_samples: Largest number of calibration samples.

    Raises:
        TaskError: The file is damaged, contains Python objects, has no inputs, or its targets do not match them.
    """
    path = Path(path)
    arrays = _read_npz(path)
    train = _pair(arrays, "x_train", "y_train", path)
    test = _pair(arrays, "x_test", "y_test", path)
    quiet = Arrays(_inputs(arrays["x_calibration"])) if "x_calibration" in arrays else train
    some = next(samples for samples in (train, test, quiet) if samples is not None)
    targets = [s.y for s in (train, test) if s is not None and s.y is not None]
    classes = not any(y.is_floating_point() for y in targets)
    if not classes and not all(y.is_floating_point() for y in targets):
        raise TaskError(
            f"y_train and y_test in {path.name} are of different kinds",
            code="targets",
            got=" and ".join(str(arrays[name].dtype) for name in ("y_train", "y_test")),
            expected="integer classes in both, or floating-point values in both",
            remedy="convert one of them with astype",
        )
    evaluate = None
    if test is not None and test.y is not None:
        evaluate = _accuracy(test, batch) if classes else _r_squared(test, batch)
    return Task(
        example=some.x[:1].clone(),
        calibration=InputLoader(quiet, batch, calibration_samples) if quiet is not None else None,
        train=TrainLoader(train, batch) if train is not None and train.y is not None else None,
        evaluate=evaluate,
        loss=(_cross_entropy if classes else _squared_error) if targets else None,
        metric_name="metric" if evaluate is None else "accuracy" if classes else "R²",
        name=path.stem,
    )


# --- metrics and losses -----------------------------------------------------------------------------------------


def _accuracy(samples: Samples, batch: int) -> Callable[[Predict], float]:
    def evaluate(predict: Predict) -> float:
        right = 0
        for chunk in _chunks(range(len(samples)), batch):
            scores = first_output(predict(samples.inputs(chunk).numpy()))
            if scores.ndim != 2 or len(scores) != len(chunk):
                raise TaskError(
                    "accuracy needs one row of scores per sample",
                    code="scores",
                    got=f"a first output of shape {tuple(scores.shape)} for {len(chunk)} samples",
                    expected=f"({len(chunk)}, classes)",
                    remedy="use a custom task: Task(evaluate=...)",
                )
            right += int((scores.argmax(axis=-1) == samples.targets(chunk).numpy()).sum())
        return right / len(samples)

    return evaluate


def _r_squared(samples: Arrays, batch: int) -> Callable[[Predict], float]:
    def evaluate(predict: Predict) -> float:
        assert samples.y is not None
        y = samples.y.double()
        spread = float(((y - y.mean(dim=0)) ** 2).sum())
        error = 0.0
        for chunk in _chunks(range(len(samples)), batch):
            target = samples.targets(chunk).double().numpy()
            guess = first_output(predict(samples.inputs(chunk).numpy())).astype(np.float64)
            error += float(((guess.reshape(target.shape) - target) ** 2).sum())
        return 1 - error / spread

    return evaluate


def _cross_entropy(output: Any, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(first_output(output), target)


def _squared_error(output: Any, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(first_output(output).reshape(target.shape), target)


# --- arrays -----------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        strange = [name for name in reading.array_names(path) if name not in ARRAYS]
        arrays = reading.arrays(path, names=ARRAYS)
    except ValueError as cause:
        if "allow_pickle" not in str(cause):
            raise _damaged(path, cause) from cause
        raise TaskError(
            f"{path.name} holds Python objects, and opening them could run code",
            code="pickle",
            got=str(cause),
            expected="arrays of numbers",
            remedy="save plain arrays: np.savez(path, x_train=np.stack(samples))",
        ) from cause
    except OSError as cause:
        raise _damaged(path, cause) from cause
    if not any(name.startswith("x_") for name in arrays):
        raise TaskError(
            f"{path.name} holds no inputs",
            code="no-inputs",
            got=", ".join([*arrays, *strange]) or "no arrays",
            expected=f"at least one of {', '.join(n for n in ARRAYS if n.startswith('x_'))}",
            remedy=next((s for name in strange if (s := suggest(name, ARRAYS))), None) or "rename the arrays",
        )
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) == 0 or array.dtype.kind not in "biuf":
            raise TaskError(
                f"{name} in {path.name} is not an array of samples",
                code="not-samples",
                got=f"shape {array.shape}, {array.dtype}",
                expected="numbers with the samples along axis 0, at least one",
                remedy="turn text into numbers, and leave empty arrays out",
            )
    return arrays


def _damaged(path: Path, cause: Exception) -> TaskError:
    return TaskError(
        f"{path.name} can't be read",
        code="unreadable",
        got=f"{path}: {cause}",
        expected="a file written by numpy.savez",
    )


def _inputs(array: Array) -> torch.Tensor:
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _pair(arrays: dict[str, Array], x_name: str, y_name: str, path: Path) -> Arrays | None:
    x, y = arrays.get(x_name), arrays.get(y_name)
    if x is None:
        if y is not None:
            raise TaskError(
                f"{path.name} has {y_name} without {x_name}", code="unpaired", expected=f"both {x_name} and {y_name}"
            )
        return None
    if y is None:
        return Arrays(_inputs(x))
    if len(x) != len(y):
        raise TaskError(
            f"{x_name} and {y_name} in {path.name} differ in length",
            code="lengths",
            got=f"{len(x)} and {len(y)} samples",
            expected="one target per sample",
        )
    if y.dtype.kind == "f":
        if y_name == "y_test" and np.ptp(y, axis=0).max() == 0:
            raise TaskError(
                f"all targets in {y_name} are equal, so that R² is not defined",
                code="equal-targets",
                got=f"{len(y)} equal targets",
                expected="targets that vary",
                remedy="give integer classes, more samples, or a custom task with evaluate",
            )
        return Arrays(_inputs(x), torch.from_numpy(y.astype(np.float32)))
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise TaskError(
            f"{y_name} in {path.name} is not a list of classes",
            code="not-classes",
            got=f"shape {y.shape}, {y.dtype}",
            expected="(samples,) integer classes, or floating-point values",
            remedy="for one-hot rows: y.argmax(axis=1); for values: y.astype('float32')",
        )
    return Arrays(_inputs(x), torch.from_numpy(y.astype(np.int64)))


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _spread(total: int, count: int) -> list[int]:
    """`count` of the first `total` integers, evenly spaced; all of them if there are fewer."""
    count = min(total, count)
    return [i * total // count for i in range(count)]
