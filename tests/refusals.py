"""What an error is, by its kind and the name of its case: sentences may be worded anew without a test that fails."""

import contextlib

import pytest


@contextlib.contextmanager
def refused(kind, code):
    """As `pytest.raises`: the block has to raise that kind, of that case (see `penjing.errors`)."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
