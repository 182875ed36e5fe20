import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing.errors import RecipeError
from penjing.network.capture import capture_network
from penjing.quantize import CrossLayerEqualization, Static
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


def drafted(model: nn.Module, x: torch.Tensor, **more) -> tuple[Draft, Context]:
    task = Task(example=x[:2], calibration=[x])
    return Draft(capture_network(model.eval(), *task.call())), Context(task=task, **more)


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Output channels of every layer, and statistics of every norm, that differ by three orders of magnitude."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                spread = 10 ** (3 * torch.rand(module.weight.shape[0]) - 1.5)
                module.weight *= spread.reshape(-1, *[1] * (module.weight.dim() - 1))
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.1, 4)
                module.running_mean.normal_()
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def mobile(act: nn.Module | None = None) -> nn.Sequential:
    act = act or nn.ReLU()
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), act),
        *(nn.Conv2d(8, 12, 1), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 5)),
    )


def names(couples):
    return [(couple.source, couple.readers) for couple in couples]


def same(draft: Draft, other: Draft, x: torch.Tensor) -> None:
    with torch.no_grad():
        a, b = draft.network(x), other.network(x)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def noise(draft: Draft, context: Context, x: torch.Tensor, **settings) -> float:
    quantized = Static(**settings)(draft, context)
    with torch.no_grad():
        exact = draft.network(x)
        return float((insert(quantized.network, quantized.plan)(x) - exact).square().mean() / exact.square().mean())


def test_two_layers_get_the_scales_of_the_paper():
    model = uneven(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    x = torch.randn(8, 6)
    draft, context = drafted(model, x)
    equalized = CrossLayerEqualization()(draft, context).network
    first, second = (draft.network.get_submodule(n) for n in ("0", "2"))
    for i in range(5):  # the obvious way, channel by channel
        r1, r2 = first.weight[i].abs().max().item(), second.weight[:, i].abs().max().item()
        s = (r1 / r2) ** 0.5
        torch.testing.assert_close(equalized.get_submodule("0").weight[i], first.weight[i] / s)
        torch.testing.assert_close(equalized.get_submodule("0").bias[i], first.bias[i] / s)
        torch.testing.assert_close(equalized.get_submodule("2").weight[:, i], second.weight[:, i] * s)


def test_a_depthwise_convolution_shares_the_scale_of_three():
    model = uneven(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)))
    draft, context = drafted(model, torch.randn(4, 3, 6, 6))
    equalized = CrossLayerEqualization(limit=1e6)(draft, context).network
    for i in range(6):
        before = [draft.network.get_submodule(n).weight for n in ("0", "2", "3")]
        after = [equalized.get_submodule(n).weight for n in ("0", "2", "3")]
        ranges = [w.abs().max().item() for w in (before[0][i], before[1][i], before[2][:, i])]
        geometric = (ranges[0] * ranges[1] * ranges[2]) ** (1 / 3)
        for w in (after[0][i], after[1][i], after[2][:, i]):
            assert w.abs().max().item() == pytest.approx(geometric, rel=2e-3)


def test_a_chain_of_dense_layers_ends_balanced():
    model = uneven(nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(7, 7), nn.ReLU()))))
    draft, context = drafted(model, torch.randn(8, 7))
    equalized = CrossLayerEqualization(limit=1e9, sweeps=2000)(draft, context).network
    layers = [equalized.get_submodule(str(i)) for i in range(0, 10, 2)]
    for first, second in zip(layers, layers[1:], strict=False):
        torch.testing.assert_close(first.weight.abs().amax(1), second.weight.abs().amax(0), rtol=1e-3, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    act=st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.Identity(), nn.ReLU6(), nn.SiLU()]),
    groups=st.sampled_from([1, 2, 4, 8]),
    between=st.sampled_from([nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.ZeroPad2d((1, 0, 2, 1))]),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_function_stays(act, groups, between, flat, seed):
    torch.manual_seed(seed)
    head = [nn.Flatten(), nn.LazyLinear(6)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(6)]
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act, between),
        *(nn.Conv2d(8, 16, 3, groups=groups, padding=1), act, nn.Conv2d(16, 8, 1, groups=groups, bias=False), act),
        *(*head, act, nn.Linear(6, 3)),
    )
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model(x)
    draft, context = drafted(uneven(model, seed), x)
    step = CrossLayerEqualization()
    after = step(draft, context)
    same(draft, after, x)
    cuts = isinstance(act, nn.ReLU6 | nn.SiLU)
    assert len(step.pairs(draft, context)) == (0 if cuts else 4)


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between, and a value that two layers read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 3, groups=4)
        self.left, self.right = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = torch.relu(self.second(x))
        return torch.cat([self.left(x), self.right(x)], 1)


