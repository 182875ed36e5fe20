import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from penjing.analyze.cost import cost, totals
from penjing.errors import PruningError, RecipeError
from penjing.prune import Channels, Iterative, Magnitude
from penjing.prune.iterative import left
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Context
from penjing.surgery import replay
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.prune import sparse_trainings
from tests.prune.wide import Wide, draft, images
from tests.raises import raises_case, raises_setting
from tests.trainings import EVERY_STEP, Interrupt, Stop, bits, context_of, same

TRAIN = [(images(16, seed), torch.arange(16) % 5) for seed in range(3)]
TASK = Task(example=images(1), calibration=[images(8)], train=TRAIN, loss=F.cross_entropy)
STEP = Iterative(
    step=Channels(macs=0.4, criterion="l2", round_to=1, min_keep=0),
    finetune=Finetune(epochs=1, autocast="off"),
    rounds=3,
)
BRIEF = Finetune(epochs=1 / 3, autocast="off")  # one batch


@functools.cache  # no step changes the draft that it is given
def wide():
    return draft(Wide())


def macs(any_draft):
    return totals(cost(any_draft.network, TASK.call())).macs


def test_rounds_together_keep_what_is_asked_for_and_train_between():
    start = wide()
    events = []
    pruned = STEP(start, Context(task=TASK, events=lambda kind, **v: events.append((kind, v))))
    assert 0.33 < macs(pruned) / macs(start) <= 0.4
    kinds = [kind for kind, v in events if kind == "pruned" or v.get("label") == "fine-tune"]
    assert kinds.count("pruned") == 3
    assert kinds[1:4] == ["progress"] * 3  # three batches of training, then the next round


@pytest.mark.parametrize("unit", ["macs", "params", "size", "channels"])
def test_what_one_round_took_too_much_the_next_takes_less(unit):
    """Steps of 8 channels: a round that knew only the one before it would end far below the target."""
    step = Channels(**{unit: 0.4}, criterion="l2", round_to=8, min_keep=0)
    once = step(wide(), Context(task=TASK))
    iterated = Iterative(step=step, finetune=BRIEF, rounds=4)(wide(), Context(task=TASK))
    parts = [left(step, wide(), d, Context(task=TASK)) for d in (once, iterated)]
    assert 0.8 * parts[0] < parts[1] <= 0.41


def test_what_can_not_be_reached_is_told_with_the_round_and_the_whole_target():
    step = Iterative(step=Channels(macs=1e-6, criterion="l2"), finetune=BRIEF, rounds=2)
    with raises_case(PruningError, "unreachable") as refusal:
        step(wide(), Context(task=TASK))
    assert all(part in refusal.value.what for part in ("1 of 2", "macs=1e-06")) and "macs=0.001" in refusal.value.got


def test_a_latency_is_aimed_at_from_the_start():
    """Latencies that a runtime would measure; here they are the multiply-accumulates."""
    asked = []

    def latency(drafts, precision):
        asked.append(precision)
        return [float(macs(d)) for d in drafts]

    step = Channels(latency=0.5, criterion="l2", round_to=8, min_keep=0)
    pruned = Iterative(step=step, finetune=BRIEF, rounds=2)(wide(), Context(task=TASK, latency=latency))
    assert 0.35 < macs(pruned) / macs(wide()) <= 0.5 and set(asked) == {"fp32"}


