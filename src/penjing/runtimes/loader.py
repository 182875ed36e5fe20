"""`load.py`, written beside an artifact: opens it with its runtime alone."""

from __future__ import annotations

import importlib
from pathlib import Path

from penjing.records.files import write_text
from penjing.records.manifest import Manifest
from penjing.runtimes import SPECS

_ALONE = """\
import sys
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this folder: what lies beside the artifact is not imported
"""

_TAIL = '''
def predict(*args, **kwargs):
    """Call it as the network is called; NumPy arrays in, NumPy arrays out."""
    ports = PROGRAM["inputs"]
    names = [port["name"] for port in ports]
    if len(args) > len(names) or set(kwargs) != set(names[len(args):]):
        raise TypeError(f"predict takes {names}; got {len(args)} positional inputs and {sorted(kwargs)}")
    values = list(args) + [kwargs[name] for name in names[len(args):]]
    inputs = [np.ascontiguousarray(np.asarray(x), dtype=port["dtype"]) for x, port in zip(values, ports)]
    outputs = iter(run(inputs))

    def nest(part):
        if part["kind"] == "tuple":
            return tuple(nest(item) for item in part["items"])
        if part["kind"] == "dict":
            return {name: nest(item) for name, item in part["items"].items()}
        return next(outputs) if part["kind"] == "tensor" else part.get("value")

    return nest(MANIFEST["structure"])


if __name__ == "__main__":  # a smoke test: zeros in, shapes out
    zeros = [
        np.zeros([1 if isinstance(size, str) else size for size in port["shape"]], dtype=port["dtype"])
        for port in PROGRAM["inputs"]
    ]
    for port, output in zip(PROGRAM["outputs"], run(zeros)):
        print(port["name"], output.dtype, output.shape)
'''


def write_loader(path: Path, manifest: Manifest, folder: str, threads: int) -> None:
    """Write `load.py` to `path`, for the artifact in the folder beside it."""
    head = importlib.import_module(SPECS[manifest.runtime].module).LOAD
    text = head.replace("@ALONE@", _ALONE).replace("@FOLDER@", folder).replace("@THREADS@", str(threads))
    write_text(path, text + _TAIL)
