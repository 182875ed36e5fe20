import random
import signal

import numpy as np
import pytest
import torch

from penjing.errors import CheckpointError, OutputError
from penjing.randomness import rng_state, set_rng_state
from penjing.train import state as training_state
from tests.raises import raises_case


def drawn():
    """A number of each kind, some of which leave a half-used pair behind."""
    return [float(torch.randn(1)), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.pt"


def save(path, **request):
    training_state.save(path, {"request": request, "weights": torch.arange(3.0)})


def test_tensors_and_numbers_come_back(path):
    save(path, seed=1)
    with training_state.loading(path, {"seed": 1}) as state:
        assert torch.equal(state["weights"], torch.arange(3.0))
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


def test_an_interrupt_waits_until_the_state_is_written(path, monkeypatch):
    whole = torch.save

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        whole(*args)

    monkeypatch.setattr(torch, "save", interrupted)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            save(path, seed=1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ours)
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    with training_state.loading(path, {"seed": 1}) as state:
        assert torch.equal(state["weights"], torch.arange(3.0))


def test_the_generators_go_on_where_they_stood(path):
    drawn()
    training_state.save(path, {"request": {}, "random": rng_state("cpu")})
    expected = [drawn() for _ in range(3)]
    with training_state.loading(path, {}) as state:
        set_rng_state(state["random"], "cpu")
    assert [drawn() for _ in range(3)] == expected


def test_a_request_is_compared_by_what_its_functions_do(path):
    save(path, hooks=(lambda: 1,), epochs=1.5)
    with training_state.loading(path, {"hooks": (lambda: 1,), "epochs": 1.5}) as state:
        assert "weights" in state


@pytest.mark.parametrize(
    ("now", "name"),
    [
        ({"seed": 2, "epochs": 1}, "seed"),
        ({"seed": 1, "epochs": 1.5}, "epochs"),
        ({"seed": 1, "epochs": 1, "more": 0}, "more"),
    ],
)
def test_another_request_is_refused_with_both(path, now, name):
    save(path, seed=1, epochs=1)
    with raises_case(CheckpointError, "settings") as caught, training_state.loading(path, now):
        pytest.fail("the state was given out")
    names = {x.partition(" = ")[0] for x in (caught.value.got, caught.value.expected)}
    assert names == {caught.value.field} == {name}


def test_what_does_not_fit_in_place_is_said_as_of_a_damaged_file(path):
    save(path)
    with raises_case(CheckpointError, "unreadable"), training_state.loading(path, {}) as state:
        torch.nn.Linear(2, 2).load_state_dict(state)


def test_an_error_of_penjings_own_passes(path):
    save(path)
    with raises_case(OutputError, "full"), training_state.loading(path, {}):
        raise OutputError("there is no room", code="full")


def test_a_folder_that_is_not_there(tmp_path):
    with raises_case(OutputError, "unwritable") as caught:
        save(tmp_path / "no" / "state.pt")
    assert caught.value.remedy
