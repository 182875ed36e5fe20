"""Opening a TASK: a Python name, a folder of images, or a file of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from penjing.errors import TaskError
from penjing.tasks import datasets
from penjing.tasks.task import Task
from penjing.tasks.usercode import call_named, load_named, public_callables, split_spec, suggest_file


def open_task(spec: str) -> Task:
    """Open a TASK.

    Args:
        spec: ``file.py:task`` or ``package.module:task`` (a `Task`, or a function without arguments that returns
            one), a folder of images ``root/<class>/*.png``, or a file of NumPy arrays ``data.npz``.

    Raises:
        TaskError: It is missing, raises, or is not a task.
    """
    parts = split_spec(spec)
    if parts is not None:
        where, name = parts
        opened = load_named(where, name, error=TaskError, role="task")
        if callable(opened) and not isinstance(opened, Task | nn.Module):
            opened = call_named(opened, where, error=TaskError, role="task")
        if isinstance(opened, Task):
            return opened
        raise TaskError(
            f"{spec} is not a task",
            code="not-a-task",
            got=type(opened).__name__,
            expected="a penjing.Task, or a function without arguments that returns one",
            remedy="build it with Task(example=..., calibration=..., evaluate=...)",
        )
    path = Path(spec)
    if path.is_dir():
        return datasets.image_folder(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return datasets.npz_arrays(path)
    if path.suffix.lower() == ".json" and path.is_file():
        raise TaskError(
            "labels alone are not a task: they do not tell what the network's boxes are, and which pixels it takes",
            code="labels",
            got=repr(spec),
            expected="a Python file that says so: file.py:task",
            remedy=f'task = pj.tasks.detection(pj.tasks.coco("{path.name}", size=640), boxes="cxcywh"), in a task.py',
        )
    names = public_callables(path) if path.suffix == ".py" else []
    raise TaskError(
        "a Python file needs the name of its task" if names else "the task is missing, or of an unknown kind",
        code="no-name" if names else "missing",
        got=repr(spec),
        expected="file.py:task, package.module:task, a folder of images root/<class>/*.png, or an .npz file",
        remedy=f"one of its names: {', '.join(names)}" if names else suggest_file(path) or "check the path",
    )


def as_task(task: Any) -> Task:
    """Return a task itself, or open its description (see `open_task`).

    Raises:
        TaskError: The argument is neither, or does not name a task.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str | Path):
        return open_task(str(task))
    raise TaskError(
        "the argument `task` is not a Task",
        code="not-a-task",
        got=type(task).__name__,
        expected="a penjing.Task, or as on the command line: file.py:task, a folder of images, an .npz file",
        remedy="build it with Task(example=..., calibration=..., evaluate=...); it is the argument after the network",
    )
