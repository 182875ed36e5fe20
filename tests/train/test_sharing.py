"""One batch cut for several workers: what each worker computes adds up to what one computes."""

import pytest
import torch
from torch import nn

from penjing.errors import TaskError
from penjing.train.sharing import by_argument, part
from tests.raises import raises_case


def shared(call, target, dynamic=None, size=2):
    return [part(call, target, dynamic, rank, size) for rank in range(size)]


class Listener(nn.Module):
    """A state (layers, batch, hidden) goes in before the samples; a table, as long as the batch, and a number after."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, 2, batch_first=True)

    def forward(self, state, x, table, factor):
        return self.gru(x, state)[0][:, -1] @ table * factor


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("dynamic", [{"x": {0: "n"}, "state": {1: "n"}}, {1: {0: "n"}, 0: {1: "n"}, "table": {}}])
def test_gradients_of_parts_are_those_of_the_batch_where_samples_lie_elsewhere(dynamic, keywords):
    torch.manual_seed(0)
    values = torch.randn(2, 4, 4), torch.randn(4, 5, 3), torch.randn(4, 4), torch.tensor(2.0)
    network = Listener()
    named = dict(zip(("state", "x", "table", "factor"), values, strict=True))
    call, target = ((), named) if keywords else (values, {}), torch.randn(4, 4)

    def gradients(parts):
        network.zero_grad()
        for (args, kwargs), y, share in parts:
            (share * nn.functional.mse_loss(network(*args, **kwargs), y)).backward()
        return [p.grad.clone() for p in network.parameters()]

    parts = shared(call, target, by_argument(dynamic, network, call))
    for got, expected in zip(gradients(parts), gradients([(call, target, 1.0)]), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_batch_without_one_number_of_samples_is_not_shared():
    boxes = [{"boxes": torch.zeros(n, 4)} for n in (3, 1)]
    for args, target in (((torch.zeros(2, 3),), boxes), ((torch.zeros(4, 3),), torch.zeros(2)), ((), [])):
        with raises_case(TaskError, "unshareable"):
            shared((args, {}), target)


@pytest.mark.parametrize("dynamic", [None, {}])
def test_an_input_that_may_hold_samples_is_not_left_whole(dynamic):
    call = (torch.zeros(4, 3), torch.zeros(9, 5)), {}
    with raises_case(TaskError, "unshareable") as error:
        shared(call, torch.zeros(4), dynamic)
    assert "(9, 5)" in error.value.got and "Task.dynamic" in error.value.remedy
    (_, whole), _ = shared(call, torch.zeros(4), {0: {0: "n"}})[1][0]
    assert whole.shape == (9, 5)


@pytest.mark.parametrize("target", [[0, 1, 2, 3], ["a", "b", "c", "d"], {"ids": [0, 1, 2, 3]}])
def test_a_list_with_an_entry_a_sample_is_not_shared(target):
    with raises_case(TaskError, "unshareable"):
        shared(((torch.zeros(4, 3),), {}), target)


def test_a_batch_without_samples():
    with raises_case(TaskError, "no-sample"):
        shared(((torch.zeros(0, 3),), {}), torch.zeros(0))


def test_parts_are_whole_batches_together():
    x, y = torch.arange(7), torch.arange(7) + 10
    parts = shared(((), {"x": x, "k": 3}), y, size=3)
    together = torch.cat([call[1]["x"] for call, _, _ in parts]), torch.cat([labels for _, labels, _ in parts])
    assert torch.equal(together[0], x) and torch.equal(together[1], y)
    assert sum(p[2] for p in parts) == pytest.approx(1) and [len(p[1]) for p in parts] == [2, 2, 3]
    assert part(((torch.zeros(1, 2),), {}), torch.zeros(1), None, 1, 3)[2] in (0.0, 1.0)
