"""Checking a ``.keras`` file before Keras reads it: only classes of Keras itself, no code, no other files.

Such a file is an archive of three members: what the network is (JSON), its weights (HDF5), and when it was made. Keras
looks up every class and function that the JSON names, by an import where it knows no better, and some of its own layers
run code or open files that the JSON names. Here every name is held against a list first. The weights may point to other
files, too, or claim to be larger than they are.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penjing.errors import CheckpointError, MissingDependency, PenjingError, SourceError
from penjing.records import reading

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
_MEMBERS = frozenset((CONFIG, WEIGHTS, "metadata.json"))
_CLASSES = frozenset(
    "keras keras.layers keras.models keras.initializers keras.regularizers keras.constraints keras.dtype_policies "
    "keras.random keras.ops keras.activations keras.src.models.functional keras.src.models.sequential "
    "keras.src.ops.numpy keras.src.ops.nn keras.src.ops.core keras.src.ops.math keras.src.ops.image "
    "keras.src.ops.linalg keras.src.ops.einops keras.src.applications.convnext "
    "keras.src.dtype_policies.dtype_policy keras.losses keras.metrics keras.optimizers "
    "keras.optimizers.schedules".split()
)
"""Modules whose classes are layers, graphs, operators and settings, and read no files."""
_TRAINING = re.compile(
    r"keras\.src\.(backend\.torch\.)?(optimizers|losses|metrics)\.\w+"
)  # of a compiled inner network
_FUNCTIONS = frozenset("keras.activations keras.ops keras.initializers keras.losses keras.metrics builtins".split())
_VALUES = frozenset(
    "__keras_tensor__ __tensor__ __numpy__ __bytes__ __ellipsis__ __slice__ DTypePolicy FloatDTypePolicy".split()
)
_CODE = frozenset("Lambda TorchModuleWrapper TFSMLayer JaxLayer FlaxLayer".split())
_TEXT = frozenset("StringLookup IntegerLookup TextVectorization Hashing HashedCrossing FeatureSpace".split())
_PLAIN = re.compile(r"[A-Za-z_]\w*")
_SIZES = ("filters", "units", "input_dim", "output_dim")
_EXPANSION = 50  # times that weights in HDF5 may be larger than what is stored


def check(path: Path) -> int:
    """Refuse a file that would run code, read other files, or grow beyond its size; how many values its weights have.

    Raises:
        CheckpointError: With the name of the class, or of the member of the archive.
        SourceError: A layer can't be a part of an artifact.
        MissingDependency: The package h5py is not installed.
    """
    try:
        with reading.regular(path) as file, zipfile.ZipFile(file) as archive:
            _check_members(path, archive)
            config = reading.json_text(_text(archive))
            if isinstance(config, dict):
                config.pop("compile_config", None)  # it is not read; that of a network within the network is
            stored = archive.getinfo(WEIGHTS).file_size
            for part, place in _parts(config):
                _check_part(path, part, place)
                _check_sizes(part, place, stored)
            with archive.open(WEIGHTS) as weights:
                return _check_weights(path, weights, stored)
    except PenjingError:
        raise
    except reading.UNREADABLE as error:
        raise damaged(path, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error


def damaged(path: Path, got: str) -> CheckpointError:
    """The error for a file that can't be read."""
    return CheckpointError(
        "the Keras file can't be read",
        code="damaged",
        got=f"{path}: {got}",
        expected="a file written by model.save('net.keras') of Keras 3",
        remedy="write or download it again; a file of Keras 2 (.h5) opens in keras.models.load_model, and "
        "model.save('net.keras') writes it anew",
    )


def unread(path: Path, error: Exception) -> CheckpointError:
    """The error for what Keras raised: a name that it does not know, or a damaged file."""
    text = " ".join(str(error).split())
    unknown = re.search(r"Could not locate \w+ '?([\w>.]+)|Could not interpret [\w ]+ identifier: '?([\w>.]+)", text)
    if unknown is not None:
        return _refused(
            path, f"the custom object {(unknown[1] or unknown[2])!r}", _FACTORY.format(path.name), "custom-object"
        )
    return damaged(path, f"{type(error).__name__}: {text[:400]}")


def _text(archive: zipfile.ZipFile) -> str:
    if archive.getinfo(CONFIG).file_size > reading.TEXT_BYTES:
        raise ValueError(f"{CONFIG} has {archive.getinfo(CONFIG).file_size:,} bytes")
    return archive.read(CONFIG).decode("utf-8")


