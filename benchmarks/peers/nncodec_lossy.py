"""nncodec's lossy mode, in an environment of its own (`nncodec_coder.py` tells which); `benchmarks/lossy.py` starts it.

`nncodec_lossy.py FOLDER QP` codes FOLDER/weights.npz with this quantization parameter, writes what comes back as
FOLDER/decoded.npz, and prints the bytes.
"""

import contextlib
import io
import sys
from pathlib import Path

import nncodec_imports  # noqa: F401  before nncodec
import numpy as np
from nncodec.nn import decode, encode

folder, qp = Path(sys.argv[1]), int(sys.argv[2])
with np.load(folder / "weights.npz") as file:
    weights = {name: file[name].astype(np.float32) for name in file.files}
with contextlib.redirect_stdout(io.StringIO()):
    coded = encode(weights, args={"qp": qp, "use_dq": True, "results": str(folder), "verbose": False})
    decoded = decode(bytearray(coded))
np.savez(folder / "decoded.npz", **decoded)
print(len(coded))
