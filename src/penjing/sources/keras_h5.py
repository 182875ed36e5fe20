"""HDF5 files of Keras: a network as Keras 2 wrote it, or weights alone. Both are refused with what opens them.

A network of Keras 2 names its classes and functions without their modules, and may hold code: Keras itself converts it,
where the user trusts it.
"""

from __future__ import annotations

from pathlib import Path

from penjing.errors import CheckpointError, PenjingError, SourceError
from penjing.records import reading

SUFFIXES = (".h5", ".hdf5")
MAGIC = b"\x89HDF\r\n\x1a\n"


def refusal(path: Path, *, as_weights: bool) -> PenjingError | None:
    """The error for an HDF5 file; None if it is another kind of file, or is missing.

    Args:
        path: The file.
        as_weights: Whether it was given as the weights of a network, not as a network.
    """
    kind = _kind(path)
    if kind is None:
        return None
    if kind == "network":
        return (CheckpointError if as_weights else SourceError)(
            f"{path.name} is a network in the format of Keras 2",
            code="keras-h5",
            got=f"{path}: HDF5 with a model_config",
            expected="a .keras file as the SOURCE, which holds its weights, too",
            remedy=f"where you trust it, let Keras convert it: {_convert(path)}",
        )
    own = f"model.load_weights({str(path)!r})"
    factory = f"def factory(): model = ...; {own}; return model" if kind == "weights" else None
    remedy = f"give a factory as file.py:factory: {factory}" if factory else "read it with the library that wrote it"
    if as_weights:
        return CheckpointError(
            f"{path.name} holds weights in HDF5, which are not read",
            code="format",
            got=f"{path}: {'weights of Keras' if factory else 'HDF5 of another kind'}",
            expected="a .safetensors file, or a state dict written by torch.save",
            remedy=remedy if factory else f"{remedy}, then torch.save(model.state_dict(), 'weights.pth')",
        )
    return SourceError(
        "a file of weights is not a network",
        code="only-weights",
        got=f"{path}: {'weights of Keras' if factory else 'HDF5 of another kind'}",
        expected="the network that they belong to",
        remedy=remedy if factory else f"{remedy} in a factory that builds the network, and give it as file.py:factory",
    )


def _convert(path: Path) -> str:
    converted = str(path.with_suffix(".keras"))
    code = f"import keras; keras.models.load_model({str(path)!r}, compile=False).save({converted!r})"
    return f'KERAS_BACKEND=torch python -c "{code}"'


def _kind(path: Path) -> str | None:
    """Whether an HDF5 file is a "network" of Keras, "weights" of it, or "other"; None if it is not an HDF5 file."""
    try:
        with reading.regular(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            file.seek(0)
            try:
                import h5py
            except ImportError:
                return "other"
            with h5py.File(file, "r") as root:
                if "model_config" in root.attrs:
                    return "network"
                return "weights" if "layer_names" in root.attrs or {"layers", "vars"} & set(root) else "other"
    except (OSError, ValueError, RuntimeError, KeyError):  # of the system, and of HDF5 for what is damaged
        return None


__all__ = ["MAGIC", "SUFFIXES", "refusal"]
