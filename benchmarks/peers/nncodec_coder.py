"""nncodec's coder, in an environment of its own (it wants numpy below 2); `benchmarks/packing.py` speaks with it.

Started by that environment's Python, it reads lines of JSON from its standard input: `["encode", SOURCE, OUT]` codes
the integers of a .safetensors file without loss, `["decode", SOURCE, OUT]` writes them back as one. Each is answered
with an empty line.

    python -m venv nncodec && nncodec/bin/pip install "numpy<2" torch==2.13.0 nncodec==2.1.3
"""

import contextlib
import io
import json
import struct
import sys

import nncodec_imports  # noqa: F401  before nncodec
import numpy as np
from nncodec.nn import decode, encode

TYPES = {"I8": np.int8, "U8": np.uint8, "F32": np.float32}


def read(path: str) -> tuple[bytes, dict]:
    """Header, and tensors by name, of a .safetensors file."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack_from("<Q", content)
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(content[8 + length + first : 8 + length + last], TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return content[: 8 + length], tensors


def encoded(source: str, out: str) -> None:
    """Code integers as they are; the header is written beside the coded bytes, and is not counted."""
    header, tensors = read(source)
    with contextlib.redirect_stdout(io.StringIO()):
        coded = encode({name: tensor.astype(np.int32) for name, tensor in tensors.items()}, args={"verbose": False})
    with open(out, "wb") as file:
        file.write(coded)
    with open(out + ".header", "wb") as file:
        file.write(header)


def decoded(source: str, out: str) -> None:
    """Write the file that `encoded` read."""
    with open(source, "rb") as file, contextlib.redirect_stdout(io.StringIO()):
        tensors = decode(bytearray(file.read()))
    with open(source + ".header", "rb") as file:
        header = file.read()
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    with open(out, "wb") as file:
        file.write(header)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            file.write(np.ascontiguousarray(tensors[name]).astype(TYPES[entry["dtype"]]).tobytes())


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        action, source, out = json.loads(line)
        {"encode": encoded, "decode": decoded}[action](source, out)
        print(flush=True)


if __name__ == "__main__":
    main()
