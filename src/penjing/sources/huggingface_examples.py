"""Example inputs of a Hugging Face model, from its configuration and that of its preprocessor.

Transformers declares token ids for nearly every model (`dummy_inputs`), also for those that take images or sound; so
sizes come from the configurations, by the name of each input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

BATCH = 2
LONGEST_SIDE = 2048  # of an example image
USUAL_SIDE = 224  # where no configuration says it
MOST_VALUES = 1 << 26  # of an example
SECOND = 16_000  # samples of sound
FRAMES = 128  # of features of sound, where their number is free
_CHOICES = 2  # answers of a multiple choice

_Sizes = tuple[int, ...]


def example(model: Any, preprocessor: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Inputs by name, batch first; None where the model needs some that are not known here.

    Args:
        model: Of transformers.
        preprocessor: The contents of ``preprocessor_config.json``; empty where there is none.
    """
    main = getattr(model, "main_input_name", None)
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if name == main or _needed(model, name, p)]
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        values = _BUILDERS[name](model, preprocessor) if name in _BUILDERS else None
        if values is None:
            return None
        inputs[name] = values
    return inputs or None


def _needed(model: Any, name: str, parameter: inspect.Parameter) -> bool:
    if name.startswith("decoder_input_ids"):
        return bool(getattr(model.config, "is_encoder_decoder", False))
    two_towers = _part(model.config, "text_config") is not None and _part(model.config, "vision_config") is not None
    if two_towers and name in ("input_ids", "pixel_values"):
        return True
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in free


def _part(config: Any, name: str) -> Any:
    part = getattr(config, name, None)
    return part if part is not None and hasattr(part, "to_dict") else None


def _setting(config: Any, *names: str) -> Any:
    """The first setting that there is, in the configuration or in that of a part that reads the input."""
    parts = [_part(config, part) for part in ("vision_config", "audio_config", "backbone_config", "encoder")]
    for part in (config, *(p for p in parts if p is not None)):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def _ids(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    del preprocessor
    ids = model.dummy_inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    config = _part(model.config, "text_config") or model.config
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int):
        ids = ids.clamp(max=vocabulary - 1)
    if _part(model.config, "vision_config") is not None:
        ids = ids[:1].expand(BATCH, -1).contiguous()  # both towers have the same batch
    if type(model).__name__.endswith("ForMultipleChoice"):
        return ids[:, None].expand(-1, _CHOICES, -1).contiguous()
    return ids


def _decoder_ids(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    start = getattr(model.config, "decoder_start_token_id", None)
    batch = BATCH
    if model.main_input_name == "input_ids":
        ids = _ids(model, preprocessor)
        batch = BATCH if ids is None else len(ids)
    row = torch.tensor([[start if isinstance(start, int) else 0, 1, 2, 3]])
    return row.expand(batch, -1).contiguous()


def _pixels(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    config = model.config
    channels = _setting(config, "num_channels")
    height, width = _image_size(config, preprocessor)
    frames = getattr(config, "num_frames", None)
    shape = (channels if isinstance(channels, int) else 3, height, width)
    return _random((BATCH, frames, *shape) if isinstance(frames, int) else (BATCH, *shape))


def _image_size(config: Any, preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width: of a network that is built for one size, otherwise what the preprocessor makes."""
    own = _setting(config, "image_size")
    cut = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
    for size in (own, cut, preprocessor.get("size")):
        sides = _sides(size)
        if sides is not None:
            return sides
    return USUAL_SIDE, USUAL_SIDE


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        pair = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    else:
        pair = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= LONGEST_SIDE for side in pair):
        return None
    return pair[0], pair[1]


def _samples(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    """A second of sound, or its spectrogram where the network is built for one."""
    del preprocessor
    bins, frames = getattr(model.config, "num_mel_bins", None), getattr(model.config, "max_length", None)
    if isinstance(bins, int) and isinstance(frames, int):
        return _random((BATCH, frames, bins))
    return _random((BATCH, SECOND))


def _features(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    """Features of sound: Whisper's bins come before its frames, everybody else's after them."""
    del preprocessor
    config = model.config
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(positions, int):
        return _random((BATCH, bins, 2 * positions))  # its encoder halves them
    width = _setting(config, "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    return _random((BATCH, FRAMES, width)) if isinstance(width, int) else None


def _series(model: Any, preprocessor: Mapping[str, Any]) -> torch.Tensor | None:
    del preprocessor
    length, channels = (getattr(model.config, name, None) for name in ("context_length", "num_input_channels"))
    return _random((BATCH, length, channels)) if isinstance(length, int) and isinstance(channels, int) else None


def _random(shape: _Sizes) -> torch.Tensor | None:
    count = 1
    for size in shape:
        count *= size
    if not 0 < count <= MOST_VALUES or min(shape) < 1:
        return None
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


_BUILDERS: Mapping[str, Callable[[Any, Mapping[str, Any]], torch.Tensor | None]] = {
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixels,
    "input_values": _samples,
    "input_features": _features,
    "past_values": _series,
}
