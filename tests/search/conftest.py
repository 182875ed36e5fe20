"""Studies of tests may be lost with the machine, and so they do not wait for its disk."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def studies_without_waits():
    if find_spec("sqlalchemy") is None:
        yield
        return
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def unsafe(connection, _):
        if "sqlite" in type(connection).__module__:
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", unsafe)
    yield
    event.remove(Engine, "connect", unsafe)
