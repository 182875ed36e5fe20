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
    inputs = [np.ascontiguousarray(np.asarray(x), dtype=port["dtype"]).reshape(np.shape(x))
              for x, port in zip(values, ports)]  # of no axes, NumPy makes one
    sizes = {}
    for x, port in zip(inputs, ports):  # some runtimes read another shape as their own
        own = port["shape"]
        if len(own) != x.ndim or not all(sizes.setdefault(n, m) == m if isinstance(n, str) else n == m
                                         for n, m in zip(own, x.shape)):
            raise ValueError(f"{port['name']} has the shape {x.shape}; expected {own}")
    samples = next((p["shape"][0] for p in ports if p["shape"] and isinstance(p["shape"][0], str)), None)
    shapes = [[0 if n == samples else n for n in p["shape"]] for p in PROGRAM["outputs"]]
    if sizes.get(samples) == 0 and all(0 in s and all(isinstance(n, int) for n in s) for s in shapes):
        outputs = iter([np.zeros(s, p["dtype"]) for s, p in zip(shapes, PROGRAM["outputs"])])  # of no samples
    else:
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
