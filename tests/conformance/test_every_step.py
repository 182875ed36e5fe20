"""What every step of the catalogue promises. A step joins by its line in `tests.pairs.TECHNIQUES`."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from penjing import quantize
from penjing.network.capture import capture_network
from penjing.recipes.catalogue import CATALOGUE
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Step
from penjing.storage import checkpoint
from penjing.surgery import insert
from penjing.tasks.task import Task
from tests import pairs

pytest.importorskip("onnxruntime")


class Watched(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@dataclass
class Ran:
    """A step that ran twice on one draft, and all that is compared."""

    step: Step
    task: Task
    draft: Draft
    before: dict[str, Any]
    first: Draft
    second: Draft
    events: list[tuple[str, dict[str, Any]]]
    reads: int


def bits(draft):
    """All that a draft is, as something that can be compared after it."""
    network = draft.network
    return {
        "tensors": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "trained": {name: (p.requires_grad, p.grad is None) for name, p in network.named_parameters()},
        "operators": [str(node) + node.format_node() for node in network.graph.nodes if node.op != "placeholder"],
        "mode": [part.training for part in network.modules()],
        "plan": draft.plan.to_json(),
        "edits": copy.deepcopy(draft.edits),
    }


def difference(one, other):
    """What of two `bits` differs, in words; empty where nothing does."""
    a, b = one["tensors"], other["tensors"]
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())
    names = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    return names + [part for part in one if part != "tensors" and one[part] != other[part]]


def settings(step):
    """A step whose time never runs out: what it does by the clock is not repeated to the bit."""
    return replace(step, minutes=60.0) if isinstance(step, quantize.Best) else step


@pytest.fixture(scope="module")
def source():
    """A trained network, one of whose linear layers reads a channel with outliers."""
    network = pairs.trained(pairs.task())
    with torch.no_grad():
        network.norm.weight[3] *= 30
        network.norm.bias[3] *= 30
        network.hidden.weight[:, 3] /= 30
    return network


@pytest.fixture(scope="module")
def planned(source):
    return quantize.Static()(Draft(source), pairs.context_of(source, pairs.task()))


@pytest.fixture(scope="module", params=pairs.TECHNIQUES)
def ran(request, source, planned):
    family, step = pairs.TECHNIQUES[request.param]
    step, data = settings(step), pairs.task()
    watched = replace(data, train=Watched(data.train), calibration=Watched(data.calibration))
    draft = planned if family == "repair" else Draft(source)
    before, events = bits(draft), []

    def note(kind, **values):
        events.append((kind, values))

    # Whoever draws in between must not be heard of in the result.
    torch.manual_seed(1)
    first = step(draft, pairs.context_of(source, watched, seed=3, events=note))
    reads = watched.train.reads + watched.calibration.reads
    torch.manual_seed(2)
    second = step(draft, pairs.context_of(source, data, seed=3))
    return Ran(step, data, draft, before, first, second, events, reads)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_step_of_the_catalogue_has_a_row(name):
    assert any(type(step) is CATALOGUE[name] for _, step in pairs.TECHNIQUES.values()), (
        f"{name} is in the catalogue and has no line in tests.pairs.TECHNIQUES"
    )


def test_it_is_a_step(ran):
    assert isinstance(ran.step, Step)
    assert isinstance(ran.first, Draft) and ran.first.network is not ran.draft.network


def test_the_given_draft_stays_as_it_was(ran):
    assert difference(ran.before, bits(ran.draft)) == []
    own = {t.data_ptr() for t in ran.draft.network.state_dict().values() if t.numel()}
    assert not own & {t.data_ptr() for t in ran.first.network.state_dict().values()}


def test_it_does_something_to_the_draft(ran):
    changed = difference(ran.before, bits(ran.first))
    assert set(changed) - {"trained", "mode", "operators"}


def test_the_same_seed_gives_the_same_bits(ran):
    assert difference(bits(ran.first), bits(ran.second)) == []


def test_it_does_not_ask_for_the_runtime_where_it_says_so(ran, source):
    if not ran.step.per_runtime:
        context = replace(pairs.context_of(source, ran.task, seed=3), capabilities=None)
        assert difference(bits(ran.first), bits(ran.step(ran.draft, context))) == []


def test_the_log_of_edits_goes_on(ran):
    assert ran.first.edits[: len(ran.draft.edits)] == ran.draft.edits


def test_its_output_is_ready_to_be_exported(ran):
    assert not any(part.training for part in ran.first.network.modules())
    assert all(p.grad is None for p in ran.first.network.parameters())


def test_its_output_still_trains(ran):
    network = copy.deepcopy(ran.first.network)
    if ran.first.plan:
        network = insert(network, ran.first.plan)
    x, y = ran.task.train[0]
    loss = F.cross_entropy(network(x), y)
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert loss.isfinite() and gradients
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert any(g.any() for g in gradients.values())


def test_yaml_holds_it(ran):
    before = (quantize.Static(),) if ran.draft.plan else ()
    recipe = Recipe(*before, ran.step)
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and again.to_data() == recipe.to_data()


def test_a_checkpoint_reloads_to_the_bit(ran, tmp_path):
    checkpoint.save(ran.first, tmp_path)
    torch.manual_seed(5)
    again = checkpoint.load(tmp_path, capture_network(pairs.Net(), *ran.task.call(), ran.task.dynamic))
    assert difference({**bits(ran.first), "trained": None}, {**bits(again), "trained": None}) == []
    with torch.no_grad():
        assert torch.equal(again.network(ran.task.example), ran.first.network(ran.task.example))


def test_an_artifact_of_it_answers_as_torch(ran, tmp_path):
    limit = pairs.INTEGER_DB if ran.first.plan else pairs.FLOAT_DB
    assert pairs.parity_db(ran.first, ran.task, tmp_path) >= limit


def test_it_says_how_far_it_is_where_it_reads_data(ran):
    progress = [values for kind, values in ran.events if kind == "progress"]
    assert bool(progress) or not ran.reads
    assert all(values["label"] and 0 <= values["done"] <= values["total"] for values in progress)
