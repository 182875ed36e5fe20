"""Parts of calls: every input that has samples is cut, wherever it has them."""

import torch

from penjing.analyze.samples import part


def test_states_are_cut_along_their_second_axis():
    x, state, table = torch.zeros(10, 4), torch.arange(80.0).reshape(2, 10, 4), torch.zeros(3, 7)
    (cut, states), rest = part(((x, state), {"table": table}), 2, 5, None)
    assert cut.shape == (3, 4)
    assert torch.equal(states, state[:, 2:5])
    assert rest["table"].shape == (3, 7)
