import pytest
import torch

from penjing.analyze.least_squares import correction, gain


def test_the_correction_is_what_least_squares_over_all_rows_finds():
    torch.manual_seed(0)
    x, error = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    ridge = 0.1 * (x.T @ x).diagonal().mean()
    # The obvious way: the penalty as rows of their own.
    rows = torch.cat([x, ridge.sqrt() * torch.eye(7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([error, torch.zeros(7, 3, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(correction(x.T @ x, error.T @ x, ridge=0.1), expected)


def test_the_gain_is_the_difference_of_two_squared_errors():
    torch.manual_seed(0)
    x, error = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    change = torch.randn(3, 7, dtype=torch.float64)
    expected = error.square().sum() - (error - x @ change.T).square().sum()
    assert gain(change, x.T @ x, error.T @ x) == pytest.approx(float(expected))


def test_inputs_that_are_all_zeros_change_nothing():
    change = correction(torch.zeros(4, 4).double(), torch.zeros(2, 4).double(), ridge=0.1)
    assert torch.equal(change, torch.zeros(2, 4, dtype=torch.float64))
