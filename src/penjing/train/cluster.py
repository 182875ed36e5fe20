"""A Ray cluster: connecting to one, or starting one here, and what is sent to its processes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from torch import fx

from penjing.errors import MissingDependency, TaskError, TrainingError
from penjing.network.portable import Portable
from penjing.tasks.usercode import USER_MODULE

LOCAL = "local"  # a cluster of this machine's processes
ANSWER_S = 10.0  # that an address has to answer
_SETTINGS = b"\x04"  # the type of the frame that every HTTP/2 server begins with, and so gRPC, which Ray speaks
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"  # RFC 9113, section 3.4


def ray() -> Any:
    """The package.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import ray as package
        import ray.train.torch
    except ImportError as error:
        raise MissingDependency(
            "a cluster needs Ray",
            code="not-installed",
            got=str(error),
            expected="ray[train]",
            remedy="pip install 'penjing[cluster]'",
        ) from None
    return package


def pickled(message: dict[str, Any]) -> bytes:
    """A message for other processes, with what the user's own files define: they could not import those.

    Raises:
        TaskError: Something in it can't be sent.
    """
    from ray import cloudpickle

    files = [module for name, module in sys.modules.items() if name.startswith(USER_MODULE)]
    try:
        for module in files:
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        _pickler(cloudpickle)(buffer).dump(message)
    except Exception as error:  # pickle raises what the objects raise
        raise TaskError(
            "the task can't be sent to other processes",
            code="unsendable",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            expected="a task, losses and hooks that can be pickled: no open files, no database connections",
            remedy="open them in the dataset, on first read",
        ) from None
    finally:
        for module in files:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _pickler(cloudpickle: Any) -> Any:
    """A pickler that takes captured networks apart, which torch's own way can't always put together again."""

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, fx.GraphModule):
                return Portable.network, (Portable.of(value),)
            return super().reducer_override(value)

    return Pickler


@contextlib.contextmanager
def connected(cluster: str, workers: int) -> Iterator[None]:
    """A connection to the cluster; one that the user has already is taken, and left as it is.

    Raises:
        MissingDependency: Ray is not installed.
        TrainingError: The cluster can't be reached.
    """
    package = ray()
    ours = not package.is_initialized()
    try:
        if cluster == LOCAL:  # one processor for each worker and one for what leads them, also where there are fewer
            processors = max(os.cpu_count() or 1, workers + 1)
            package.init(
                address="local",
                num_cpus=processors,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                ignore_reinit_error=True,
            )
        else:
            answers(cluster)
            package.init(address=cluster, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except TrainingError:
        raise
    except Exception as error:
        raise _unreachable(cluster, error) from None
    try:
        yield
    finally:
        if ours:
            package.shutdown()


def check_room(resources: dict[str, float], workers: int, cuda: bool) -> None:
    """Raise TrainingError where a cluster has fewer processors than workers."""
    for kind, needed in (("CPU", workers), *((("GPU", workers),) if cuda else ())):
        if resources.get(kind, 0) < needed:
            raise TrainingError(
                "the cluster is too small",
                code="too-small",
                got=f"{resources.get(kind, 0):g} {kind}",
                expected=f"{needed}, one for each worker",
                remedy="fewer workers, or a larger cluster",
            )


def answers(cluster: str) -> bool:
    """Ask a cluster's address for a sign of life, since Ray itself would try for minutes.

    Returns:
        Whether there was a host and port to ask.

    Raises:
        TrainingError: Nothing listens there, or what does is silent or something else.
    """
    host, colon, port = cluster.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return True  # it would not answer in plain text
            connection.sendall(_GREETING)
            first = connection.recv(9)
        if first[3:4] != _SETTINGS:
            raise ConnectionError("something that is not Ray answers there")
    except (OSError, OverflowError) as error:
        raise _unreachable(cluster, error) from None
    return True


def _unreachable(cluster: str, error: Exception) -> TrainingError:
    return TrainingError(
        "the Ray cluster can't be reached",
        code="unreachable",
        got=f"{cluster}: {' '.join(str(error).split())[:200]}",
        expected="'local', or the address of a running cluster, for example ray://host:10001",
        remedy="check it with `ray status`; 'local', of a search 'auto', starts one here",
    )
