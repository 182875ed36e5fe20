import pytest
import torch
from torch import nn

from penjing.analyze.samples import batches, chunks
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize import BiasCorrection, CoordinateRounding, Static
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.surgery.functional_layers import bias_entry
from penjing.tasks.task import Task


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def quantized(bits: int = 3) -> tuple[Draft, Context, torch.Tensor]:
    torch.manual_seed(4)
    data = torch.rand(24, 3, 8, 8) + 1  # far from mean 0, as behind a relu
    task = Task(example=data[:2], calibration=list(data.split(8)))
    context = Context(task=task)
    draft = Static(weight_bits=bits)(Draft(capture_network(network(), *task.call())), context)
    return draft, context, data


def mean_by_channel(x, axis):
    return x.detach().mean([i for i in range(x.dim()) if i != axis % x.dim()]).double()


def outputs(module: torch.fx.GraphModule, data: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    values = {}

    class Observer(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.meta.get("site") in names:
                values[n.meta["site"]] = result
            return result

    with torch.no_grad():
        Observer(module).run(data)
    return values


LAYERS = ["0", "2", "6"]
AXES = {"0": 1, "2": 1, "6": -1}


def test_every_layer_keeps_the_mean_of_every_channel():
    draft, context, data = quantized()
    corrected = BiasCorrection(samples=24)(draft, context)
    reference = outputs(draft.network, data, LAYERS)
    before = outputs(insert(draft.network, draft.plan), data, LAYERS)
    after = outputs(insert(corrected.network, corrected.plan), data, LAYERS)
    for name in LAYERS:
        target = mean_by_channel(reference[name], AXES[name])
        grid = max(bias_entry(draft.plan, name).scale)  # the shift itself is rounded to the bias's integers
        assert (mean_by_channel(after[name], AXES[name]) - target).abs().max() <= grid
        assert (mean_by_channel(before[name], AXES[name]) - target).abs().max() > 3 * grid


def test_agrees_with_correcting_one_layer_at_a_time():
    draft, context, data = quantized()
    slow = draft.copy()
    for name in LAYERS:  # the obvious way: the whole network again for every layer
        target = mean_by_channel(outputs(draft.network, data, [name])[name], AXES[name])
        now = mean_by_channel(outputs(insert(slow.network, slow.plan), data, [name])[name], AXES[name])
        with torch.no_grad():
            slow.network.get_submodule(name).bias += (target - now).float()
    fast = BiasCorrection(samples=24)(draft, context)
    for name in LAYERS:
        grid = max(bias_entry(draft.plan, name).scale)  # the slow way sees each shift rounded to the bias's integers
        mine, theirs = fast.network.get_submodule(name).bias, slow.network.get_submodule(name).bias
        torch.testing.assert_close(mine, theirs, atol=grid, rtol=0)


def test_leaves_everything_but_biases_alone():
    draft, context, _ = quantized()
    before = {k: v.clone() for k, v in draft.network.state_dict().items()}
    corrected = BiasCorrection(samples=24)(draft, context)
    changed = {k for k, v in corrected.network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{name}.bias" for name in LAYERS}
    assert corrected.plan == draft.plan and list(sites(corrected.network)) == list(sites(draft.network))


def test_where_nothing_is_quantized_nothing_is_corrected():
    _, context, data = quantized()
    draft = Draft(capture_network(network(), (data[:2],)))
    assert BiasCorrection()(draft, context) is draft


@pytest.mark.parametrize("by_name", [True, False])
def test_batches_of_different_lengths_are_all_read(by_name):
    lengths = (5, 5, 9)
    data = [{"x": torch.ones(4, n)} if by_name else torch.ones(4, n) for n in lengths]
    context = Context(task=Task(example=data[0], calibration=data, dynamic={"x": {0: "batch", 1: "length"}}))
    for samples, shapes in ((6, [(4, 5), (2, 5)]), (12, [(4, 5), (4, 5), (4, 9)]), (99, [(4, 5), (4, 5), (4, 9)])):
        inputs = [named["x"] if by_name else args[0] for args, named in batches(context, samples)]
        assert [tuple(x.shape) for x in inputs] == shapes


def test_chunks_hold_every_sample_once(monkeypatch):
    _, context, data = quantized()
    network_ = capture_network(network(), (data[:2],))
    whole = chunks(context, network_, 20)
    assert torch.equal(torch.cat([args[0] for args, _ in whole]), data[:20])
    monkeypatch.setattr("penjing.analyze.samples.CHUNK_BYTES", 3 * 8 * 8 * 8 * 4)  # three samples of the largest value
    parts = chunks(context, network_, 20)
    assert max(len(args[0]) for args, _ in parts) == 3
    assert torch.equal(torch.cat([args[0] for args, _ in parts]), data[:20])


class Routes(nn.Module):
    """Two experts, of which the second one gets no row of the data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.route, self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)
        self.route.weight.data.zero_()
        self.route.bias.data = torch.tensor([1.0, 0.0])

    def forward(self, x):
        chosen, y = self.route(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate((self.first, self.second)):
            rows = torch.where(chosen == i)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return x + y


@pytest.mark.parametrize("repair", [BiasCorrection, CoordinateRounding])
def test_an_expert_that_no_sample_reaches_keeps_its_weights(repair):
    data = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    task = Task(example=data[:2], calibration=list(data.split(8)))
    draft = Static()(Draft(capture_network(Routes().eval(), *task.call())), Context(task=task))
    assert draft.plan
    corrected = repair()(draft, Context(task=task)).network.state_dict()
    assert all(torch.equal(corrected[name], tensor) for name, tensor in Routes().state_dict().items())