def test_yaml_holds_the_steps_within():
    text = "- prune.Iterative: {step: {prune.Channels: {macs: 0.5}}, finetune: {Finetune: {epochs: 2}}, rounds: 2}"
    assert Recipe.from_yaml(text).steps[0].step == Channels(macs=0.5)
    text = "- prune.Iterative: {step: {prune.Magnitude: {sparsity: 0.9}}, finetune: {Finetune: {}}, rewind: weights}"
    recipe = Recipe.from_yaml(text)
    assert recipe.steps[0] == Iterative(step=Magnitude(sparsity=0.9), finetune=Finetune(), rewind="weights")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "settings",
    [
        {"rounds": 0}, {"rounds": True}, {"step": Finetune()}, {"finetune": None}, {"rewind": "rate"},
        {"step": Magnitude(threshold=0.1)}, {"step": Magnitude(pattern="2:4")},
        {"rewind_epochs": -1, "rewind": "weights"}, {"rewind_epochs": "1", "rewind": "weights"},
        {"rewind_epochs": float("nan"), "rewind": "weights"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(next(iter(settings))) as caught:
        Iterative(**{"step": Channels(macs=0.5), "finetune": Finetune(), **settings})
    assert caught.value.expected


@pytest.mark.parametrize(
    "settings",
    [
        {"rewind_epochs": 0.5}, {"rewind_epochs": 1.0, "rewind": "weights"},
        {"rewind_epochs": 0.5, "rewind": "weights", "finetune": Finetune(steps=40)},
    ],
)  # fmt: skip
def test_it_rewinds_to_a_moment_that_there_is(settings):
    with raises_case(RecipeError, "contradiction") as caught:
        Iterative(**{"step": Channels(macs=0.5), "finetune": Finetune(), **settings})
    assert caught.value.field == "rewind_epochs" and caught.value.expected


def test_a_folder_keeps_a_state_for_every_round(tmp_path):
    STEP(wide(), Context(task=TASK, folder=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0", "round-1", "round-2"]


# Single weights, and rewinding. A network with statistics and dropout; 4 steps an epoch.

TRAINING = Finetune(epochs=1.5, learning_rate=0.05, autocast="off")  # 6 steps
SPARSE = Iterative(step=Magnitude(sparsity=0.9), finetune=TRAINING, rounds=3)
LESS = Iterative(step=Channels(channels=0.5, criterion="l2", round_to=1, min_keep=0), finetune=TRAINING, rounds=2)
COUNT = sparse_trainings.COUNT


@functools.cache  # no step changes the draft that it is given
def small():
    return sparse_trainings.draft()


class Watch:
    """A hook that keeps the state of the network at the start, after so many steps and at the end of every training."""

    def __init__(self, at=None):
        self.at, self.starts, self.noted, self.ends = at, [], [], []

    def __call__(self, moment):
        state = {name: value for name, value in bits(moment.network).items() if not name.startswith("_early.")}
        if moment.name == "start":
            self.starts.append(state)
        if moment.name == "step" and moment.step == self.at:
            self.noted.append(state)
        if moment.name == "end":
            self.ends.append(state)


def watched(step, at=None, start=None, **fields):
    """The draft that a step makes, and what was seen on the way."""
    watch = Watch(at)
    step = replace(step, finetune=replace(step.finetune, hooks=(watch,)))
    return step(small() if start is None else start, context_of(**fields)), watch


def zeros(state):
    return sum(int((state[f"{name}.weight"] == 0).sum()) for name in ("conv", "head"))


def test_the_first_training_before_rounds_has_the_teacher_of_the_others():
    start = wide()
    cut = Channels(macs=0.6, criterion="l2", reconstruct=False)(start, Context(task=TASK))
    told = []
    step = Iterative(step=Magnitude(sparsity=0.5), finetune=BRIEF, rounds=1, rewind="weights")
    step(cut, Context(task=TASK, source=start.network, events=lambda kind, **v: told.append((kind, v))))
    terms = [set(v["terms"]) for kind, v in told if kind == "training"]
    assert terms == [{"labels", "Outputs"}] * 2


def test_single_weights_go_in_rounds_and_stay_away():
    pruned, watch = watched(SPARSE)
    assert [zeros(state) for state in watch.starts] == [int((1 - 0.1 ** (k / 3)) * COUNT + 1e-6) for k in (1, 2, 3)]
    assert [zeros(state) for state in watch.ends] == [zeros(state) for state in watch.starts]
    for before, after in zip(watch.ends, watch.starts[1:], strict=False):
        assert all(((after[n] == 0) | (before[n] != 0)).all() for n in ("conv.weight", "head.weight"))
        remaining = after["head.weight"] != 0
        assert torch.equal(after["head.weight"][remaining], before["head.weight"][remaining])  # nothing is rewound
    assert pruned.sparse == ("conv.weight", "head.weight")
    assert zeros(bits(pruned.network)) == int(0.9 * COUNT)


def test_half_of_the_blocks_go_where_nothing_is_said():
    step = replace(SPARSE, step=Magnitude(pattern="1x4", keep=("conv",)), rounds=2)
    nonzeros = (watched(step)[0].network.head.weight.reshape(10, -1, 4) != 0).sum(2)
    assert set(nonzeros.flatten().tolist()) == {0, 4} and int((nonzeros == 0).sum()) == nonzeros.numel() // 2


@pytest.mark.parametrize("epochs", [0, 0.5])
def test_weights_that_stay_go_back_and_statistics_with_them(epochs):
    start = small()
    pruned, watch = watched(replace(SPARSE, rewind="weights", rewind_epochs=epochs), at=2, start=start)
    early = watch.noted[0] if epochs else bits(start.network)
    assert len(watch.starts) == 4 and same(watch.starts[0], bits(start.network))
    for turn, state in enumerate(watch.starts[1:]):
        assert zeros(state) == int((1 - 0.1 ** ((turn + 1) / 3)) * COUNT + 1e-6)
        for name, value in state.items():
            remaining = value != 0 if name in pruned.sparse else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[remaining], early[name][remaining]), name
    assert early["norm.num_batches_tracked"] == (2 if epochs else 0)
    assert zeros(bits(pruned.network)) == int(0.9 * COUNT)
    assert not same(watch.starts[-1], bits(pruned.network)) and not pruned.network.training


def test_the_trained_weights_say_what_goes():
    start = small()
    _, watch = watched(replace(SPARSE, rounds=1, rewind="weights"), start=start)
    trained = TRAINING(start, context_of())
    assert same(watch.ends[0], bits(trained.network))
    pruned = Magnitude(sparsity=0.9)(trained, context_of())
    for name in pruned.sparse:
        assert torch.equal(watch.starts[1][name] == 0, pruned.network.get_parameter(name) == 0)


@pytest.mark.parametrize("epochs", [0, 0.5])
def test_channels_that_stay_go_back(epochs):
    """Against all edits replayed on the early network."""
    start = small()
    pruned, watch = watched(replace(LESS, rewind="weights", rewind_epochs=epochs), at=2, start=start)
    early = copy.deepcopy(start.network)
    early.load_state_dict(watch.noted[0] if epochs else bits(start.network))
    assert same(watch.starts[-1], bits(replay(early, pruned.edits)))
    assert [len(state["conv.weight"]) for state in watch.starts] == [8, 5, 4]  # 5.7 and 4, rounded down
    assert pruned.network.conv.out_channels == pruned.network.norm.num_features == 4


def test_zeros_of_a_step_before_stay_when_channels_go_back():
    first = Magnitude(sparsity=0.5, scope="per_layer")(small(), context_of())
    pruned, watch = watched(replace(LESS, rewind="weights"), start=first)
    expected = bits(replay(first.network, pruned.edits[len(first.edits) :]))
    assert same(watch.starts[-1], expected)
    for name in pruned.sparse:
        assert (pruned.network.get_parameter(name)[expected[name] == 0] == 0).all()


def test_the_seed_repeats_and_minutes_leave_no_trace():
    step = replace(SPARSE, rewind="weights", rewind_epochs=0.5)
    start = small()
    before = bits(start.network)
    one, _ = watched(step, start=start, seed=3)
    two, _ = watched(replace(step, finetune=replace(TRAINING, minutes=1e9)), seed=3)
    assert same(bits(one.network), bits(two.network)) and one.edits == two.edits
    assert same(bits(start.network), before) and start.edits == ()
    assert one.network.state_dict().keys() == before.keys()
    assert zeros(bits(replace(TRAINING, epochs=0.25)(one, context_of()).network)) == int(0.9 * COUNT)


@pytest.mark.parametrize("step", [SPARSE, LESS], ids=["weights", "channels"])
@pytest.mark.parametrize("count", [3, 9])  # in the first training behind the early state, and in the round after it
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, step, count):
    step = replace(step, rounds=2, rewind="weights", rewind_epochs=0.5)
    step = replace(step, finetune=replace(TRAINING, save_every_s=EVERY_STEP))

    class Counted(Interrupt):
        steps = 0

        def __call__(self, moment):
            self.steps += moment.name == "step"
            if self.steps == self.step:
                raise Stop

    def run(hook, **fields):
        hooked = replace(step, finetune=replace(step.finetune, hooks=(hook,)))
        return hooked(small(), context_of(**fields))

    whole = run(Counted())
    with pytest.raises(Stop):
        run(Counted(step=count), folder=tmp_path)
    resumed = run(Counted(), folder=tmp_path)
    assert same(bits(resumed.network), bits(whole.network)) and resumed.edits == whole.edits
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "round-0", "round-1"]
