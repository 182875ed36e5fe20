"""How much memory a ``.keras`` file may ask for: about as much as the weights that it stores.

What the file says of its layers decides how large their variables are, and Keras makes and fills them before it reads
the weights. Two small numbers are enough for a matrix that no machine holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penjing.errors import CheckpointError
from penjing.records import reading

_TIMES = 4  # as many values as are stored: layers may be built anew, and optimizers of inner networks have averages
_BESIDE = 1 << 20  # values that nothing stores: states of random generators, of metrics


@contextlib.contextmanager
def bounded(path: Path, stored: int) -> Iterator[None]:
    """Refuse variables of Keras, while a file is read, that together are far beyond its weights.

    Args:
        path: The file, for messages.
        stored: How many values its weights have.

    Raises:
        CheckpointError: Before memory is taken, with the layer and the shape.
    """
    import keras

    original = keras.Variable.__init__
    inherited = "__init__" not in vars(keras.Variable)
    left = _TIMES * stored + _BESIDE

    def make(self: Any, initializer: Any, shape: Any = None, *args: Any, **kwargs: Any) -> None:
        nonlocal left
        sizes = [n for n in (shape if isinstance(shape, tuple | list) else ()) if type(n) is int and n >= 0]
        if not reading.fits(sizes, left):
            raise _too_large(path, stored, sizes, str(kwargs.get("name") or "a variable"))
        left -= math.prod(sizes)
        original(self, initializer, shape, *args, **kwargs)

    keras.Variable.__init__ = make
    try:
        yield
    finally:
        if inherited:
            del keras.Variable.__init__
        else:
            keras.Variable.__init__ = original


def _too_large(path: Path, stored: int, sizes: list[int], name: str) -> CheckpointError:
    from keras.src.backend.common.name_scope import current_path

    place = "/".join(part for part in (current_path(), name) if part)
    return CheckpointError(
        f"{path.name} claims layers that are larger than its weights",
        code="larger-than-weights",
        got=f"{place} of the shape {str(sizes[:8])[:100]}, and all weights that it stores have {stored:,} values",
        expected="layers whose weights the file stores",
        remedy="load it where it was made and write it again: model.save('net.keras')",
    )


__all__ = ["bounded"]
