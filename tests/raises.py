"""What an error is, by its kind and the name of its case: sentences may be worded anew without a test that fails."""

import contextlib

import pytest

from penjing.errors import RecipeError


@contextlib.contextmanager
def raises_case(kind, code):
    """As `pytest.raises`: the block has to raise that kind, of that case (see `penjing.errors`)."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)


@contextlib.contextmanager
def raises_setting(name):
    """As `raises_case`, of a setting that breaks its rule (see `penjing.steps.settings`): the one of that name."""
    with raises_case(RecipeError, "settings") as caught:
        yield caught
    assert caught.value.field == name, str(caught.value)
