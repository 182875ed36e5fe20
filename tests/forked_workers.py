"""Worker processes as forks of one that has the imports behind it: the same workers, a second of imports less each.

`forked_workers` replaces how `penjing.measure.processes.Process` starts a worker. One process per test run imports
torch and the runtimes, and stays without threads. For every worker it forks, and the fork calls the worker's `main`
with its own pipes, arguments, environment and session. Linux alone: the forks become children of the test process,
which the system grants to a "child subreaper".
"""

import contextlib
import ctypes
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from penjing.measure import processes

IMPORTS = (
    *("torch", "torch.export", "torch._export.serde.serialize", "torch._dynamo", "onnxruntime", "openvino"),
    *("penjing.measure.worker", "penjing.runtimes.worker"),
    *("penjing.runtimes.eager", "penjing.runtimes.onnxruntime", "penjing.runtimes.openvino"),
)
OF_SCRIPTS = (  # what a script imports that compresses something
    *("penjing.search.compress", "penjing.onnx_files.write", "torch.onnx._internal.exporter._torchlib.ops"),
    *("torch.export._trace", "torch._functorch.aot_autograd", "onnxscript.rewriter", "penjing.tasks.opening"),
)
start_worker = processes.start_worker
POSSIBLE = sys.platform.startswith("linux")
TESTED = str(Path(__file__).resolve().parents[1])  # the checkout, from which tests and examples are imported
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_MESSAGE_BYTES = 1 << 20


class ForkedProcess:
    """What `Process` uses of a `subprocess.Popen`."""

    def __init__(self, pid, stdin, stdout):
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode = None

    def wait(self, timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            else:
                time.sleep(0.002)
        return self.returncode

    def kill(self):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The process that forks, started with the first worker; or one that is there, at the other end of a socket."""

    def __init__(self, connected=None, imports=IMPORTS):
        if connected is not None:
            self.socket, self.process = connected, None
            return
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = processes.worker_environment({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")})
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from tests.forked_workers import serve; serve({theirs.fileno()}, {imports})",
            ],
            env=environment | {"PYTHONPATH": os.pathsep.join([environment.get("PYTHONPATH", ""), TESTED])},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def start(self, module, arguments, environment, stderr):
        """As `processes.start_worker`."""
        stdin, to_worker = os.pipe()
        from_worker, stdout = os.pipe()
        pid = self._fork(
            {"module": module, "arguments": list(arguments), "environment": environment}, stdin, stdout, stderr.fileno()
        )
        os.close(stdin)
        os.close(stdout)
        return ForkedProcess(pid, os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb"))

    def run(self, script, folder, environment, limit_s):
        """Run a script in its folder to its end; returns the exit code, and what it printed and complained about."""
        with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            request = {"script": str(script), "folder": str(folder), "environment": environment}
            process = ForkedProcess(self._fork(request, *(x.fileno() for x in (nothing, stdout, stderr))), None, None)
            try:
                code = process.wait(limit_s)
            finally:
                process.kill()
            texts = []
            for stream in (stdout, stderr):
                stream.seek(0)
                texts.append(stream.read().decode())
        return code, *texts

    def _fork(self, request, *streams):
        """A fork with these as its first three descriptors; returns its process id."""
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)
        try:
            message = json.dumps(request | {"parent": os.getpid()}).encode()
            socket.send_fds(self.socket, [message], streams)
            return int(self.socket.recv(_MESSAGE_BYTES))
        finally:
            ctypes.CDLL(None).prctl(_SUBREAPER, 0)

    def close(self):
        self.socket.close()
        if self.process is not None:
            self.process.wait()


@functools.cache
def fork_server():
    """The one of this test run, started when it is first needed."""
    return ForkServer()


@functools.cache
def script_server():
    """The same for whole scripts."""
    return ForkServer(imports=IMPORTS + OF_SCRIPTS)


def serve(descriptor, imports):
    """In the process that forks: a worker for every request, until the other end is closed."""
    sys.modules["openvino_telemetry"] = None  # it starts a thread, and a fork has none but the one that forked
    for name in imports:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1
    answer(socket.socket(fileno=descriptor))


def answer(requests):
    """A worker for every request, until the other end is closed."""
    while True:
        message, streams, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 3)
        if not message:
            return
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                _work(json.loads(message), streams)
            os.write(write, b"%d" % pid)
            os._exit(0)
        os.waitpid(between, 0)  # from here on the worker is a child of the test process
        requests.send(os.read(read, 32))
        for stream in (read, write, *streams):
            os.close(stream)


def nested():
    """Fork a process that forks from this one as it is now; returns the end of its socket that takes requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        answer(theirs)
        os._exit(0)
    theirs.close()
    return ours


def _work(request, streams):
    """In the fork: become the worker."""
    try:
        os.setsid()
        while os.getppid() != request["parent"]:
            time.sleep(0.0005)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(request["environment"])
        if "script" in request:
            os.chdir(request["folder"])
            processes.start_worker = ForkServer(nested()).start  # the script's workers have the imports behind them too
            sys.argv = [request["script"]]
            sys.path[:] = [request["folder"], *(path for path in sys.path if path != TESTED)]
            runpy.run_path(request["script"], run_name="__main__")
            sys.stdout.flush()
            processes.leave(0)
        module = importlib.import_module(request["module"])
        sys.argv = [module.__file__, *request["arguments"]]
        processes.leave(module.main(request["arguments"]))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def forked_workers():
    """Inside the block workers are forked where the system can do it."""
    if not POSSIBLE:
        yield
        return
    processes.start_worker = lambda *request: fork_server().start(*request)
    try:
        yield
    finally:
        processes.start_worker = start_worker
        for server in (fork_server, script_server):
            if server.cache_info().currsize:
                server().close()
                server.cache_clear()
