"""Opening a Hugging Face model folder: ``config.json`` and ``model.safetensors``, with transformers' own classes.

Weights are read only from safetensors. A folder with just ``pytorch_model.bin`` is refused, although transformers
could read it with the restricted unpickler: saving it as safetensors takes one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penjing.errors import CheckpointError, MissingDependency, SourceError
from penjing.records import reading
from penjing.sources import huggingface_examples
from penjing.tasks.usercode import line_of, suggest

MOST = 1 << 26  # largest size that a configuration may name
_LAYERS = re.compile(r"(^|_)(n_layers?|num_layers|layers|depths?|num_blocks)$")
_WIDTHS = re.compile(r"(^|_)(vocab_size|hidden_size|intermediate_size|embedding_size|d_model|d_ff|ffn_dim|n_embd)$")
FEWER = 4  # the widest tensor may be this many times narrower than a size in the configuration, for partial networks
_LOCAL_ATTENTION = (None, "eager", "sdpa", "flex_attention")
_READ = ("config.json", "generation_config.json", "preprocessor_config.json")
"""What is read to open a network. Tokenizers are not: the longest text of many is a number beyond 64 bits."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def open_folder(folder: Path) -> tuple[nn.Module, Any | None]:
    """Open the model of a folder in eval mode, without internet access and without running code from the folder.

    Its class is the first of ``architectures`` in ``config.json``, looked up in transformers by name.

    Returns:
        The model, without a cache among its outputs, and example inputs (by name, batch first), or None.

    Raises:
        SourceError: A file is missing, the class is unknown to transformers, or the weights do not match.
        CheckpointError: The folder asks for code of its own, or for a pickle.
        MissingDependency: transformers is not installed.
    """
    config = _read_config(folder / "config.json")
    _refuse_code(folder, config)
    _require_safetensors(folder)
    _check_sizes(folder, config)
    kind = _class_of(config, folder)
    try:
        model, loading = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,  # whatever dtype the file has: artifacts compute in it
            output_loading_info=True,
        )
    except Exception as cause:  # transformers raises many kinds of error for an inconsistent folder
        raise SourceError(
            f"transformers can't load the model in {folder.name}",
            code="unloadable",
            got=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
            f" ({line_of(cause)})",
            expected=f"weights of {kind.__name__} as config.json describes it",
            remedy="write the folder again with model.save_pretrained(folder)",
        ) from cause
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers only warns, and initializes them randomly
        raise SourceError(
            f"the weights in {folder.name} are incomplete",
            code="incomplete",
            got=f"no {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            expected=f"every weight of {kind.__name__}",
            remedy='check "architectures" in config.json: it must be the class that was trained',
        )
    _without_cache(model)
    return model.eval(), huggingface_examples.example(model, _preprocessor(folder))


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
        elif key.endswith("implementation") and value not in _LOCAL_ATTENTION and not isinstance(value, dict):
            # transformers would download a kernel of this name and run it
            got, remedy = f"{key}: {value!r}", 'set it to "sdpa" in config.json'
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


def _require_safetensors(folder: Path) -> None:
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
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


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Raise SourceError if the folder would make transformers hang, or build a model far larger than its weights."""
    tensors, widest = 0, 0
    for path in folder.iterdir():
        try:
            if path.suffix == ".safetensors":
                header = reading.safetensors_header(path)
                tensors += len(header)
                widest = max([widest, *(n for entry in header.values() for n in entry["shape"] if type(n) is int)])
            elif path.name in _READ or path.name.endswith(".index.json"):
                reading.json_file(path)
        except (OSError, ValueError) as cause:
            raise SourceError(
                f"{path.name} can't be read",
                code="unreadable",
                got=f"{path}: {cause}",
                expected="a whole file, as model.save_pretrained writes it",
                remedy="download or save the whole folder",
            ) from None
    for key, value in _entries(config):
        counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        if _LAYERS.search(key) and not key.startswith("max_") and sum(counts) > tensors:
            expected = f"at most {tensors}, the number of tensors in the folder"
        elif _WIDTHS.search(key) and any(n > FEWER * widest for n in counts):
            expected = f"at most {FEWER * widest:,}, as no tensor in the folder has more than {widest:,} along an axis"
        elif any(abs(n) > MOST for n in counts):
            expected = f"at most {MOST:,}"
        else:
            continue
        raise SourceError(
            f"config.json in {folder.name} describes a network that does not match its weights",
            code="misfit",
            got=f"{key}: {value}"[:200],
            expected=expected,
            remedy="write the folder again with model.save_pretrained(folder)",
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
    if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained"):
        return kind
    known = [n for n in dir(transformers) if n[0].isupper() and "For" in n]
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