def _refused(path: Path, got: str, remedy: str, code: str = "foreign-code") -> CheckpointError:
    return CheckpointError(
        f"{path.name} is refused: opening it could run code, or read other files",
        code=code,
        got=got,
        expected="layers, operators and settings of Keras itself, and their weights",
        remedy=remedy,
    )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    missing = {CONFIG, WEIGHTS} - set(names)
    if missing or len(names) != len(set(names)):
        raise ValueError(f"its archive lacks {', '.join(sorted(missing))}" if missing else "a member stands twice")
    for info in infos:
        if info.filename not in _MEMBERS:
            raise _refused(
                path,
                f"it holds {info.filename!r}",
                "layers with files of their own (vocabularies) belong before the network: save it without them",
            )
        if info.file_size > reading.TEXT_BYTES and info.file_size > 2 * info.compress_size * _EXPANSION:
            raise ValueError(f"{info.filename} would grow from {info.compress_size:,} to {info.file_size:,} bytes")


def _check_sizes(part: dict[str, Any], place: str, stored: int) -> None:
    """Refuse sizes beyond the weights: Keras would take memory for them before it compares."""
    config = part.get("config")
    sizes = config if isinstance(config, dict) else {}
    for name in _SIZES:
        size = sizes.get(name)
        if type(size) is int and size > stored:  # each makes a tensor that is at least as long
            raise ValueError(f"{name} = {size:,} in layer {place!r}, and all weights have {stored:,} bytes")


def _parts(value: Any, place: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """Every object that Keras would make, with the name of the layer that it is of."""
    if isinstance(value, list):
        for item in value:
            yield from _parts(item, place)
    elif isinstance(value, dict):
        config = value.get("config")
        if isinstance(config, dict) and isinstance(config.get("name"), str):
            place = config["name"]
        if "class_name" in value:
            yield value, place
        for item in value.values():
            yield from _parts(item, place)


def _check_part(path: Path, part: dict[str, Any], place: str) -> None:
    kind, module, registered = (part.get(key) for key in ("class_name", "module", "registered_name"))
    where = f"{kind!r} in layer {place!r}" if place else f"{kind!r}"
    own = _FACTORY.format(path.name)
    if kind in _TEXT:
        raise SourceError(
            f"the Keras layer {place!r} makes numbers of texts, or looks them up",
            code="text-layer",
            got=str(kind),
            expected="a network of tensors of numbers, which runtimes take",
            remedy="do it before the network, and save the network from its numbers on",
        )
    if not isinstance(kind, str) or kind == "__lambda__" or kind in _CODE:
        raise _refused(path, f"{where} holds code of its own, or loads it", own)
    if kind == "__typespec__":
        raise _refused(path, f"{where} is a type of TensorFlow", own)
    if kind in _VALUES:
        return
    if kind == "function":
        function = part.get("config")
        fits = isinstance(function, str) and _PLAIN.fullmatch(function) and registered in (None, function, "function")
        if module not in _FUNCTIONS or not fits:
            raise _refused(path, f"the function {module}.{function}, in layer {place!r}", own, "custom-object")
        return
    if registered not in (None, kind):
        raise _refused(path, f"the custom object {registered!r}, in layer {place!r}", own, "custom-object")
    known = module in _CLASSES or (isinstance(module, str) and _TRAINING.fullmatch(module))
    if module is not None and not (known and _PLAIN.fullmatch(kind)):
        raise _refused(path, f"the custom object {module}.{kind}, in layer {place!r}", own, "custom-object")
    if module is None and "module" in part:
        raise _refused(path, f"the custom object {kind!r}, in layer {place!r}", own, "custom-object")


def _check_weights(path: Path, file: Any, stored: int) -> int:
    """Refuse weights that lie elsewhere, or are far larger than what is stored; how many values there are."""
    try:
        import h5py
    except ImportError:
        raise MissingDependency(
            "the weights of Keras files are read with the package h5py",
            code="not-installed",
            got="it is not installed",
            expected="keras 3, with h5py",
            remedy="pip install 'penjing[keras]'",
        ) from None
    with h5py.File(file, "r") as weights:
        size = count = 0
        waiting = [("", weights)]
        seen: set[Any] = set()
        while waiting:
            above, group = waiting.pop()
            if group.id in seen:
                raise ValueError(f"the weights contain themselves: {above!r}")
            seen.add(group.id)
            for name in group:
                place = f"{above}/{name}"
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise _refused(path, f"the weights {place!r} are a link", _AGAIN)
                inside = group[name]
                if isinstance(inside, h5py.Group):
                    waiting.append((place, inside))
                elif inside.external or inside.is_virtual:
                    raise _refused(path, f"the weights {place!r} lie in another file", _AGAIN)
                elif isinstance(inside, h5py.Dataset):
                    size += inside.nbytes
                    count += inside.size
        if size > reading.TEXT_BYTES and size > _EXPANSION * stored:
            raise ValueError(f"{size:,} bytes of weights in a file of {stored:,}")
    return count


_FACTORY = (
    "write a factory that imports its class and loads the file, and give it as file.py:factory: "
    "def factory(): return keras.models.load_model({!r}, custom_objects=...)"
)
_AGAIN = "load it where it was made and write it again: model.save('net.keras')"

__all__ = ["check", "unread"]
