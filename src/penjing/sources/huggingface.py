"""Opening a Hugging Face model folder: ``config.json`` and ``model.safetensors``, with transformers' own classes.

Weights are read only from safetensors. A folder with just ``pytorch_model.bin`` is refused, although transformers
could read it with the restricted unpickler: saving it as safetensors takes one line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penjing.errors import MissingDependency, PenjingError, SourceError
from penjing.records import reading
from penjing.sources import huggingface_examples, huggingface_files
from penjing.sources.huggingface_files import FEWER, MOST, Stored
from penjing.tasks.usercode import line_of, suggest

_FLOATS = ("F32", "F16", "BF16", "F64")
SHOWN = 5  # names of tensors in a message
_FREE = 1 << 20  # numbers that a network may have beyond its stored ones: tables of positions, which are computed


def open_folder(folder: Path) -> tuple[nn.Module, Any | None, tuple[str, ...]]:
    """Open the model of a folder in eval mode, without internet access and without running code from the folder.

    Its class is the first of ``architectures`` in ``config.json``, looked up in transformers by name.

    Returns:
        The model, without a cache among its outputs; example inputs (by name, batch first), or None; notes.

    Raises:
        SourceError: A file is missing, the class is unknown to transformers, or the weights do not match.
        CheckpointError: The folder asks for code of its own, for a pickle, or for files outside.
        MissingDependency: transformers, or a package that this class of it needs, is not installed.
    """
    config, stored = huggingface_files.check(folder)
    kind = _class_of(config, folder)
    with _alone(), _told(folder, kind):
        _check_network(folder, kind, stored)
        model, loading = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,  # whatever dtype the file has: artifacts compute in it
            ignore_mismatched_sizes=True,  # to list them: they are refused
            output_loading_info=True,
        )
    misshapen = sorted(
        f"{name}: {list(stored_shape)} in the file, {list(shape)} in the network"
        for name, stored_shape, shape in loading["mismatched_keys"]
    )
    if misshapen:
        raise huggingface_files.misfit(folder, _first(misshapen, "; "), f"tensors as {kind.__name__} has them")
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers only warns, and initializes them randomly
        raise SourceError(
            f"the weights in {folder.name} are incomplete",
            code="incomplete",
            got=f"no {_first(missing)}",
            expected=f"every weight of {kind.__name__}",
            remedy='check "architectures" in config.json: it must be the class that was trained',
        )
    unused = sorted(loading["unexpected_keys"])
    notes = (f"{kind.__name__} does not read what {folder.name} holds of {_first(unused)}",) if unused else ()
    _without_cache(model)
    return model.eval(), huggingface_examples.example(model, _preprocessor(folder)), notes


def _first(names: list[str], between: str = ", ") -> str:
    return between.join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextmanager
def _alone() -> Iterator[None]:
    """Nothing is asked of the hub, whatever a configuration names; what transformers warns of is told by Penjing."""
    from huggingface_hub import constants
    from transformers.utils import logging as told

    asks, verbosity = constants.HF_HUB_OFFLINE, told.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    told.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = asks
        told.set_verbosity(verbosity)


@contextmanager
def _told(folder: Path, kind: Any) -> Iterator[None]:
    """What transformers raises is an error of the source: it has many kinds of error for an inconsistent folder."""
    try:
        yield
    except PenjingError:
        raise
    except ImportError as cause:
        raise MissingDependency(
            f"{kind.__name__} of transformers needs a package that is not installed",
            code="not-installed",
            got=_one_line(cause),
            expected="a class that transformers itself computes, or that package",
            remedy="install it, or give the model as file.py:factory",
        ) from cause
    except Exception as cause:
        raise SourceError(
            f"transformers can't load the model in {folder.name}",
            code="unloadable",
            got=f"{type(cause).__name__}: {_one_line(cause)} ({line_of(cause)})",
            expected=f"weights of {kind.__name__} as config.json describes it",
            remedy=huggingface_files.AGAIN,
        ) from cause


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_network(folder: Path, kind: Any, stored: Stored) -> None:
    """Build the network without memory for its tensors, and raise SourceError where it is not the one that is stored.

    A tensor that the file lacks, or has in another shape, would be made and filled with random numbers first.
    """
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
        network = kind(config)
    sizes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    whole = sum(math.prod(shape) for shape in sizes.values())
    if whole > FEWER * stored.values + _FREE:
        shapes = {shape for shape, _ in stored.tensors.values()}
        strange = sorted((n for n in sizes if sizes[n] not in shapes), key=lambda n: -math.prod(sizes[n]))
        raise huggingface_files.misfit(
            folder,
            f"{whole:,} parameters of {kind.__name__}, "
            f"among them {_first([f'{name} {list(sizes[name])}' for name in strange or list(sizes)])}",
            f"about {stored.values:,}, which the folder holds",
        )
    if (computed := sum(buffer.numel() for buffer in network.buffers())) > FEWER * stored.values + MOST:
        raise huggingface_files.misfit(
            folder,
            f"tables of {computed:,} numbers that {kind.__name__} computes",
            f"at most {FEWER * stored.values + MOST:,}",
        )
    kinds = {name: stored.tensors[name][1] for name in sizes if name in stored.tensors}
    packed = [f"{name} ({numbers})" for name, numbers in kinds.items() if numbers not in _FLOATS]
    if packed:
        raise SourceError(
            f"the weights in {folder.name} are not floating-point numbers",
            code="not-floats",
            got=_first(packed),
            expected=f"tensors of {', '.join(_FLOATS)}",
            remedy="give the floating-point network; Penjing quantizes it",
        )


def _class_of(config: dict[str, Any], folder: Path) -> Any:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(
            f"config.json in {folder.name} names no class",
            code="no-class",
            got=f"architectures: {names}",
            expected='for example "architectures": ["BertForSequenceClassification"]',
            remedy="write the folder again with model.save_pretrained(folder)",
        )
    try:
        import transformers
    except ImportError as cause:
        raise MissingDependency(
            "opening a Hugging Face folder needs transformers",
            code="not-installed",
            got=str(cause),
            expected="the package transformers",
            remedy="pip install transformers",
        ) from cause
    name = names[0]
    # modules and functions of transformers are attributes too; accept only a model class
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, nn.Module) and getattr(kind, "config_class", None) is not None:
        return kind
    known = [n for n in dir(transformers) if n[0].isupper() and "For" in n and not n.startswith("Auto")]
    raise SourceError(
        f"this transformers has no model class {name!r}",
        code="unknown-class",
        got=f"transformers {transformers.__version__}",
        expected="a class that is part of transformers itself",
        remedy=suggest(name, known) or "pip install --upgrade transformers, or give the model as file.py:factory",
    )


def _without_cache(model: nn.Module) -> None:
    """A cache of keys and values is an object with a state, which no runtime takes or gives."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", None):
            config.use_cache = False


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    settings = reading.json_file(path) if path.is_file() else {}  # that it can be read has been checked
    return settings if isinstance(settings, dict) else {}
