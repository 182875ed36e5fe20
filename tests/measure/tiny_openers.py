"""Small real artifacts for the workers: each opener reads its folder and returns an object with `run`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np


class Matmul:
    """Multiplies by matrix.npy, notes its process in pid.txt, and each call in ../calls.log."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.matrix = np.load(folder / "matrix.npy")
        (folder / "pid.txt").write_text(str(os.getpid()))

    def run(self, inputs):
        with open(self.folder.parent / "calls.log", "a") as log:
            log.write(self.folder.name + "\n")
        return [inputs[0] @ self.matrix]


def matmul(folder, *, threads):
    return Matmul(folder, threads)


class Noisy(Matmul):
    def run(self, inputs):
        print('{"times_ms": [1e9]}')
        os.write(1, b"native noise without an end of line")
        return super().run(inputs)


def noisy(folder, *, threads):
    print("opening", folder)
    return Noisy(folder, threads)


def abort_on_open(folder, *, threads):
    print("the kernel of layer 7 is angry", file=sys.stderr)
    sys.stderr.flush()
    os.abort()


class AbortLater:
    def __init__(self) -> None:
        self.calls = 0

    def run(self, inputs):
        self.calls += 1
        if self.calls == 12:
            os.write(2, b"stack smashed in call 12")
            os.abort()
        return inputs


def abort_later(folder, *, threads):
    return AbortLater()


class Spends:
    """Each call sleeps 5 ms, and adds 2 mJ to the counter of the machine whose folder its own lies beside."""

    def __init__(self, folder: Path) -> None:
        self.counter = folder.parent / "sys/class/powercap/intel-rapl:0/energy_uj"

    def run(self, inputs):
        time.sleep(0.005)
        self.counter.write_text(str(int(self.counter.read_text()) + 2000))
        return inputs


def spends(folder, *, threads):
    return Spends(folder)


class Stops:
    def run(self, inputs):
        os.kill(os.getpid(), signal.SIGSTOP)


def stops(folder, *, threads):
    return Stops()


def leave(folder, *, threads):
    os._exit(7)


class Raises:
    def run(self, inputs):
        raise ValueError(f"this runtime wants 3 inputs, not {len(inputs)}")


def raises(folder, *, threads):
    return Raises()


def missing(folder, *, threads):
    from penjing.errors import MissingDependency

    raise MissingDependency("fancyrt is not installed", code="not-installed", remedy="pip install fancyrt")


class Hungry:
    """Holds as many MiB as megabytes.txt says while it opens, and lets go of them before it runs."""

    def __init__(self, folder: Path) -> None:
        held = np.ones(int((folder / "megabytes.txt").read_text()) << 20, dtype=np.uint8)
        del held

    def run(self, inputs):
        return inputs


def hungry(folder, *, threads):
    return Hungry(folder)


class World:
    """Writes what the worker's process looks like from inside, and the inputs as they came."""

    def __init__(self, folder: Path, threads: int) -> None:
        import psutil

        process = psutil.Process()
        self.path = folder / "world.json"
        self.world = {
            "threads": threads,
            "omp": os.environ["OMP_NUM_THREADS"],
            "mkl": os.environ["MKL_NUM_THREADS"],
            "cpus": process.cpu_affinity() if hasattr(process, "cpu_affinity") else None,
            "torch": "torch" in sys.modules,
        }

    def run(self, inputs):
        self.world["inputs"] = [[str(x.dtype), x.tolist()] for x in inputs]
        self.path.write_text(json.dumps(self.world))
        return inputs


def world(folder, *, threads):
    return World(folder, threads)


class Onnx:
    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.names = [i.name for i in self.session.get_inputs()]

    def run(self, inputs):
        return self.session.run(None, dict(zip(self.names, inputs, strict=True)))


def onnx(folder, *, threads):
    return Onnx(folder, threads)