def test_channels_are_followed_through_a_shuffle_and_to_several_readers():
    x = torch.randn(4, 4, 8, 8)
    draft, context = drafted(uneven(Shuffled()), x)
    step = CrossLayerEqualization()
    assert names(step.pairs(draft, context)) == [("first", ("second",)), ("second", ("left", "right"))]
    after = step(draft, context)
    same(draft, after, x)
    assert not torch.equal(after.network.first.weight, draft.network.first.weight)


class Not(nn.Module):
    """What is left alone: a layer called twice, a tied weight, a value that others read or that is given back."""

    def __init__(self):
        super().__init__()
        self.twice, self.once, self.a, self.b = (nn.Linear(4, 4) for _ in range(4))
        self.tied, self.last, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.last.weight

    def forward(self, x):
        x = self.once(self.twice(torch.relu(self.twice(x))))  # twice → once: the first call would be scaled too
        x = self.b(y := self.a(x)) + y
        x = self.out(self.last(self.tied(x)).clamp(-1, 1))
        return x, nn.functional.linear(x, self.a.weight)


def test_what_somebody_else_reads_stays():
    x = torch.randn(8, 4)
    draft, context = drafted(Not(), x)
    step = CrossLayerEqualization()
    assert step.pairs(draft, context) == ()
    after = step(draft, context).network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in draft.network.state_dict().items())


def test_dead_channels_stay_and_none_is_scaled_beyond_the_limit():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, 1] = 0
        model[0].weight[2] *= 1e-9
    x = torch.randn(8, 4)
    draft, context = drafted(model, x)
    after = CrossLayerEqualization(limit=10)(draft, context)
    same(draft, after, x)
    old, new = draft.network.get_submodule("0"), after.network.get_submodule("0")
    assert torch.equal(old.weight[:2], new.weight[:2]) and torch.equal(old.bias[:2], new.bias[:2])
    torch.testing.assert_close(new.bias[2], old.bias[2] * 10)


def test_noise_of_one_scale_per_tensor_falls_a_hundredfold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():  # channels of very different size, as batch norms leave them, that matter equally
        for first, second in ((0, 2), (2, 4)):
            spread = 10 ** (2 * torch.rand(8) - 1)
            model[first].weight *= spread[:, None, None, None]
            model[first].bias *= spread
            model[second].weight /= spread[:, None, None]
    x = torch.randn(32, 3, 12, 12)
    draft, context = drafted(model, x)
    after = CrossLayerEqualization()(draft, context)
    assert noise(after, context, x, weight_per="tensor") < 0.01 * noise(draft, context, x, weight_per="tensor")
    assert noise(after, context, x) < 0.1 * noise(draft, context, x)  # one scale per channel helps weights alone


def test_norms_are_folded():
    draft, context = drafted(uneven(mobile()), torch.randn(8, 3, 12, 12))
    assert [edit["edit"] for edit in CrossLayerEqualization()(draft, context).edits] == ["fold", "fold"]


def test_it_reports_the_share_that_it_covers():
    told = []
    draft, context = drafted(mobile(), torch.randn(4, 3, 12, 12), events=lambda kind, **v: told.append((kind, v)))
    CrossLayerEqualization()(draft, context)
    assert told == [("covered", {"step": "CrossLayerEqualization", "layers": 4, "total": 4})]


@pytest.mark.parametrize("wrong", [{"sweeps": 0}, {"sweeps": 2.5}, {"limit": 0.5}, {"limit": float("nan")}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with raises_setting(*wrong):
        CrossLayerEqualization(**wrong)


def test_it_comes_before_quantization():
    with raises_case(RecipeError, "order"):
        Recipe(Static(), CrossLayerEqualization())
    Recipe(CrossLayerEqualization(), Static())
