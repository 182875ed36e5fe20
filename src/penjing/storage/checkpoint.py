"""The trainable checkpoint of a draft: `edits.json` + `weights.safetensors` + `plan.json`. No pickle, no code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.export import ExportedProgram

from penjing.errors import CheckpointError, OutputError
from penjing.network.capture import capture_network
from penjing.records import reading
from penjing.records.files import umask, write_text
from penjing.sources.source import in_single_precision, open_source, with_declared_axes
from penjing.steps.draft import Draft, Edit
from penjing.steps.plan import Plan
from penjing.storage import packed
from penjing.surgery import replay
from penjing.tasks.opening import as_task
from penjing.tasks.task import Task

EDITS, WEIGHTS, PLAN = FILES = ("edits.json", "weights.safetensors", "plan.json")
FORMAT = 1


def save(draft: Draft, folder: Path) -> None:
    """Write the three files, `edits.json` last, so that a checkpoint without it is recognized as incomplete."""
    # Tied tensors are stored once; `ties` maps the other names to it.
    stored: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in draft.network.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            ties[name] = first[key]
            continue
        first[key] = name
        stored[name] = tensor.detach().cpu().contiguous().clone()
    aside = folder / f".{WEIGHTS}.new"
    try:
        save_file(stored, aside, metadata={"format": "pt"})
        os.chmod(aside, 0o666 & ~umask())  # safetensors creates files that only the owner can read
        (folder / EDITS).unlink(missing_ok=True)  # invalidate an older checkpoint: its edits do not fit the new weights
        os.replace(aside, folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise OutputError(
            "the checkpoint can't be written",
            code="unwritable",
            got=f"{error} ({folder})",
            expected="a folder with write permission and free space",
            remedy="free some space, or choose another folder with --out",
        ) from error
    write_text(folder / PLAN, draft.plan.to_json())
    write_text(folder / EDITS, json.dumps({"format": FORMAT, "edits": draft.edits, "ties": ties}, indent=1) + "\n")


def load(folder: Path | str, source: fx.GraphModule) -> Draft:
    """Rebuild the draft that `save` wrote on a freshly captured `source`; its outputs are bit-identical.

    Args:
        folder: With the three files, or the packed file of a checkpoint.
        source: A captured network.

    Raises:
        CheckpointError: A file is missing or damaged, or the source is a different network.
        ArtifactError: The packed file is damaged.
        MissingDependency: It is a packed file, and numba is not installed.
    """
    folder = Path(folder)
    if folder.is_file():
        _check_complete(folder, packed.contents(folder).files, "pack it with `penjing pack RUN --checkpoint`")
        with tempfile.TemporaryDirectory() as aside:
            packed.unpack(folder, Path(aside, "checkpoint"))
            return load(Path(aside, "checkpoint"), source)
    _check_complete(folder, [f.name for f in folder.glob("*") if f.is_file()], "give the folder of a finished run")
    try:
        edits, ties = _read_log(folder)
        reading.safetensors_header(folder / WEIGHTS)
        weights = load_file(folder / WEIGHTS)
        plan = Plan.from_json(reading.text(folder / PLAN))
        if uneven := [edge for edge, e in plan.entries.items() if len(e.scale) != len(e.zero_point)]:
            raise ValueError(f"{PLAN} has different numbers of scales and zero points for {uneven[0]}")
    except (*reading.UNREADABLE, SafetensorError) as error:
        raise CheckpointError(
            "the checkpoint is damaged",
            code="damaged",
            got=f"{folder}: {type(error).__name__}: {error}",
            expected="the files that penjing wrote",
            remedy="run `penjing compress` again",
        ) from None
    network = replay(source, edits)
    state = {**weights, **{name: weights[of] for name, of in ties.items() if of in weights}}
    network_state = network.state_dict()
    if problem := difference(state, network_state) or _untied(state, network_state):
        raise CheckpointError(
            "the checkpoint does not fit this network",
            code="misfit",
            got=problem,
            expected="the network it was created from",
            remedy="load it with the same factory and the same version of its code",
        )
    network.load_state_dict(state)
    return Draft(network.eval(), plan, edits)


def _check_complete(place: Path, names: Collection[str], remedy: str) -> None:
    if missing := [name for name in FILES if name not in names]:
        raise CheckpointError(
            "the checkpoint is incomplete",
            code="incomplete",
            got=f"no {', '.join(missing)} in {place}",
            expected=f"{EDITS}, {WEIGHTS} and {PLAN}",
            remedy=remedy,
        )


def _read_log(folder: Path) -> tuple[tuple[Edit, ...], dict[str, str]]:
    log = reading.json_file(folder / EDITS, finite=False)
    if log["format"] > FORMAT:
        raise CheckpointError(
            "the checkpoint was written by a newer Penjing",
            code="newer",
            got=f"format {log['format']}",
            expected=f"format {FORMAT} or older",
            remedy="pip install --upgrade penjing",
        )
    if not all(isinstance(edit, dict) for edit in log["edits"]):
        raise ValueError(f"{EDITS} holds an edit that is not a JSON object")
    if not all(isinstance(name, str) for tie in log["ties"].items() for name in tie):
        raise ValueError(f"{EDITS} holds a tie that is not a pair of names")
    return tuple(log["edits"]), dict(log["ties"].items())


def restore(folder: Path | str, model: str | Path | nn.Module | ExportedProgram, task: Task | str | Path) -> Draft:
    """Restore the draft of a run folder from the original model: the trainable network, its plan and its edits.

    Args:
        folder: A run folder, or the packed file of its checkpoint.
        model: The SOURCE of the run, or a model from the same factory, with any weights.
        task: The run's task; only its example and dynamic axes are used.

    Raises:
        CheckpointError: The folder has no complete checkpoint, or the model is a different network.
        SourceError: The SOURCE can't be opened.
    """
    source = open_source(model)
    source, task, _ = in_single_precision(source, with_declared_axes(source, as_task(task)))
    return load(folder, capture_network(source.module, *task.call(), task.dynamic))


def difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str | None:
    """Describe the first few names or shapes that differ; None if nothing does."""
    missing, more = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    shapes = [
        f"{n} has shape {tuple(got[n].shape)}, the network's {tuple(expected[n].shape)}"
        for n in expected
        if n in got and got[n].shape != expected[n].shape
    ]
    shapes += [
        f"{n} is {got[n].dtype}, the network's {expected[n].dtype}".replace("torch.", "")
        for n in expected
        if n in got and got[n].dtype != expected[n].dtype
    ]
    parts = [f"lacks {', '.join(missing[:3])}" if missing else "", f"also has {', '.join(more[:3])}" if more else ""]
    return "; ".join(p for p in (*parts, *shapes[:3]) if p) or None


def _untied(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str | None:
    """The first two names that are tied in the network and differ in the checkpoint."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in expected.items():
        known = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if tensor.numel() and not torch.equal(got[known], got[name]):
            return f"{known} and {name} differ, but are tied in the network"
    return None
