"""What a stranger's Hugging Face folder may say, checked before transformers reads it.

Its configuration names no code, its weights are safetensors that lie in the folder, and sizes fit what is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import CheckpointError, SourceError
from penjing.records import reading

MOST = 1 << 26  # largest size that a configuration may name
FEWER = 4  # the widest tensor may be this many times narrower than a size in the configuration, for partial networks
AGAIN = "write the folder again with model.save_pretrained(folder)"
_LAYERS = re.compile(r"(^|_)(n_layers?|num_layers|layers|depths?|num_blocks)$")
_WIDTHS = re.compile(
    r"(^|_)(vocab_size|hidden_size|intermediate_size|embedding_size|d_model|d_ff|ffn_dim|n_embd|num_labels)$"
)
_LOCAL = (
    None,
    "eager",
    "sdpa",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)  # ways to compute, in transformers itself
_READ = ("config.json", "generation_config.json", "preprocessor_config.json")
"""What is read to open a network. Tokenizers are not: the longest text of many is a number beyond 64 bits."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMED = "transformers_weights"  # the entry of a configuration that names another file


@dataclass(frozen=True)
class Stored:
    """What the headers of a folder's weights say.

    Attributes:
        tensors: Shape and type (``F32``) of every tensor, by name.
    """

    tensors: dict[str, tuple[tuple[int, ...], str]]

    @property
    def values(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    @property
    def widest(self) -> int:
        """The longest axis."""
        return max((n for shape, _ in self.tensors.values() for n in shape), default=0)


def check(folder: Path) -> tuple[dict[str, Any], Stored]:
    """The configuration of a folder that asks for nothing but data, and what its weights are said to be.

    Raises:
        SourceError: A file is missing or can't be read, or sizes do not match the weights.
        CheckpointError: The folder asks for code of its own, for a pickle, or for files outside.
    """
    config = _read_config(folder / "config.json")
    _refuse_code(folder, config)
    _require_safetensors(folder, config)
    stored = _stored(folder, config)
    _check_sizes(folder, config, stored)
    return config, stored


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = reading.json_file(path)
    except (OSError, ValueError) as cause:
        raise SourceError(
            "config.json can't be read", code="unreadable", got=f"{path}: {cause}", expected="a JSON object"
        ) from cause
    if not isinstance(config, dict):
        raise SourceError(
            "config.json can't be read", code="unreadable", got=type(config).__name__, expected="a JSON object"
        )
    return config


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    for key, value in _entries(config):
        if key == "auto_map":
            got, remedy = f"auto_map: {value}", "import the class yourself and give it as file.py:factory"
        elif key.endswith("implementation") and any(v not in _LOCAL for v in _leaves(value)):
            # transformers would download a kernel of this name and run it
            got, remedy = f"{key}: {value!r}"[:200], 'set it to "eager" in config.json'
        elif key == "quantization_config":
            got, remedy = "a quantization_config", "give the floating-point network; Penjing quantizes it"
        else:
            continue
        raise CheckpointError(
            f"the model in {folder.name} is refused: it asks for code outside transformers",
            code="foreign-code",
            got=got,
            expected="a floating-point model whose class is part of transformers itself",
            remedy=remedy,
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder.name} holds an adapter, not a whole network",
            code="adapter",
            got="adapter_config.json",
            expected="a folder with all weights",
            remedy="merge it first: model.merge_and_unload().save_pretrained(folder)",
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _require_safetensors(folder: Path, config: dict[str, Any]) -> None:
    if config.get(_NAMED) is not None or (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file():
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"the weights in {folder.name} are not safetensors",
            code="pickle",
            got=", ".join(pickles),
            expected="model.safetensors",
            remedy="load it with transformers where you trust it, then model.save_pretrained(folder)",
        )
    raise SourceError(
        f"{folder.name} holds no weights",
        code="no-weights",
        got=", ".join(sorted(p.name for p in folder.iterdir())[:10]),
        expected="model.safetensors beside config.json",
        remedy="download or save the whole folder",
    )


def _leaves(value: Any) -> list[Any]:
    """A setting, or those of the parts of a network where it is given for each."""
    return [leaf for part in value.values() for leaf in _leaves(part)] if isinstance(value, dict) else [value]


def _stored(folder: Path, config: dict[str, Any]) -> Stored:
    """Read the headers of the weights, and all else that transformers will read."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    path = folder
    try:
        for name in _READ:
            path = folder / name
            if path.exists():
                reading.json_file(path)
        path = _main_file(folder, config)
        parts = _shards(folder, path) if path.suffix == ".json" else [path]
        for path in parts:
            for name, entry in reading.safetensors_header(path).items():
                tensors[name] = tuple(entry["shape"]), str(entry.get("dtype"))
    except (OSError, ValueError) as cause:
        raise SourceError(
            f"{path.name} can't be read",
            code="unreadable",
            got=f"{path}: {cause}",
            expected="a whole file, as model.save_pretrained writes it",
            remedy="download or save the whole folder",
        ) from None
    return Stored(tensors)


def _main_file(folder: Path, config: dict[str, Any]) -> Path:
    """The file of weights, or the index of several."""
    name = config.get(_NAMED)
    if name is None:
        return folder / (_WEIGHTS if (folder / _WEIGHTS).is_file() else _INDEX)
    return _within(folder, name, f"{_NAMED} in config.json", (".safetensors", ".safetensors.index.json"))


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index names."""
    listed = reading.json_file(index)
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(listed.get("metadata"), dict):
        raise ValueError("no object weight_map with the file of every tensor beside an object metadata")
    if any(not isinstance(name, str) for name in places.values()):
        raise ValueError("a weight_map whose values are not names of files")
    return [_within(folder, name, index.name, (".safetensors",)) for name in sorted(set(places.values()))]


def _within(folder: Path, name: Any, where: str, suffixes: tuple[str, ...]) -> Path:
    """The file of a folder that is named in another; links to elsewhere, as in a cache of the hub, are the user's."""
    if not isinstance(name, str) or any(c in name for c in "/\\:\0") or not name.endswith(suffixes):
        raise CheckpointError(
            f"{where} names what is not a file of weights in the folder",
            code="outside",
            got=repr(name)[:200],
            expected=f"the plain name of a file {' or '.join(f'*{suffix}' for suffix in suffixes)} in {folder}",
            remedy=AGAIN,
        )
    return folder / name


def _check_sizes(folder: Path, config: dict[str, Any], stored: Stored) -> None:
    """Raise SourceError where sizes would make transformers hang while it reads the configuration."""
    tensors, widest = len(stored.tensors), stored.widest
    for key, value in _entries(config):
        counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        if _LAYERS.search(key) and not key.startswith("max_") and (sum(counts) > tensors or min(counts, default=0) < 0):
            expected = f"from 0 to {tensors}, the number of tensors in the folder"
        elif _WIDTHS.search(key) and any(n > FEWER * widest for n in counts):
            expected = f"at most {FEWER * widest:,}, as no tensor in the folder has more than {widest:,} along an axis"
        elif any(abs(n) > MOST for n in counts):
            expected = f"at most {MOST:,}"
        else:
            continue
        raise misfit(folder, f"{key}: {value}"[:200], expected)


def misfit(folder: Path, got: str, expected: str) -> SourceError:
    """The error that says that configuration and weights are not of one network."""
    return SourceError(
        f"config.json in {folder.name} describes a network that does not match its weights",
        code="misfit",
        got=got,
        expected=expected,
        remedy=AGAIN,
    )
