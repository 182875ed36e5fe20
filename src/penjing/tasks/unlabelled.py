"""Calibration data alone, in the forms in which people have it: images, arrays, batches, or a task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.errors import TaskError
from penjing.records import reading
from penjing.tasks import datasets
from penjing.tasks.calibration import Dynamic
from penjing.tasks.call import as_call, leaves
from penjing.tasks.images import IMAGENET_MEAN, IMAGENET_STD, Images, all_images, pillow
from penjing.tasks.task import Task
from penjing.tasks.usercode import call_named, load_named, split_spec, suggest_file

SAMPLES = 300  # of a folder or a file; as many as `quantize.Static` reads
BATCH = 10
FORMS = "file.py:task or file.py:batches, a folder of images, an .npy or .npz file"


def calibration_task(data: Any, example: Any | None = None, dynamic: Dynamic = None) -> Task:
    """Return a task with calibration data.

    Args:
        data: A `Task`; an iterable of batches; an array or tensor of samples; ``file.py:name`` of one of these, or of a
            function that returns it; a folder of images, with or without folders of classes; an ``.npy`` file of
            samples along axis 0; an ``.npz`` file as of `datasets.npz_arrays`, or with an array for every input, by
            name.
        example: Example inputs of the network, where its source declares them: gives the size of images.
        dynamic: Axes of them that vary, as the source declares them.

    Raises:
        TaskError: The data is missing, or of an unknown kind.
        MissingDependency: Images need Pillow.
    """
    if isinstance(data, Task):
        return data
    if isinstance(data, str | Path):
        named = split_spec(str(data))
        if named is None:
            return _of_path(Path(data), example, _fixed_batch(example, dynamic))
        data, name = _named(str(data), *named), str(data)
    else:
        name = "calibration"
    if isinstance(data, Task):
        return data
    if isinstance(data, np.ndarray | torch.Tensor):
        return _of_samples({"": data}, name, example, _fixed_batch(example, dynamic))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TaskError(
            "this is not calibration data",
            code="not-calibration",
            got=type(data).__name__,
            expected=f"an array of samples, an iterable of batches, a Task, {FORMS}",
            remedy="a single batch is given as [batch]",
        )
    batches = list(itertools.islice(data, SAMPLES)) if isinstance(data, Iterator) else data  # it is read several times
    first = next(iter(batches), None)
    if example is None and first is None:
        raise TaskError(
            "the calibration data is empty", code="empty", got="no batch", expected="at least one batch of inputs"
        )
    return Task(example=first if example is None else example, calibration=batches, name=name)


def _named(spec: str, where: str, name: str) -> Any:
    opened = load_named(where, name, error=TaskError, role="calibration data")
    if callable(opened) and not isinstance(opened, Task | nn.Module):
        opened = call_named(opened, where, error=TaskError, role="calibration data")
    return opened


def _fixed_batch(example: Any | None, dynamic: Dynamic) -> int | None:
    """Samples of a batch that the source is fixed to; None where they vary."""
    sizes = [len(v) for _, _, v in leaves(as_call(example)) if getattr(v, "ndim", 0)] if example is not None else []
    fixed = dynamic is not None and not any(0 in axes for axes in dynamic.values())
    return sizes[0] if fixed and sizes else None


def _parts(total: int, fixed: int | None) -> list[list[int]]:
    """Positions of evenly spaced samples, batch by batch; only complete batches where their size is fixed."""
    count, size = min(total, SAMPLES), fixed or BATCH
    places = [i * total // count for i in range(count)]
    parts = [places[i : i + size] for i in range(0, count, size)]
    complete = [part for part in parts if len(part) == size]
    if fixed and not complete:
        raise TaskError(
            "there are fewer samples than the network's batch",
            code="too-few",
            got=f"{total} samples",
            expected=f"batches of {fixed}, which the network is fixed to",
            remedy="give more samples, or export the network with a batch that varies",
        )
    return complete if fixed else parts


def _of_path(path: Path, example: Any | None, fixed: int | None) -> Task:
    if path.is_dir():
        return _of_images(path, example, fixed)
    suffix = path.suffix.lower()
    if path.is_file() and suffix == ".npy":
        return _of_samples({"": _read(path, reading.array)}, path.stem, example, fixed)
    if path.is_file() and suffix == ".npz":
        if any(name in datasets.ARRAYS for name in _read(path, reading.array_names)):
            return datasets.npz_arrays(path, batch=fixed or BATCH, calibration_samples=SAMPLES)
        arrays = _read(path, reading.arrays)
        if len(arrays) == 1:  # the only input, whatever its name
            arrays = {"": next(iter(arrays.values()))}
        return _of_samples(arrays, path.stem, example, fixed)
    raise TaskError(
        "the calibration data is missing, or of an unknown kind",
        code="missing",
        got=repr(str(path)),
        expected=FORMS,
        remedy=suggest_file(path) or "check the path",
    )


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as cause:
        raise TaskError(
            f"{path.name} can't be read",
            code="unreadable",
            got=f"{path}: {cause}",
            expected="arrays of numbers, written by numpy.save or numpy.savez",
        ) from cause


def _of_samples(arrays: Mapping[str, Any], name: str, example: Any | None, fixed: int | None) -> Task:
    """A task of samples along axis 0; an array without a name is the only input."""
    tensors = {key: torch.as_tensor(np.asarray(value)) for key, value in arrays.items()}
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(sizes) != 1 or not min(sizes):
        raise TaskError(
            "the arrays do not hold samples along axis 0, as many in each",
            code="not-samples",
            got=", ".join(f"{key or 'array'} {tuple(tensor.shape)}" for key, tensor in tensors.items()) or "no array",
            expected="(samples, ...), at least one",
        )

    def of(part: list[int]) -> Any:
        return tensors[""][part] if "" in tensors else {key: tensor[part] for key, tensor in tensors.items()}

    batches = [of(part) for part in _parts(min(sizes), fixed)]
    return Task(example=batches[0] if example is None or "" not in tensors else example, calibration=batches, name=name)


def _of_images(root: Path, example: Any | None, fixed: int | None) -> Task:
    """Images of the size of the network's own example, normalized as for ImageNet."""
    pillow()
    inputs = [v for _, _, v in leaves(as_call(example))] if example is not None else []
    shape = tuple(inputs[0].shape) if inputs else (1, 3, 224, 224)
    if len(inputs) > 1 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise TaskError(
            "a folder of images can't be read for this network",
            code="not-images",
            got=f"inputs of shape {', '.join(str(tuple(v.shape)) for v in inputs)}",
            expected="one input (batch, 3, size, size)",
            remedy="give the inputs as the network takes them: an .npy file, or file.py:batches",
        )
    size, files = shape[2], all_images(root)
    images = Images(files, size, round(size * 8 / 7), IMAGENET_MEAN, IMAGENET_STD)
    batches = [images.inputs(part) for part in _parts(len(files), fixed)]
    return Task(example=torch.zeros(1, 3, size, size) if example is None else example, calibration=batches)
