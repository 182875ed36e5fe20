import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing.errors import RecipeError
from penjing.network.capture import capture_network
from penjing.quantize import SmoothQuant, Static
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert, replay
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


class Block(nn.Module):
    """A transformer block with its norms first; `norm` makes one."""

    def __init__(self, norm=nn.LayerNorm, width: int = 16, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.before, self.after = norm(width), norm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        y = self.before(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class WrittenOut(nn.Module):
    """A root mean square norm as language models write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def outliers(block: nn.Module, seed: int = 0) -> nn.Module:
    """Norms whose gains make two channels far larger than the others, though they matter no more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for norm, readers in (("before", "qkv"), ("after", ("up",))):
            getattr(block, norm).weight[[3, 10]] *= 60
            for reader in readers:
                getattr(block, reader).weight[:, [3, 10]] /= 60
    return block.eval()


def drafted(model: nn.Module, x: torch.Tensor, **more) -> tuple[Draft, Context]:
    task = Task(example=x[:2], calibration=list(x.split(5)))
    return Draft(capture_network(model.eval(), *task.call())), Context(task=task, **more)


def noise(draft: Draft, context: Context, x: torch.Tensor) -> float:
    quantized = Static(activation_range="minmax")(draft, context)
    with torch.no_grad():
        exact = draft.network(x)
        return float((insert(quantized.network, quantized.plan)(x) - exact).square().mean() / exact.square().mean())


def names(couples):
    return [(couple.source, couple.readers) for couple in couples]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scales_are_those_of_the_paper(alpha):
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    x = torch.randn(23, 6)
    draft, context = drafted(model, x)
    smoothed = SmoothQuant(alpha=alpha)(draft, context).network
    norm, linear = draft.network.get_submodule("0"), draft.network.get_submodule("1")
    inputs = norm(x)
    for j in range(6):  # the obvious way, channel by channel
        largest = max(abs(row[j].item()) for row in inputs)
        s = largest**alpha / linear.weight[:, j].abs().max().item() ** (1 - alpha)
        torch.testing.assert_close(smoothed.get_submodule("0").weight[j], norm.weight[j] / s)
        torch.testing.assert_close(smoothed.get_submodule("0").bias[j], norm.bias[j] / s)
        torch.testing.assert_close(smoothed.get_submodule("1").weight[:, j], linear.weight[:, j] * s)
    assert torch.equal(smoothed.get_submodule("1").bias, linear.bias)


def test_layers_that_share_an_input_share_its_scales():
    x = torch.randn(12, 7, 16)
    draft, context = drafted(outliers(Block()), x)
    smoothed = SmoothQuant(alpha=0.5)(draft, context).network
    old = draft.network
    with torch.no_grad():
        inputs = old.before(x).abs().amax((0, 1))
    together = torch.stack([getattr(old, n).weight.abs().amax(0) for n in "qkv"]).amax(0)
    s = (inputs / together).sqrt()
    torch.testing.assert_close(smoothed.q.weight, old.q.weight * s)
    torch.testing.assert_close(smoothed.before.weight, old.before.weight / s)


@settings(max_examples=15, deadline=None)
@given(
    norm=st.sampled_from([nn.LayerNorm, nn.RMSNorm, WrittenOut]),
    alpha=st.floats(0, 1),
    heads=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 99),
)
def test_the_function_stays(norm, alpha, heads, seed):
    torch.manual_seed(seed)
    x = torch.randn(8, 5, 16)
    draft, context = drafted(outliers(Block(norm, heads=heads), seed), x)
    step = SmoothQuant(alpha=alpha)
    couples = step.pairs(draft, context)
    assert [couple.readers for couple in couples] == [("q", "k", "v"), ("o",), ("up",)]
    after = step(draft, context)
    with torch.no_grad():
        a, b = draft.network(x), after.network(x)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert not torch.equal(draft.network.up.weight, after.network.up.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_noise_from_outliers_falls_tenfold(norm):
    x = torch.randn(32, 7, 16)
    draft, context = drafted(outliers(Block(norm)), x)
    assert noise(SmoothQuant()(draft, context), context, x) < 0.1 * noise(draft, context, x)


class Not(nn.Module):
    """What is left alone: a norm that a residual reads, one that is given back, one without gains, one called twice."""

    def __init__(self):
        super().__init__()
        self.residual, self.given, self.twice = (nn.LayerNorm(6) for _ in range(3))
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.residual(x)
        x = x + nn.functional.silu(self.a(x))
        x = nn.functional.silu(self.b(self.plain(x)))
        x = nn.functional.silu(self.c(self.twice(self.twice(x))))
        y = self.given(x)
        return self.d(y), y


def test_what_somebody_else_reads_stays():
    x = torch.randn(8, 6)
    draft, context = drafted(Not(), x)
    assert SmoothQuant().pairs(draft, context) == ()
    after = SmoothQuant()(draft, context).network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in draft.network.state_dict().items())


def test_dead_channels_stay():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[0] = 0  # its bias is 0: never anything but 0
        model[1].weight[:, 1] = 0
    draft, context = drafted(model, torch.randn(9, 6))
    after = SmoothQuant()(draft, context).network
    assert torch.equal(after.get_submodule("0").weight[:2], draft.network.get_submodule("0").weight[:2])
    assert torch.equal(after.get_submodule("1").weight[:, :2], draft.network.get_submodule("1").weight[:, :2])
    assert all(t.isfinite().all() for t in after.state_dict().values())


def test_a_vision_transformer_and_a_bert():
    transformers = pytest.importorskip("transformers")
    told = []
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    )
    ids = {"input_ids": torch.randint(0, 50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.int64)}
    ids["attention_mask"][1, 4:] = 0
    for model, example in ((vit, {"pixel_values": torch.randn(4, 3, 16, 16)}), (bert, ids)):
        task = Task(example=example, calibration=[example])
        draft = Draft(capture_network(model.eval(), *task.call()))
        context = Context(task=task, events=lambda kind, **v: told.append(v) if kind == "covered" else None)
        after = SmoothQuant()(draft, context)
        with torch.no_grad():
            a, b = draft.network(**example).logits, after.network(**example).logits
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    # Every layer but the patches and the second one of each perceptron, which a GELU feeds.
    assert told[0] == {"step": "SmoothQuant", "layers": 2 * 5 + 1, "total": 2 * 6 + 2}
    # BERT's norms stand behind the additions, read by a residual too: the attentions' outputs and the pooler are left.
    assert told[1] == {"step": "SmoothQuant", "layers": 2 + 1, "total": 2 * 6 + 2}


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"alpha": "much"}, {"alpha": True}, {"samples": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with raises_setting(*wrong):
        SmoothQuant(**wrong)


def test_it_comes_before_quantization():
    with raises_case(RecipeError, "order"):
        Recipe(Static(), SmoothQuant())
    Recipe(SmoothQuant(), Static())


class NormLast(nn.Module):
    """BERT's order: the norm's result is read by linear layers and by the residual addition."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.norm, self.end = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        z = y + self.down(nn.functional.gelu(self.up(y)))
        return self.end(z) + self.q(y) * self.k(y)


def test_what_a_residual_reads_too_is_multiplied_in_front_of_the_layers():
    torch.manual_seed(0)
    net, x = NormLast().eval(), torch.randn(40, 6, 16)
    with torch.no_grad():
        net.norm.weight[[3, 10]] *= 60
        for layer in (net.q, net.k, net.up):
            layer.weight[:, [3, 10]] /= 60
    draft, context = drafted(net, x)
    exact = draft.network(x)
    assert SmoothQuant()(draft, context).edits == ()  # nothing can be divided before them
    smoothed = SmoothQuant(multiply=True)(draft, context)
    assert [edit["layers"] for edit in smoothed.edits] == [["up", "q", "k"], ["down"]]
    torch.testing.assert_close(smoothed.network(x), exact, rtol=1e-4, atol=1e-4)
    again = replay(draft.network, smoothed.edits)
    again.load_state_dict(smoothed.network.state_dict())
    torch.testing.assert_close(again(x), smoothed.network(x), rtol=0, atol=0)

    def noise(start):
        static = Static()(start, context)
        return (insert(static.network, static.plan)(x) - exact).square().mean()

    assert noise(smoothed) < 0.3 * noise(draft)


def test_the_vector_is_that_of_the_equation():
    torch.manual_seed(0)
    net, x = NormLast().eval(), torch.randn(40, 6, 16)
    draft, context = drafted(net, x)
    smoothed = SmoothQuant(multiply=True, alpha=0.75)(draft, context)
    inputs = net.norm(x).abs().amax((0, 1))
    weights = torch.stack([layer.weight.abs().amax(0) for layer in (net.q, net.k, net.up)]).amax(0)
    factor = inputs**0.75 / weights**0.25
    torch.testing.assert_close(smoothed.network.up_divided.by, 1 / factor, rtol=1e-5, atol=0)
    torch.testing.assert_close(smoothed.network.q.weight, net.q.weight * factor, rtol=1e-5, atol=0)


def test_multiply_is_true_or_false():
    with raises_setting("multiply"):
        SmoothQuant(multiply=1)
