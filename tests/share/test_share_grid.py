"""Weights on grids: within the limit, smaller when packed, and the network still runs and exports."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penjing.analyze import noise
from penjing.errors import RecipeError, SharingError, TaskError
from penjing.numerics import quarter_octaves, rate_distortion
from penjing.recipes.recipe import Recipe
from penjing.share import Codebook, Grid
from penjing.steps.draft import Draft
from penjing.tasks.task import calibration_calls
from penjing.train.finetune import Finetune
from tests import pairs
from tests.raises import raises_case


@pytest.fixture(scope="module")
def source():
    return pairs.trained(pairs.task())


def on_grid(source, **settings):
    return Grid(**settings)(Draft(source), pairs.context_of(source, pairs.task())).network


def matrices(network):
    return {name: p.detach() for name, p in network.named_parameters() if p.dim() > 1}


def test_the_limit_holds_about_and_a_looser_one_takes_fewer_values(source):
    values = []
    for limit in (40, 15):
        network = on_grid(source, snr_db=limit)
        assert limit - 2 < noise.signal_to_noise(source, network, calibration_calls(pairs.task())) < limit + 12
        values.append(sum(len(w.unique()) for w in matrices(network).values()))
    assert values[1] < values[0] / 4


def test_every_weight_lies_on_the_grid_of_its_tensor(source):
    for weight in matrices(on_grid(source, snr_db=25)).values():
        flat = weight.numpy().reshape(-1)
        places, numbers = quarter_octaves.recognized(flat, flat.size)
        assert len(places) == 1 and np.abs(numbers).max() < 1000


def test_it_is_smaller_when_packed(source, tmp_path):
    pytest.importorskip("numba")
    from penjing.storage import packed

    sizes = []
    for number, network in enumerate((source, on_grid(source, snr_db=25))):
        save_file({n: w.contiguous() for n, w in matrices(network).items()}, tmp_path / f"{number}.safetensors")
        sizes.append(packed.pack(tmp_path / f"{number}.safetensors", tmp_path / f"{number}.pj").size_bytes)
    assert sizes[1] < 0.35 * sizes[0]


def test_layers_that_are_named_are_left_as_they_are(source):
    network = on_grid(source, snr_db=25, keep=("hidden",))
    assert torch.equal(network.get_parameter("hidden.weight"), source.get_parameter("hidden.weight"))
    assert not torch.equal(network.get_parameter("head.weight"), source.get_parameter("head.weight"))


def test_limits_are_asked_for_and_can_be_measured(source):
    with raises_case(RecipeError, "limits"):
        Grid()
    with raises_case(TaskError, "no-metric"):
        on_grid(source, drop=0.01)


def test_a_limit_that_no_grid_holds_is_refused(source):
    with raises_case(SharingError, "unreachable") as refusal:
        on_grid(source, snr_db=400)
    assert "snr_db" in refusal.value.got and refusal.value.expected == "snr_db=400"


@pytest.mark.parametrize("after", [Finetune(steps=1), Codebook(bits=2)])
def test_what_would_move_weights_off_their_grids_comes_before(after):
    with raises_case(RecipeError, "order"):
        Recipe(Grid(snr_db=20), after)
    Recipe(Finetune(steps=1), Grid(snr_db=20))


def problem():
    torch.manual_seed(0)
    inputs = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    return torch.randn(1, 70, 12, dtype=torch.float64), inputs


def test_columns_behind_compensate_for_errors():
    weight, inputs = problem()
    gram = (inputs.T @ inputs)[None]
    errors = []
    for upper in (torch.eye(12, dtype=torch.float64)[None], rate_distortion.factor(gram)):
        numbers = rate_distortion.quantized(weight, upper, 0.5, 0.0, 100)
        assert torch.equal(numbers, numbers.round())
        errors.append(float((inputs @ (weight - 0.5 * numbers)[0].T).square().sum()))
    assert errors[1] < 0.85 * errors[0]


def test_a_bit_that_is_worth_more_widens_the_dead_zone():
    weight, _ = problem()
    upper = torch.eye(12, dtype=torch.float64)[None]
    zeros = [int((rate_distortion.quantized(0.4 * weight, upper, 0.5, s, 100) == 0).sum()) for s in (0.0, 0.5, 2.0)]
    assert zeros[0] < zeros[1] < zeros[2]
    assert torch.equal(rate_distortion.quantized(weight, upper, 0.5, 0.0, 2), (2 * weight).round().clamp(-2, 2))
