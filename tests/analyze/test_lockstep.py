from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze import lockstep
from penjing.analyze.samples import chunks
from penjing.network.capture import capture_network
from penjing.network.graph import flat_inputs, kind, sites
from penjing.quantize import Static
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.surgery.functional_layers import bias_entry
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task, as_call


class Residual(nn.Module):
    """Batch norm, a residual addition, a concatenation, one layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.body(x) + x)
        x = self.point(self.point(x))
        x = torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)
        return {"scores": self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))}


def picture_net():
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 3, 10, 10, generator=random) for _ in range(3)]
    return Residual().eval(), data


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, attn_implementation="sdpa",
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    data = []
    for _ in range(2):
        ids = torch.randint(0, 50, (6, 9), generator=random)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return transformers.BertForSequenceClassification(config).eval(), data


# Some runtimes have their outputs quantized too.
EAGER = replace(GENERIC, quantized_output=frozenset({"conv", "linear", "add", "cat"}))


@pytest.fixture(
    params=[(picture_net, None), (picture_net, EAGER), (bert, None)],
    ids=["images", "images, quantized outputs", "bert"],
    scope="module",
)
def example(request):
    make, capabilities = request.param
    module, data = make()
    task = Task(example=data[0], calibration=data)
    context = Context(task=task, capabilities=capabilities)
    draft = Static()(Draft(capture_network(module, *task.call())), context)
    assert ("/output:in0" in draft.plan.entries) == (capabilities is not None)
    return draft, context, data


def answers(network, data):
    with torch.no_grad():
        return [flatten_outputs(network(*args, **kwargs))[0] for args, kwargs in map(as_call, data)]


def leaves(outputs):
    tensors = []
    for chunk in outputs:
        tensors.append([v for v in torch.utils._pytree.tree_leaves(chunk) if isinstance(v, torch.Tensor)])
    return tensors


def nobody(layer):
    return None


def test_both_sides_answer_as_the_network_and_as_its_quantized_copy(example):
    draft, _, data = example

    def with_integer_bias(layer):
        entry = bias_entry(draft.plan, layer.site)
        if entry is None or layer.module.bias is None or layer.replica_inputs[0].dim() == 3:
            return None
        return layer.replica_outputs(bias=lockstep.rounded(layer.module.bias, entry))

    source, replica = lockstep.run(draft.network, draft.plan, map(as_call, data), with_integer_bias)
    for outputs, expected in zip(leaves(source), answers(draft.network, data), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    planned = answers(insert(draft.network, draft.plan), data)
    for outputs, expected, exact in zip(leaves(replica), planned, answers(draft.network, data), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(outputs, exact, strict=True))


def test_without_a_plan_the_twin_is_the_network(example):
    draft, _, data = example
    source, replica = lockstep.run(draft.network, type(draft.plan)(), map(as_call, data), nobody)
    for a, b in zip(leaves(source), leaves(replica), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_layer_is_seen_once_a_call_with_what_comes_in_and_goes_out(example):
    draft, context, _ = example
    seen = []

    def watch(layer):
        seen.append(layer.site)
        for x, y in zip(layer.inputs, layer.outputs, strict=True):
            assert torch.equal(layer.module(x), y)
        assert (layer.entry is None) == (f"{layer.site}:weight" not in draft.plan.entries)
        if layer.entry is None:
            assert layer.weight is layer.module.weight
        else:
            assert torch.equal(lockstep.rounded(layer.weight, layer.entry), layer.weight)
            assert not torch.equal(layer.weight, layer.module.weight)
        if entry := draft.plan.entries.get(f"{layer.site}:in0"):
            for x in layer.replica_inputs:
                assert torch.equal(lockstep.rounded(x, entry), x)

    lockstep.run(draft.network, draft.plan, chunks(context, draft.network, 12), watch)
    assert len(seen) == len(set(seen))
    tables = {name for name, node in sites(draft.network).items() if kind(draft.network, node) == "embedding"}
    assert {edge.rpartition(":")[0] for edge in draft.plan.entries if edge.endswith(":weight")} - tables <= set(seen)


def test_what_a_watcher_returns_replaces_the_twins_output(example):
    draft, _, data = example
    source, replica = lockstep.run(draft.network, draft.plan, map(as_call, data), lambda layer: layer.outputs)
    _, other = lockstep.run(draft.network, draft.plan, map(as_call, data), nobody)
    for exact, given, rounded in zip(leaves(source), leaves(replica), leaves(other), strict=True):
        for a, b, c in zip(exact, given, rounded, strict=True):
            assert (a - b).abs().mean() < (a - c).abs().mean()


def test_values_are_let_go_when_nobody_reads_them_any_more(example):
    draft, context, _ = example
    inputs = [flat_inputs(draft.network, call) for call in chunks(context, draft.network, 4)]
    largest = 0

    def watch(layer):
        nonlocal largest
        largest = max(largest, len(twins.source))

    twins = lockstep._Replicas(draft.network, draft.plan, inputs, watch, draft.network)
    with torch.no_grad():
        twins.run()
    read_by_output = next(n for n in draft.network.graph.nodes if n.op == "output").all_input_nodes
    assert set(twins.source) == set(twins.replica) == set(read_by_output)
    assert {node for node, _ in twins.grids} <= set(read_by_output)
    assert largest < len(draft.network.graph.nodes) / 2


def test_tensors_that_two_calls_or_two_layers_share_are_not_countable(example):
    draft, _, _ = example
    countable = lockstep.countable(draft.network)
    if "stem" in dict(draft.network.named_modules()):
        assert countable == ("stem", "body", "head")
        draft = draft.copy()
        draft.network.get_submodule("body").weight = draft.network.get_submodule("stem").weight
        assert lockstep.countable(draft.network) == ("head",)
    else:
        assert "classifier" in countable and len(countable) == 2 * 6 + 2


def test_means_and_shifts_equal_a_loop():
    torch.manual_seed(0)
    reference = [torch.randn(3, 4, 5), torch.randn(2, 4, 5)]
    outputs = [torch.randn(3, 4, 5), torch.randn(2, 4, 5)]
    difference = torch.cat(reference) - torch.cat(outputs)
    by_hand = torch.tensor([float(difference[:, c].double().mean()) for c in range(4)], dtype=torch.float64)
    shift = lockstep.mean_difference(reference, outputs, 1)
    torch.testing.assert_close(shift, by_hand)
    torch.testing.assert_close(lockstep.mean_difference(reference, outputs, -1)[2], difference[..., 2].double().mean())
    moved = lockstep.shifted([f.clone() for f in outputs], shift, 1)
    assert float(lockstep.mean_difference(reference, moved, 1).abs().max()) < 1e-6
