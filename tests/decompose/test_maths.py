"""The decompositions beside slow or exact ones, and the moments beside loops."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from penjing.decompose import cp, moments, svd, tucker
from penjing.decompose.allocation import Walk, hull, refilled
from penjing.decompose.candidates import Candidate
from penjing.decompose.moments import Basis, bases, plain
from penjing.decompose.tensors import contracted
from penjing.network.capture import capture_network

pytest.importorskip("tensorly")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(size, taps=None):
    """A basis of correlated channels and taps."""
    roots = [drawn(n, n, seed=n) + 2 * torch.eye(n, dtype=torch.float64) for n in (size, taps) if n]
    return Basis(*(each for root in roots for each in (root, torch.linalg.inv(root))))


def test_a_basis_goes_there_and_back():
    weight, basis = drawn(7, 5, 3, 3), basis_of(5, 9)
    torch.testing.assert_close(basis.back(basis.into(weight)), weight)
    assert not torch.allclose(basis.into(weight), weight)


def test_svd_in_the_inputs_basis_has_the_least_output_error():
    weight, x = drawn(8, 6), drawn(500, 6, seed=1) @ drawn(6, 6, seed=2)
    values, vectors = torch.linalg.eigh(x.T @ x)
    basis = Basis(vectors * values.sqrt(), (vectors / values.sqrt()).T)
    first, second = svd.factors(weight, basis, 3)
    error = (x @ (weight - second @ first).T).square().sum()
    outputs = x @ weight.T
    u, s, vt = torch.linalg.svd(outputs, full_matrices=False)  # no approximation of rank 3 is closer to the outputs
    torch.testing.assert_close(error, s[3:].square().sum())
    assert svd.energies(weight, basis)[3] == pytest.approx(float(1 - error / outputs.square().sum()))
    plain_first, plain_second = svd.factors(weight, plain(nn.Linear(6, 8)), 3)
    assert error < (x @ (weight - plain_second @ plain_first).T).square().sum()


def product_of(parts, shape):
    """The weight that Tucker factors compute together."""
    inputs, out = torch.eye(shape[1], dtype=torch.float64), torch.eye(shape[0], dtype=torch.float64)
    core = next(p for p in parts if p[0, 0].numel() > 1)
    at = [p is core for p in parts].index(True)
    inputs = parts[0].flatten(1) if at else inputs
    out = parts[-1].flatten(1) if at < len(parts) - 1 else out
    return torch.einsum("po,ocab,ci->piab", out, core, inputs)


@pytest.mark.parametrize("ranks", [(2, 3), (5, 3), (2, 7)])
def test_tucker_of_a_weight_of_that_rank_is_exact(ranks):
    basis = basis_of(5, 9)
    exact = torch.einsum(
        "or,rcab,ic->oiab", drawn(7, ranks[1]), drawn(ranks[1], ranks[0], 3, 3, seed=1), drawn(5, ranks[0], seed=2)
    )
    parts = tucker.factors(exact, basis, ranks)
    torch.testing.assert_close(product_of(parts, exact.shape), exact, rtol=1e-6, atol=1e-6)
    assert tucker.energies(exact, basis)[ranks] == pytest.approx(1)


def test_the_energy_that_tucker_keeps_is_at_least_the_one_that_is_told():
    weight, basis = drawn(7, 5, 3, 3), basis_of(5, 9)
    energy = tucker.energies(weight, basis)
    assert energy.shape == (6, 8) and energy[0].max() == energy[:, 0].max() == 0 and energy[5, 7] == pytest.approx(1)
    assert (np.diff(energy, axis=0) >= 0).all() and (np.diff(energy, axis=1) >= 0).all()
    for ranks in ((2, 3), (4, 6), (5, 2)):
        lost = basis.into(weight - product_of(tucker.factors(weight, basis, ranks), weight.shape))
        exact_energy = 1 - float(lost.square().sum() / basis.into(weight).square().sum())
        assert exact_energy >= energy[ranks] - 1e-9
        torch.testing.assert_close(exact_energy, float(energy[ranks]), rtol=0, atol=0.05)


def test_cp_of_a_sum_of_products_is_near_and_tells_what_it_keeps():
    parts = [drawn(7, 3), drawn(5, 3, seed=1), drawn(3, 3, seed=2), drawn(3, 3, seed=3)]
    exact, basis = torch.einsum("or,ir,ar,br->oiab", *parts), basis_of(5)
    (first, down, across, last), energy = cp.factors(exact, basis, 3)
    assert [tuple(p.shape) for p in (first, down, across, last)] == [
        (3, 5, 1, 1),
        (3, 1, 3, 1),
        (3, 1, 1, 3),
        (7, 3, 1, 1),
    ]
    product = torch.einsum("or,ri,ra,rb->oiab", last.flatten(1), first.flatten(1), down.flatten(1), across.flatten(1))
    lost = basis.into(exact - product).square().sum() / basis.into(exact).square().sum()
    assert energy == pytest.approx(1 - float(lost)) and energy > 0.99


def test_cp_folds_a_kernel_of_one_into_its_first_layer():
    weight = drawn(6, 5, 1, 4)
    parts, energy = cp.factors(weight, basis_of(5), 15)
    assert [tuple(p.shape) for p in parts] == [(15, 5, 1, 1), (15, 1, 1, 4), (6, 15, 1, 1)]
    product = torch.einsum("or,ri,rb->oib", parts[2].flatten(1), parts[0].flatten(1), parts[1].flatten(1))[:, :, None]
    assert float((weight - product).square().sum() / weight.square().sum()) == pytest.approx(0, abs=0.2)


def test_products_with_the_other_factors_are_tensorlys_and_need_no_matrix_of_every_weight():
    """The matrix that tensorly builds for the axes of the kernel would have 64·64·3·64 numbers here, 6 MB."""
    unfolded = pytest.importorskip("tensorly.tenalg").unfolding_dot_khatri_rao
    generator = np.random.default_rng(0)
    tensor, factors = generator.normal(size=(5, 7, 3, 2)), [generator.normal(size=(n, 4)) for n in (5, 7, 3, 2)]
    for mode in range(4):
        for weights in (None, generator.random(4)):
            expected = unfolded(tensor, (weights, factors), mode)
            np.testing.assert_allclose(contracted(tensor, (weights, factors), mode), expected, rtol=1e-12, atol=1e-12)
    weight, basis = drawn(64, 64, 3, 3), plain(nn.Conv2d(64, 64, 3))
    cp.factors(weight, basis, 1)  # what is imported is not counted
    tracemalloc.start()
    cp.factors(weight, basis, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_the_moments_are_those_of_a_loop_over_patches():
    torch.manual_seed(0)
    network = capture_network(nn.Sequential(nn.Conv2d(3, 4, 2, padding=1), nn.ReLU()), (torch.zeros(2, 3, 4, 4),))
    x = torch.randn(8, 3, 4, 4) + torch.arange(3)[:, None, None]
    basis = bases(network, {"0": network.get_submodule("0")}, [((x[:4],), {}), ((x[4:],), {})])["0"]
    channels, taps, padded = torch.zeros(3, 3), torch.zeros(4, 4), nn.functional.pad(x, (1, 1, 1, 1))
    for sample in padded:
        for i in range(5):
            for j in range(5):
                patch = sample[:, i : i + 2, j : j + 2].reshape(3, 4)
                channels += patch @ patch.T
                taps += patch.T @ patch
    seen = basis.channels @ basis.channels.T
    expected = (channels / (8 * 25 * 4)).double()
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=2e-3 * float(expected.diagonal().mean()))
    seen = basis.taps @ basis.taps.T
    expected = (taps / taps.diagonal().mean()).double()
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=2e-3)


def test_of_a_wide_layer_the_mean_squares_are_counted_and_many_layers_take_several_passes(monkeypatch):
    torch.manual_seed(0)
    network = capture_network(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (torch.zeros(2, 6),))
    x = torch.randn(40, 6) * torch.arange(1, 7)
    layers, calls = {name: network.get_submodule(name) for name in ("0", "2")}, [((x,), {})]
    whole = bases(network, layers, calls)
    monkeypatch.setattr(moments, "PASS_BYTES", 1)
    again = bases(network, layers, calls)
    assert all(torch.equal(whole[name].channels, again[name].channels) for name in ("0", "2"))
    monkeypatch.setattr(moments, "WIDE", 5)
    scales = bases(network, layers, calls)["0"].channels
    torch.testing.assert_close(scales, x.double().square().mean(0).sqrt(), rtol=0.03, atol=0)
    assert whole["2"].channels.shape == (5, 5)


def test_a_diagonal_basis_goes_there_and_back():
    weight, scales = drawn(7, 5, 3, 3), drawn(5).abs() + 1
    basis = Basis(scales, 1 / scales)
    torch.testing.assert_close(basis.back(basis.into(weight)), weight)
    torch.testing.assert_close(basis.into(weight), Basis(scales.diag(), scales.diag()).into(weight))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_full_rank_is_exact_whichever_side_is_shorter(shape):
    weight = drawn(*shape)
    first, second = svd.factors(weight, basis_of(shape[1]), min(shape))
    torch.testing.assert_close(second @ first, weight)


def at(macs, energy):
    return Candidate("svd", (1,), energy, macs, macs)


OPTIONS = {"a": [at(6, 0.9), at(3, 0.5), at(4, 0.1)], "b": [at(8, 0.99), at(5, 0.97), at(2, 0.2)]}
WHOLE = {"a": 10.0, "b": 10.0}


def macs(_, candidate):
    return candidate.macs


def lost(_, candidate):
    return 1 - candidate.energy


def test_the_walk_takes_the_least_error_per_cost_first_and_is_optimal_where_it_stops():
    walk = Walk.of(OPTIONS, WHOLE, macs, lost)
    assert [(name, c.macs) for name, c in walk.steps] == [("b", 8), ("b", 5), ("a", 6), ("a", 3), ("b", 2)]
    every = [{"a": a, "b": b} for a in [at(10, 1), *OPTIONS["a"]] for b in [at(10, 1), *OPTIONS["b"]]]
    for count in range(len(walk.steps) + 1):
        chosen = {"a": at(10, 1), "b": at(10, 1)} | walk.at(count)
        error, cost = (sum(f(name, c) for name, c in chosen.items()) for f in (lost, macs))
        slow = min(
            sum(1 - c.energy for c in way.values()) for way in every if sum(c.macs for c in way.values()) <= cost
        )
        assert error == pytest.approx(slow)


def test_a_point_above_the_line_between_its_neighbours_is_no_corner():
    assert [p[0] for p in hull([(10, 0, None), (8, 1, None), (7, 1.9, None), (4, 2, None)])] == [10, 4]


def test_room_that_is_left_goes_where_it_helps_most():
    chosen = {"a": OPTIONS["a"][1], "b": OPTIONS["b"][2]}
    assert refilled(chosen, OPTIONS, 3, macs, lost) == {"a": OPTIONS["a"][1], "b": OPTIONS["b"][1]}
    assert refilled(chosen, OPTIONS, 2, macs, lost) == chosen
