"""An artifact in the layout that Hugging Face's optimum reads: the file beside configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import ArtifactError, OutputError, SourceError
from penjing.records import reading
from penjing.records.files import write_text
from penjing.records.folder import writing
from penjing.records.manifest import Manifest, read_manifest

CONFIG = "config.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of what a folder holds beside its weights: configurations, vocabularies, templates. Never code."""
_INDEX = ".index.json"  # of weights in several files


@dataclass(frozen=True)
class _Layout:
    """How optimum calls an artifact of a runtime.

    Attributes:
        stem: Of its files.
        module: That has the classes.
        prefix: Of their names.
        argument: That takes the settings of a manifest.
    """

    stem: str
    module: str
    prefix: str
    argument: str


_LAYOUTS = {
    "onnxruntime": _Layout("model", "optimum.onnxruntime", "ORTModel", "session_options=options"),
    "openvino": _Layout("openvino_model", "optimum.intel", "OVModel", "ov_config=settings"),
}
_TASKS = (
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice",
    "ImageClassification", "SemanticSegmentation", "AudioClassification", "AudioFrameClassification", "CTC",
    "AudioXVector", "FeatureExtraction",
)  # fmt: skip
"""Tasks that have a class of their own there."""


def save(artifact: Path, source: Path | None, folder: Path) -> Path:
    """Write the folder.

    Args:
        artifact: A folder with an artifact.
        source: The Hugging Face folder that its network came from.
        folder: To be written; new or empty.

    Returns:
        `folder`.

    Raises:
        SourceError: There is no such source folder, or a file in it is a link to elsewhere.
        ArtifactError: Optimum does not read this artifact.
        OutputError: The folder is not empty, or can't be written; it is left empty then.
    """
    config = _config(source)
    assert source is not None
    manifest = read_manifest(artifact)
    layout = _layout(manifest)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            "the folder for the pretrained model holds something already",
            code="exists",
            got=folder,
            expected="a new folder, or an empty one",
            remedy="choose another folder, or remove it first",
        )
    copies = {path: path.name for path in _beside(source)}
    copies |= {artifact / name: _renamed(name, manifest, layout) for name in manifest.files()}
    with writing(
        folder, what="the folder for the pretrained model", remedy="free some space, or choose another folder"
    ):
        folder.mkdir(parents=True, exist_ok=True)
        with _whole_or_empty(folder):
            for path, name in copies.items():
                shutil.copyfile(path, folder / name)
            write_text(folder / "README.md", _readme(manifest, layout, config))
    return folder


def _beside(source: Path) -> list[Path]:
    """What lies beside the weights, to be copied.

    A link may lead within the folder, or to the ``blobs`` of a cache of the hub. Elsewhere it could lead to what its
    owner would not pass on.
    """
    allowed = (source.resolve(), source.resolve().parent.parent / "blobs")
    paths = [p for p in sorted(source.iterdir()) if p.suffix in _COPIED and not p.name.endswith(_INDEX) and p.is_file()]
    for path in paths:
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise SourceError(
                f"{path.name} in the source folder is a link to elsewhere",
                code="link",
                got=f"{path} -> {path.resolve()}",
                expected="a file, or a link within the folder or into a cache of the hub",
                remedy="replace the link by a copy, if the file is to go with the network",
            )
    return paths


@contextmanager
def _whole_or_empty(folder: Path) -> Iterator[None]:
    """Empty the folder, which was empty, where it can't be filled."""
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        raise


def _config(source: Path | None) -> dict[str, Any]:
    """The configuration of the source folder."""
    path = None if source is None else source / CONFIG
    got = "a network that was not opened from a folder" if source is None else f"no {CONFIG} in {source}"
    try:
        config = reading.json_file(path) if path is not None and path.is_file() else None
        if isinstance(config, dict):
            return config
        if config is not None:
            got = f"{path}: not an object"
    except (OSError, ValueError) as error:
        got = f"{path}: {error}"
    raise SourceError(
        "the source is not a Hugging Face folder",
        code="not-pretrained",
        got=got,
        expected=f"a folder with {CONFIG} and the tokenizer or preprocessor",
        remedy='save_pretrained(folder, source="the folder that the model was loaded from")',
    )


def _layout(manifest: Manifest) -> _Layout:
    layout = _LAYOUTS.get(manifest.runtime)
    if layout is not None and len(manifest.programs) == 1:
        return layout
    raise ArtifactError(
        "optimum does not read this artifact",
        code="not-for-optimum",
        got=f"{len(manifest.programs)} programs for {manifest.runtime}",
        expected=f"one program for {' or '.join(_LAYOUTS)}",
        remedy='compress(..., runtime="onnxruntime")',
    )


def _renamed(name: str, manifest: Manifest, layout: _Layout) -> str:
    """A program's own files take optimum's stem; data beside an ONNX file keeps the name that stands in the file."""
    stem = Path(manifest.programs[0].files[0]).stem
    return layout.stem + name[len(stem) :] if name.startswith(f"{stem}.") and "/" not in name else name


def _readme(manifest: Manifest, layout: _Layout, config: dict[str, Any]) -> str:
    """How the folder is opened, with the settings that its parity was measured with."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    task = next((task for task in _TASKS if architecture.endswith(f"For{task}")), "")
    if not task:
        task = "FeatureExtraction" if architecture.endswith("Model") else "CustomTasks"
    kind = f"{layout.prefix}For{task}"
    program = manifest.programs[0]
    lines, argument = [], ""
    if manifest.settings and manifest.runtime == "onnxruntime":
        lines = ["import onnxruntime", "", "options = onnxruntime.SessionOptions()"]
        disabled = manifest.settings.get("disabled_optimizers", "").replace(" ", ";")
        lines += [f'options.add_session_config_entry("optimization.disable_specified_optimizers", "{disabled}")', ""]
    elif manifest.settings:
        lines = [f"settings = {json.dumps(dict(manifest.settings))}", ""]
    if lines:
        argument = f", {layout.argument}"
    code = [f"from {layout.module} import {kind}", *lines, f'model = {kind}.from_pretrained("."{argument})']
    return (
        f"A network for {manifest.runtime}, {manifest.precision}, made by Penjing.\n\n"
        f"- inputs: {', '.join(f'`{p.name}` {list(p.shape)}' for p in program.inputs)}\n"
        f"- outputs: {', '.join(f'`{p.name}`' for p in program.outputs)}\n\n"
        "```python\n" + "\n".join(code) + "\n```\n"
    )
