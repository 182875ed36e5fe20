import copy
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from penjing.errors import CheckpointError, OutputError, TaskError, TrainingError
from penjing.network.capture import capture_network
from penjing.network.exporting import export
from penjing.randomness import seed_everything
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune
from penjing.train.precision import bf16_pays
from tests.raises import raises_case, raises_setting
from tests.trainings import (
    LONGER,
    SHORT,
    Interrupt,
    Shuffled,
    Stop,
    bits,
    context_of,
    digits,
    net,
    same,
    trained,
)


class TestLearning:
    def test_the_loss_falls_and_the_accuracy_rises(self):
        data = digits(1500, 50)
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor((x[1500:] - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y[1500:])
        losses = []

        def accuracy(network):
            with torch.no_grad():
                return float((network.eval()(x).argmax(1) == y).float().mean())

        def listen(kind, **values):
            if kind == "progress":
                losses.append(values["loss"])

        network = net()
        before = accuracy(network)
        after = accuracy(trained(Finetune(epochs=4, learning_rate=0.05), context_of(data, events=listen), network))
        assert losses[-1] < 0.3 * losses[0]
        assert before < 0.3
        assert after > 0.85

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_both_optimizers_learn(self, optimizer):
        network = net()
        inputs, target = next(iter(digits(400, 400)))
        with torch.no_grad():
            before = float(F.cross_entropy(network.eval()(inputs), target))
            rate = 0.05 if optimizer == "sgd" else 0.01
            with torch.enable_grad():
                trained(Finetune(epochs=10, learning_rate=rate, optimizer=optimizer), network=network)
            assert float(F.cross_entropy(network(inputs), target)) < 0.5 * before

    def test_a_captured_network_learns_as_its_source_does(self):
        source = net()
        captured = capture_network(source, (torch.zeros(1, 1, 8, 8),))
        settings = replace(SHORT, channels_last=False)
        assert same(trained(settings, network=captured), trained(settings, network=source))

    def test_statistics_of_batch_norms_move(self):
        network = net()
        before = bits(network)
        after = bits(trained(replace(SHORT, epochs=1), network=network))
        assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
        assert not torch.equal(after["norm.running_var"], before["norm.running_var"])
        assert after["norm.num_batches_tracked"] == 4

    def test_dropout_is_off_afterwards(self):
        network = trained(SHORT)
        assert not any(module.training for module in network.modules())
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(network(x), network(x))


class TestWhatStays:
    def test_the_plan_and_the_edits_go_on(self):
        draft = Draft(
            capture_network(net(), (torch.zeros(1, 1, 8, 8),)), Plan(floats={"head": "why"}), ({"edit": "x"},)
        )
        result = replace(SHORT, epochs=0.25)(draft, context_of())
        assert (result.plan, result.edits) == (draft.plan, draft.edits)

    def test_frozen_weights_stay(self):
        network = net()
        network.conv.weight.requires_grad_(False)
        before = network.conv.weight.clone()
        trained(SHORT, network=network)
        assert torch.equal(network.conv.weight, before)


class TestDeterminism:
    def test_the_same_seed_gives_the_same_bits(self):
        assert same(self.after_drawing(1, SHORT), self.after_drawing(2, SHORT))

    def after_drawing(self, seed, settings):
        """What was drawn before the training must not matter."""
        network = net()
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(seed)
        return trained(settings, network=network)

    def test_another_seed_gives_other_bits(self):
        assert not same(trained(SHORT, context_of(seed=0)), trained(SHORT, context_of(seed=1)))

    @pytest.mark.parametrize("seed", [-1, 2**40, 2**70])
    def test_any_integer_is_a_seed(self, seed):
        seed_everything(seed)
        drawn = [float(torch.rand(1)), np.random.rand(), random.random()]
        seed_everything(seed)
        assert [float(torch.rand(1)), np.random.rand(), random.random()] == drawn
        assert same(
            trained(replace(SHORT, epochs=0.5), context_of(seed=seed)),
            trained(replace(SHORT, epochs=0.5), context_of(seed=seed)),
        )

    def test_a_torch_loader_repeats_too(self):
        data = DataLoader(TensorDataset(digits().x, digits().y), batch_size=100, shuffle=True)
        assert same(trained(SHORT, context_of(data)), trained(SHORT, context_of(data)))

    def test_a_hook_that_draws_at_the_start_is_seeded(self):
        def noise(moment):
            if moment.name == "start":
                with torch.no_grad():
                    moment.network.head.weight += torch.randn_like(moment.network.head.weight)

        settings = replace(SHORT, hooks=(noise,))
        assert same(self.after_drawing(1, settings), self.after_drawing(2, settings))


class TestResume:
    # In an epoch of 4 steps: before the first save of an update, mid-epoch, with the last save at an epoch's very
    # end (5, "step" raises before the save of its own update), and after the middle of the last epoch.
    @pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 9, 10])
    @pytest.mark.parametrize("name", ["gradients", "step"])
    def test_it_continues_to_the_same_bits(self, tmp_path, name, step):
        settings = replace(SHORT, hooks=(Interrupt(),))
        whole = trained(settings)
        stopping = replace(SHORT, hooks=(Interrupt(name, step - (name == "gradients")),))
        with pytest.raises(Stop):
            trained(stopping, context_of(folder=tmp_path))
        resumed = []
        again = context_of(folder=tmp_path, events=lambda kind, **values: resumed.append(kind))
        assert same(trained(settings, again, net(seed=9)), whole)  # the start does not matter: all is in the file
        assert resumed[0] == "resumed"
        assert resumed.count("progress") == 10 - (step - 1)

    def test_the_curve_is_told_once_and_as_if_nothing_had_happened(self, tmp_path):
        def told(into):
            return lambda kind, **values: into.append(values["curve"]) if kind == "trained" else None

        whole, parts = [], []
        trained(replace(SHORT, hooks=(Interrupt(),)), context_of(events=told(whole)))
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Interrupt("step", 6),)), context_of(folder=tmp_path, events=told(parts)))
        trained(replace(SHORT, hooks=(Interrupt(),)), context_of(folder=tmp_path, events=told(parts)))
        assert parts == whole and [point["step"] for point in whole[0]] == list(range(1, 11))
        assert all(list(point["terms"]) == ["labels"] for point in whole[0])

    def test_with_a_torch_loader(self, tmp_path):
        data = DataLoader(TensorDataset(digits().x, digits().y), batch_size=100, shuffle=True)
        settings = replace(SHORT, hooks=(Interrupt(),))
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Interrupt("step", 7),)), context_of(data, folder=tmp_path))
        assert same(trained(settings, context_of(data, folder=tmp_path)), trained(settings, context_of(data)))

    def test_with_a_generator_of_the_loader_s_own(self, tmp_path):
        generator = torch.Generator().manual_seed(5)
        rows = TensorDataset(digits().x, digits().y)
        data = DataLoader(rows, batch_size=100, shuffle=True, generator=generator)
        settings = replace(SHORT, hooks=(Interrupt(),))
        whole = trained(settings, context_of(data))
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
        generator.manual_seed(6)  # as in another process, which has drawn otherwise
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Interrupt("step", 7),)), context_of(data, folder=tmp_path))
        assert same(trained(settings, context_of(data, folder=tmp_path)), whole)

    @pytest.mark.parametrize("step", [3, 7])
    def test_data_that_do_not_repeat_are_told(self, tmp_path, step):
        class Forgetful(Shuffled):
            drawn = 0

            def __iter__(self):
                Forgetful.drawn += 1
                torch.manual_seed(Forgetful.drawn)
                return super().__iter__()

        for Loader, expected in ((Forgetful, 1), (Shuffled, 0)):
            folder, told = tmp_path / Loader.__name__, []
            folder.mkdir()
            data = Loader(digits().x, digits().y, 100)
            with pytest.raises(Stop):
                trained(replace(SHORT, hooks=(Interrupt("step", step),)), context_of(data, folder=folder))
            context = context_of(data, folder=folder, events=lambda kind, **values: told.append((kind, values)))  # noqa: B023
            trained(replace(SHORT, hooks=(Interrupt(),)), context)
            texts = [values["text"] for kind, values in told if kind == "warning"]
            assert len(texts) == expected and all("will not end in the same bits" in text for text in texts)

    def test_workers_that_live_on_are_told(self, tmp_path):
        rows, told = TensorDataset(digits().x, digits().y), []
        data = DataLoader(rows, batch_size=100, shuffle=True, num_workers=1, persistent_workers=True)
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Interrupt("step", 6),)), context_of(data, folder=tmp_path))
        context = context_of(data, folder=tmp_path, events=lambda kind, **values: told.append((kind, values)))
        trained(replace(SHORT, hooks=(Interrupt(),)), context)
        assert any(kind == "warning" and "persistent_workers" in values["text"] for kind, values in told)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_twice_interrupted(self, tmp_path, optimizer):
        settings = replace(SHORT, optimizer=optimizer, hooks=(Interrupt(),))
        for step in (3, 7):
            with pytest.raises(Stop):
                trained(replace(settings, hooks=(Interrupt("step", step),)), context_of(folder=tmp_path))
        assert same(trained(settings, context_of(folder=tmp_path)), trained(settings))

    def test_the_channels_last_and_bf16_way_too(self, tmp_path):
        settings = replace(SHORT, autocast="bf16", channels_last=True, hooks=(Interrupt(),))
        with pytest.raises(Stop):
            trained(replace(settings, hooks=(Interrupt("step", 6),)), context_of(folder=tmp_path))
        assert same(trained(settings, context_of(folder=tmp_path)), trained(settings))

    def test_every_moment_happens_once_in_both_parts_together(self, tmp_path):
        seen = []

        class Recording(Interrupt):
            def __call__(self, moment):
                super().__call__(moment)
                seen.append((moment.name, moment.step))

        trained(replace(SHORT, hooks=(Recording(),)))
        whole, seen = seen, []
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Recording("gradients", 4),)), context_of(folder=tmp_path))
        parts, seen = seen, []
        trained(replace(SHORT, hooks=(Recording(),)), context_of(folder=tmp_path))
        assert seen[0] == ("start", 4)  # in a new process; its step says that it is a resume
        assert seen.index(("pass", 4)) < seen.index(("gradients", 4))  # and the network was put into training mode
        again = {("epoch", 4), ("pass", 4)}  # may be on both sides of where the state was saved
        first = [m for m in (("epoch", 4), ("pass", 4)) if m not in parts]
        assert parts + first + [m for m in seen[1:] if m not in again] == whole

    @pytest.mark.parametrize("stop", [2, 6])
    def test_what_a_hook_freezes_at_a_pass_is_frozen_after_a_resume_too(self, tmp_path, stop):
        modes = []

        class Freeze(Interrupt):
            def __call__(self, moment):
                super().__call__(moment)
                norm = moment.network.get_submodule("norm")
                if moment.name == "pass":
                    norm.eval()
                modes.append(norm.training)

        whole = trained(replace(SHORT, hooks=(Freeze(),)))
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Freeze("gradients", stop),)), context_of(folder=tmp_path))
        modes.clear()
        assert same(trained(replace(SHORT, hooks=(Freeze(),)), context_of(folder=tmp_path)), whole)
        assert not any(modes[1:])

    def test_a_hook_whose_repr_shows_what_it_remembers_goes_on(self, tmp_path):
        class Count:
            def __init__(self, stop):
                self.seen, self.stop = 0, stop

            def __repr__(self):
                return f"Count(seen={self.seen})"

            def __call__(self, moment):
                self.seen += moment.name == "step"
                if self.stop and self.seen == 6:
                    raise Stop

        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Count(True),)), context_of(folder=tmp_path))
        resumed = trained(replace(SHORT, hooks=(Count(False),)), context_of(folder=tmp_path))
        assert same(resumed, trained(replace(SHORT, hooks=(Count(False),))))

    def test_norms_whose_weights_are_frozen_keep_their_statistics(self):
        frozen, free = net(), net()
        frozen.norm.requires_grad_(False)
        before = frozen.norm.running_mean.clone()
        assert torch.equal(trained(SHORT, network=frozen).norm.running_mean, before)
        assert not torch.equal(trained(SHORT, network=free).norm.running_mean, before)

    def test_it_is_saved_no_more_often_than_asked(self, tmp_path):
        with pytest.raises(Stop):
            trained(replace(SHORT, save_every_s=3600, hooks=(Interrupt("step", 9),)), context_of(folder=tmp_path))
        assert torch.load(tmp_path / "finetune.pt", weights_only=True)["numbers"][0] == 0

    @pytest.mark.parametrize(
        "changed",
        [
            {"epochs": 3},
            {"learning_rate": 0.01},
            {"optimizer": "adamw"},
            {"weight_decay": 0.0},
            {"channels_last": False},
            {"autocast": "bf16"},
            {"losses": (lambda batch: batch.output.mean(),)},
            {"hooks": ()},
        ],
    )
    def test_other_settings_are_refused_by_name(self, tmp_path, changed):
        self.interrupted(tmp_path)
        with raises_case(CheckpointError, "settings") as caught:
            trained(replace(SHORT, **{"hooks": (Interrupt(),), **changed}), context_of(folder=tmp_path))
        assert [caught.value.field] == list(changed)

    def test_another_seed_and_other_data_are_refused(self, tmp_path):
        self.interrupted(tmp_path)
        settings = replace(SHORT, hooks=(Interrupt(),))
        for name, data, seed in (("seed", digits(), 1), ("number of batches", digits(300), 0)):
            with raises_case(CheckpointError, "settings") as caught:
                trained(settings, context_of(data, folder=tmp_path, seed=seed))
            assert caught.value.field == name

    def test_how_often_it_is_saved_may_change(self, tmp_path):
        self.interrupted(tmp_path)
        settings = replace(SHORT, hooks=(Interrupt(),), save_every_s=60)
        assert same(trained(settings, context_of(folder=tmp_path)), trained(settings))

    def test_functions_and_objects_count_by_name_and_not_by_address(self, tmp_path):
        def scaled(factor):
            @dataclass(frozen=True)
            class Scaled:
                inner: object

                def __call__(self, batch):
                    return factor * self.inner(batch)

            return Scaled(lambda batch: F.cross_entropy(batch.output, batch.target))

        def settings(**stop):
            return replace(SHORT, losses=(scaled(0.5),), hooks=(Interrupt(**stop),))

        with pytest.raises(Stop):
            trained(settings(name="step", step=6), context_of(folder=tmp_path))
        assert same(trained(settings(), context_of(folder=tmp_path)), trained(settings()))

    def interrupted(self, folder):
        with pytest.raises(Stop):
            trained(replace(SHORT, hooks=(Interrupt("step", 6),)), context_of(folder=folder))


CHILD = """
    import json, os, sys, time
    from pathlib import Path
    import torch
    sys.path[:0] = json.loads(os.environ["SEARCH"])
    torch.set_num_threads(int(os.environ["THREADS"]))
    from tests.trainings import LONGER, context_of, digits, trained

    def events(kind, **values):
        while "done" in values and values["done"] == values["total"]:
            time.sleep(0.01)  # until it is killed

    trained(LONGER, context_of(digits(400, 40), folder=Path(sys.argv[1]), events=events))
"""


class TestKilled:
    def test_a_killed_process_is_continued_by_another_to_the_same_bits(self, tmp_path):
        script, state = tmp_path / "child.py", tmp_path / "state"
        script.write_text(textwrap.dedent(CHILD))
        state.mkdir()
        killed = self.start(script, state)
        try:
            step = 0
            while step < 7:
                assert killed.poll() is None, "the process ended before it was killed"
                if (state / "finetune.pt").exists():
                    step = torch.load(state / "finetune.pt", weights_only=True)["numbers"][0]
                time.sleep(0.002)
        finally:
            killed.kill()
            killed.wait()
        if hasattr(signal, "SIGKILL"):
            assert killed.returncode == -signal.SIGKILL
        numbers = torch.load(state / "finetune.pt", weights_only=True)["numbers"]
        assert 7 <= numbers[0] < 50
        resumed = trained(LONGER, context_of(digits(400, 40), folder=state))
        assert same(resumed, trained(LONGER, context_of(digits(400, 40))))

    def start(self, script, folder):
        path = [str(Path(__file__).parents[2]), *(p for p in sys.path if p)]
        env = {**os.environ, "SEARCH": json.dumps(path), "THREADS": str(torch.get_num_threads())}
        return subprocess.Popen([sys.executable, str(script), str(folder)], env=env)


class TestTheSavedState:
    @pytest.mark.parametrize(
        "write",
        [lambda obj, path: torch.save(obj, path), lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))],
    )
    def test_code_in_it_is_refused_and_does_not_run(self, tmp_path, write):
        mark = tmp_path / "ran"

        class Malicious:
            def __reduce__(self):
                return Path.touch, (mark,)

        write({"request": "{}", "numbers": Malicious()}, tmp_path / "finetune.pt")
        with raises_case(CheckpointError, "unreadable"):
            trained(SHORT, context_of(folder=tmp_path))
        assert not mark.exists()

    def test_weights_that_are_not_finite_do_not_replace_it(self, tmp_path):
        def break_(moment):
            if moment.name == "gradients" and moment.step == 3:
                moment.network.head.weight.grad.fill_(math.nan)

        with raises_case(TrainingError, "weight-not-finite") as caught:
            trained(replace(SHORT, hooks=(break_,)), context_of(folder=tmp_path))
        assert caught.value.what.endswith(" step 4")
        state = torch.load(tmp_path / "finetune.pt", weights_only=True)
        assert state["numbers"][0] == 3
        assert all(torch.isfinite(tensor.float()).all() for tensor in state["network"].values())

    @pytest.mark.parametrize("content", [b"", b"not a file of torch", None])
    def test_a_damaged_one_is_refused(self, tmp_path, content):
        path = tmp_path / "finetune.pt"
        trained(SHORT, context_of(folder=tmp_path))
        path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
        with raises_case(CheckpointError, "unreadable"):
            trained(SHORT, context_of(folder=tmp_path))

    @pytest.mark.parametrize("state", [[1], {}, {"request": "[]"}, {"request": "{"}, {"request": 3}])
    def test_a_foreign_one_is_refused(self, tmp_path, state):
        torch.save(state, tmp_path / "finetune.pt")
        with raises_case(CheckpointError, "unreadable"):
            trained(SHORT, context_of(folder=tmp_path))

    def test_that_of_another_network_is_refused(self, tmp_path):
        trained(SHORT, context_of(folder=tmp_path))
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with raises_case(CheckpointError, "unreadable") as caught:
            trained(SHORT, context_of(folder=tmp_path), other)
        assert "1.weight" in caught.value.got

    def test_a_folder_that_cannot_be_written_is_said_before_training(self, tmp_path):
        progress = []
        context = context_of(folder=tmp_path / "missing", events=lambda *a, **k: progress.append(k))
        with raises_case(OutputError, "unwritable"):
            trained(SHORT, context)
        assert progress == []

    def test_a_failed_save_leaves_the_one_before(self, tmp_path):
        def block(moment):
            if moment.name == "step" and moment.step == 5:
                (tmp_path / "finetune.new").mkdir()

        with raises_case(OutputError, "unwritable"):
            trained(replace(SHORT, hooks=(block,)), context_of(folder=tmp_path))
        assert torch.load(tmp_path / "finetune.pt", weights_only=True)["numbers"][0] == 4


class TestBudget:
    @pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.5, 2), (1, 4), (1.25, 5), (2.5, 10)])
    def test_fractions_of_an_epoch(self, epochs, steps):
        done = []
        context = context_of(events=lambda kind, **v: done.append((v["done"], v["total"])) if "done" in v else None)
        trained(replace(SHORT, epochs=epochs), context)
        assert done == [(i + 1, steps) for i in range(steps)]

    def test_minutes_are_an_upper_bound_and_one_step_is_always_taken(self):
        assert self.steps_within(1e-12) == 1
        assert self.steps_within(1e9) == 10

    def steps_within(self, minutes):
        steps = []
        hook = lambda moment: steps.append(moment.steps)  # noqa: E731
        trained(replace(SHORT, minutes=minutes, hooks=(hook,)))
        assert len(set(steps)) == 1
        return steps[0]

    def test_what_a_loader_takes_counts(self, monkeypatch):
        clock = [0.0]  # time passes while batches are loaded, and nowhere else

        class Slow(list):
            def __iter__(self):
                clock[0] += self.begin
                for batch in super().__iter__():
                    clock[0] += 3.0
                    yield batch

        monkeypatch.setattr("penjing.train.loop.time.perf_counter", lambda: clock[0])
        for Slow.begin, counted, done in ((0.0, 8, 8), (4.0, 6, 5)):  # 4 steps an epoch: (3 + 4 / 4) s a step
            seen = []
            hook = lambda moment: seen.append((moment.step, moment.steps, clock[0]))  # noqa: B023, E731
            trained(replace(SHORT, minutes=24 / 60, hooks=(hook,)), context_of(Slow(digits())))
            assert seen[0][1] == counted and seen[-1][:2] == (done, done)
            assert seen[-1][2] - seen[0][2] <= 24

    def test_steps_that_turn_out_slower_get_fewer(self, monkeypatch):
        clock = [0.0]

        class Slower(list):
            def __iter__(self):
                for i, batch in enumerate(super().__iter__()):
                    clock[0] += 1.0 if i < 8 else 10.0
                    yield batch

        monkeypatch.setattr("penjing.train.loop.time.perf_counter", lambda: clock[0])
        seen, rates = [], []

        def hook(moment):
            seen.append((moment.step, moment.steps, clock[0]))
            rates.append(moment.optimizer.param_groups[0]["lr"])

        settings = replace(SHORT, epochs=1, minutes=100 / 60, hooks=(hook,))
        trained(settings, context_of(Slower(digits(1600, 20))))
        assert seen[0][1] == 80 and seen[-1][0] < 20
        assert 90 <= seen[-1][2] - seen[0][2] <= 110  # a step that has begun is ended
        assert rates[-1] < 0.2 * max(rates)  # the schedule comes to its end

    def test_a_stream_without_an_end_is_trained_on_for_so_long(self, tmp_path):
        class Endless(IterableDataset):
            def __iter__(self):
                while True:
                    yield torch.randn(1, 8, 8), 1

        done = []
        data = DataLoader(Endless(), batch_size=4)
        context = context_of(data, folder=tmp_path)
        trained(replace(SHORT, minutes=0.01, hooks=(lambda m: done.append(m.step),)), context)
        assert done[-1] > 1
        state = torch.load(tmp_path / "finetune.pt", weights_only=True)
        assert json.loads(state["request"])["number of batches"] is None  # how far it was read is up to the clock

    def test_a_stream_that_is_short_after_all_is_read_epochs_times(self, monkeypatch):
        class Stream:
            def __iter__(self):
                return iter(digits())

        monkeypatch.setattr("penjing.train.loop.PASS", 0.0)  # no time to count
        done = []
        settings = replace(SHORT, epochs=2, minutes=1e6, hooks=(lambda m: done.append((m.step, m.steps)),))
        trained(settings, context_of(Stream()))
        assert done[0][1] > 8 and done[-1] == (8, 8)

    def test_counting_leaves_no_trace_in_the_weights(self):
        assert same(trained(replace(SHORT, minutes=1e9)), trained(SHORT))

    def test_the_count_is_stored_before_the_first_step(self, tmp_path):
        with pytest.raises(Stop):
            settings = replace(SHORT, minutes=1e9, hooks=(Interrupt("start", 0),))
            trained(settings, context_of(folder=tmp_path))
        assert torch.load(tmp_path / "finetune.pt", weights_only=True)["numbers"][:4] == [0, 0, 0, 10]

    def test_the_stored_count_is_kept_on_resume(self, tmp_path):
        with pytest.raises(Stop):
            trained(replace(SHORT, minutes=1e9, hooks=(Interrupt("step", 4),)), context_of(folder=tmp_path))
        state = torch.load(tmp_path / "finetune.pt", weights_only=True)
        state["numbers"][3] = 6  # as if the first process had been slower
        torch.save(state, tmp_path / "finetune.pt")
        done = []
        context = context_of(folder=tmp_path, events=lambda kind, **values: done.append(values.get("done")))
        trained(replace(SHORT, minutes=1e9, hooks=(Interrupt(),)), context)
        assert [step for step in done if step is not None] == [4, 5, 6]


class TestHooks:
    def test_moments_come_in_order(self):
        seen = []
        weights = []

        def hook(moment):
            seen.append((moment.name, moment.step, moment.steps))
            weights.append(moment.network.head.weight.detach().clone())
            grads = [p.grad is not None for p in moment.network.parameters()]
            assert all(grads) if moment.name in ("gradients", "step") else True
            assert isinstance(moment.optimizer, torch.optim.SGD)

        trained(replace(SHORT, epochs=1.5, hooks=(hook,)), context_of(digits(200)))  # 2 batches an epoch
        update = lambda i: [("gradients", i, 3), ("step", i + 1, 3)]  # noqa: E731
        first = [("start", 0, 3), ("pass", 0, 3), *update(0), *update(1), ("epoch", 2, 3)]
        assert seen == [*first, ("pass", 2, 3), *update(2), ("end", 3, 3)]
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
        assert moved == [name == "step" for name, _, _ in seen[1:]]

    def test_an_epoch_that_ends_with_the_training_is_one(self):
        seen = []
        trained(replace(SHORT, epochs=2, hooks=(lambda moment: seen.append(moment.name),)))
        assert seen.count("epoch") == 2
        assert seen[-2:] == ["epoch", "end"]

    def test_they_may_change_gradients_and_weights(self):
        def freeze_head(moment):
            if moment.name == "gradients":
                moment.network.head.weight.grad.zero_()
            if moment.name == "end":
                with torch.no_grad():
                    moment.network.head.bias.fill_(7)

        network = net()
        before = network.head.weight.clone()
        trained(replace(SHORT, weight_decay=0.0, hooks=(freeze_head,)), network=network)
        assert torch.equal(network.head.weight, before)
        assert network.head.bias.eq(7).all()

    def test_a_rate_of_their_own_is_set_behind_the_gradients(self):
        def still(moment):
            if moment.name == "gradients":
                for group in moment.optimizer.param_groups:
                    group["lr"] = 0.0

        network = net()
        before = network.head.weight.clone()
        trained(replace(SHORT, hooks=(still,)), network=network)
        assert torch.equal(network.head.weight, before)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_layers_are_unfrozen(self, tmp_path, optimizer):
        class Unfreeze(Interrupt):
            def __call__(self, moment):
                if moment.name == "pass":
                    moment.network.conv.weight.requires_grad_(moment.step >= 4)
                super().__call__(moment)

        weights = []

        def watch(moment):
            if moment.name == "step":
                weights.append(moment.network.conv.weight.detach().clone())

        def frozen():
            network = net()
            network.conv.weight.requires_grad_(False)
            return network

        settings = replace(SHORT, optimizer=optimizer, hooks=(Unfreeze(), watch))
        whole = trained(settings, network=frozen())
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
        assert moved == [False] * 3 + [True] * 6
        for step in (3, 6):
            folder = tmp_path / str(step)
            folder.mkdir()
            with pytest.raises(Stop):
                stopped = replace(settings, hooks=(Unfreeze("step", step), watch))
                trained(stopped, context_of(folder=folder), network=frozen())
            assert same(trained(settings, context_of(folder=folder), network=frozen()), whole)

    def test_several_are_called_in_turn(self):
        seen = []
        hooks = tuple((lambda moment, i=i: seen.append(i)) for i in range(3))
        trained(replace(SHORT, epochs=0.25, hooks=hooks))
        assert seen == [0, 1, 2] * (len(seen) // 3)
        assert seen


class TestLosses:
    def test_terms_are_summed(self):
        def cross_entropy(batch):
            return F.cross_entropy(batch.output, batch.target)

        def small_weights(batch):
            return 0.01 * batch.network.head.weight.square().sum()

        both = trained(replace(SHORT, losses=(cross_entropy, small_weights)), context_of(loss=None))
        network = net()
        sum_of_both = lambda output, target: (  # noqa: E731
            F.cross_entropy(output, target) + 0.01 * network.head.weight.square().sum()
        )
        one = trained(SHORT, context_of(loss=sum_of_both), network)
        assert same(both, one)
        assert not same(both, trained(replace(SHORT, losses=(cross_entropy,)), context_of(loss=None)))
        assert same(both, trained(replace(SHORT, losses=(small_weights,))))  # the task's own loss is one of them
        assert same(both, trained(replace(SHORT, task_loss_weight=0.0, losses=(cross_entropy, small_weights))))

    def test_a_term_sees_the_whole_step(self):
        seen = []

        def term(batch):
            seen.append(batch)
            return F.cross_entropy(batch.output, batch.target)

        network = trained(replace(SHORT, epochs=0.5, losses=(term,)), context_of(loss=None))
        assert [batch.step for batch in seen] == [0, 1]
        (inputs,), named = seen[0].call
        assert inputs.shape == (100, 1, 8, 8)
        assert named == {}
        assert seen[0].output.shape == (100, 10)
        assert seen[0].target.shape == (100,)
        assert seen[0].network is network

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_one_number_of_any_shape_is_a_loss(self, shape):
        def term(batch):
            return F.cross_entropy(batch.output, batch.target).reshape(shape)

        assert same(trained(replace(SHORT, losses=(term,)), context_of(loss=None)), trained(SHORT))

    @pytest.mark.parametrize("loss", [lambda o, t: F.cross_entropy(o, t, reduction="none"), lambda o, t: 0.5])
    def test_what_is_no_single_number_is_refused(self, loss):
        with raises_case(TaskError, "not-a-scalar"):
            trained(SHORT, context_of(loss=loss))


class TestOptimizing:
    def test_weight_decay_spares_biases_and_norms(self):
        network = net()
        nn.init.normal_(network.head.bias)
        before = bits(network)
        context = context_of(loss=lambda output, target: 0.0 * output.sum())  # gradients of zero: decay alone acts
        after = bits(trained(replace(SHORT, weight_decay=0.1), context, network))
        for name in ("head.bias", "norm.weight", "norm.bias"):
            assert torch.equal(after[name], before[name]), name
        for name in ("conv.weight", "head.weight"):
            assert after[name].norm() < before[name].norm(), name
            torch.testing.assert_close(
                F.normalize(after[name].flatten(), dim=0), F.normalize(before[name].flatten(), dim=0)
            )

    def test_the_rate_rises_to_its_peak_and_falls_to_almost_nothing(self):
        rates = []

        def hook(moment):
            if moment.name == "gradients":
                rates.append({group["lr"] for group in moment.optimizer.param_groups})

        trained(replace(SHORT, epochs=5, warmup=0.2, learning_rate=0.08, hooks=(hook,)))
        assert all(len(rate) == 1 for rate in rates)
        rates = [rate.pop() for rate in rates]
        assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
        assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
        assert 0 < rates[-1] < 0.002

    def test_gradients_are_clipped(self):
        network = net()
        before = bits(network)
        after = bits(trained(replace(SHORT, epochs=0.25, weight_decay=0.0, clip=Clip(threshold=1e-3)), network=network))
        moved = sum(float((after[k] - before[k]).double().square().sum()) for k, _ in network.named_parameters()) ** 0.5
        assert 0 < moved <= 1.01 * 0.05 * 1.9e-3  # rate × (1 + momentum) × norm

    def test_a_loss_that_is_not_finite_stops_before_the_update(self):
        network = net()

        def loss(output, target):
            return F.cross_entropy(output, target) * (float("nan") if loss.calls else 1.0)

        loss.calls = 0
        snapshots = []

        def hook(moment):
            if moment.name == "step":
                loss.calls += 1
                snapshots.append(moment.network.head.weight.detach().clone())

        with raises_case(TrainingError, "loss-not-finite") as caught:
            trained(replace(SHORT, hooks=(hook,)), context_of(loss=loss), network)
        assert caught.value.what.endswith(" step 1")
        assert torch.equal(network.head.weight, snapshots[0])

    def test_weights_that_are_not_finite_are_no_result(self):
        def break_it(moment):
            if moment.name == "gradients" and moment.step == 9:
                moment.network.head.bias.grad.fill_(float("inf"))

        with raises_case(TrainingError, "weight-not-finite") as caught:
            trained(replace(SHORT, hooks=(break_it,)))
        assert caught.value.got == "head.bias"

    def test_nothing_to_train_is_an_error(self):
        with raises_case(TrainingError, "nothing-to-train"):
            trained(SHORT, network=net().requires_grad_(False))


class TestPrecisionAndMemoryFormat:
    @pytest.mark.parametrize(("autocast", "inside"), [("bf16", torch.bfloat16), ("off", torch.float32)])
    def test_autocast(self, autocast, inside):
        network, types = net(), []
        network.head.register_forward_hook(lambda module, args, output: types.append(output.dtype))

        def term(batch):
            types.append(batch.output.dtype)
            return F.cross_entropy(batch.output, batch.target)

        trained(replace(SHORT, epochs=0.25, autocast=autocast, losses=(term,)), network=network)
        assert types == [inside, torch.float32]  # a loss is always computed in fp32
        assert all(p.dtype == torch.float32 for p in network.parameters())

    def test_auto_takes_what_pays_here(self):
        chosen = replace(SHORT, autocast="bf16" if bf16_pays("cpu") else "off")
        assert same(trained(replace(SHORT, autocast="auto")), trained(chosen))

    def test_double_precision_stays_double(self):
        types = []

        def term(batch):
            types.append(batch.output.dtype)
            return F.cross_entropy(batch.output, batch.target)

        data = [(x.double(), y) for x, y in digits()]
        trained(replace(SHORT, losses=(term,)), context_of(data), net().double())
        assert set(types) == {torch.float64}

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_the_memory_format_is_that_of_the_training_alone(self, channels_last):
        formats = []

        def hook(moment):
            weight = moment.network.conv.weight
            formats.append(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())

        network = nn.Sequential()  # 8 input channels: with one, both formats are the same
        network.conv = nn.Conv2d(8, 8, 3)
        data = [(torch.randn(4, 8, 6, 6), torch.zeros(4, 8, 4, 4))]
        settings = replace(SHORT, channels_last=channels_last, hooks=(hook,))
        trained(settings, context_of(data, loss=F.mse_loss), network)
        repeats = torch.backends.cpu.get_cpu_capability() != "AVX2"  # there the gradients differ from run to run
        assert set(formats) == {channels_last and repeats}
        assert all(tensor.is_contiguous() for tensor in network.state_dict().values())

    def test_the_result_can_be_exported(self):
        x = torch.randn(3, 1, 8, 8)
        captured = capture_network(net(), (x,))
        draft = replace(SHORT, channels_last=True)(Draft(captured), context_of())
        program = export(draft.network, ((x,), {}), None)
        assert not [n for n in program.graph.nodes if "as_strided" in str(n.target)]
        torch.testing.assert_close(program.module()(x), draft.network(x))


class TestInputs:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, a, b):
            return {"sum": self.a(a) + self.b(b)}

    def learned(self, batches):
        torch.manual_seed(0)
        network = self.Two()
        before = bits(network)
        loss = lambda output, target: F.mse_loss(output["sum"], target)  # noqa: E731
        trained(SHORT, context_of(batches, loss=loss), network)
        assert not any(torch.equal(after, before[name]) for name, after in bits(network).items())
        return network

    def test_tuples_dicts_and_arrays_are_the_same(self):
        generator = torch.Generator().manual_seed(0)
        rows = [[torch.randn(4, n, generator=generator) for n in (3, 5, 2)] for _ in range(3)]
        by_position = self.learned([((a, b), y) for a, b, y in rows])
        assert same(by_position, self.learned([({"b": b, "a": a}, y) for a, b, y in rows]))
        assert same(by_position, self.learned([[[a, b], y] for a, b, y in rows]))
        assert same(by_position, self.learned([((a.numpy(), b.numpy()), y.numpy()) for a, b, y in rows]))

    def test_targets_may_be_structures(self):
        rows = [(torch.randn(4, 1, 8, 8), {"class": torch.tensor([1, 2, 3, 4]), "weight": np.full(4, 0.5, np.float32)})]

        def loss(output, target):
            each = F.cross_entropy(output, target["class"], reduction="none")
            return (each * target["weight"]).mean()

        network = net()
        before = bits(network)
        assert not same(trained(SHORT, context_of(rows, loss=loss), network), before)

    def test_a_stream_without_a_length_is_counted(self):
        class Stream(IterableDataset):
            def __iter__(self):
                yield from digits()

        steps = []
        context = context_of(
            DataLoader(Stream(), batch_size=None),
            events=lambda kind, **values: steps.append(values["total"]) if kind == "progress" else None,
        )
        trained(replace(SHORT, epochs=1.5), context)
        assert steps == [6] * 6


class TestBadInput:
    def test_no_training_data(self):
        with raises_case(TaskError, "no-training-data"):
            trained(SHORT, Context(task=Task(example=torch.zeros(1, 1, 8, 8), loss=F.cross_entropy)))

    def test_no_loss(self):
        with raises_case(TaskError, "no-loss"):
            trained(SHORT, context_of(loss=None))

    def test_no_batch(self):
        with raises_case(TaskError, "empty"):
            trained(SHORT, context_of([]))

    def test_fewer_samples_than_a_batch_that_are_dropped(self):
        samples = torch.utils.data.TensorDataset(torch.zeros(5, 1, 8, 8), torch.zeros(5).long())
        with raises_case(TaskError, "empty") as caught:
            trained(SHORT, context_of(torch.utils.data.DataLoader(samples, batch_size=8, drop_last=True)))
        assert "drop_last=True" in caught.value.got and "8" in caught.value.got
        assert "drop_last=False" in caught.value.remedy

    @pytest.mark.parametrize("data", [iter(()), (batch for batch in digits())])
    def test_data_that_can_be_read_only_once(self, data):
        with raises_case(TaskError, "read-once") as caught:
            trained(SHORT, context_of(data))
        assert "DataLoader" in caught.value.remedy

    def test_a_loader_that_is_its_own_iterator_may_start_anew(self):
        class Loader:
            def __init__(self):
                self.batches, self.at = list(digits()), 0

            def __len__(self):
                return len(self.batches)

            def __iter__(self):
                self.at = 0
                return self

            def __next__(self):
                if self.at == len(self.batches):
                    raise StopIteration
                self.at += 1
                return self.batches[self.at - 1]

        loader = Loader()
        assert same(trained(SHORT, context_of(loader)), trained(SHORT, context_of(loader.batches)))

    def test_a_pass_without_batches(self):
        class Once:
            def __init__(self):
                self.batches = list(digits())

            def __len__(self):
                return 4

            def __iter__(self):
                batches, self.batches = self.batches, []
                return iter(batches)

        with raises_case(TaskError, "no-batch") as caught:
            trained(SHORT, context_of(Once()))
        assert caught.value.what.endswith(" epoch 1") and " 4 " in caught.value.got

    def test_a_stream_without_an_end_is_read_as_far_as_it_is_needed(self):
        class Stream:
            read = 0

            def __iter__(self):
                while True:
                    self.read += 1
                    yield from digits()

        stream = Stream()
        trained(replace(SHORT, steps=6), context_of(stream))
        assert stream.read == 2  # of 4 batches each

    def test_a_batch_that_fails_is_named_by_its_place(self):
        data = [*digits(), (torch.zeros(1, 1, 8, 8), torch.zeros(1).long())]

        class Features(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.norm = nn.Linear(64, 10), nn.BatchNorm1d(10)

            def forward(self, x):
                return self.norm(self.head(x.flatten(1)))

        with raises_case(TaskError, "network-raised") as caught:
            trained(SHORT, context_of(data), Features())
        assert caught.value.what.endswith("batch 4 of epoch 0")
        assert "drop_last=True" in caught.value.remedy

    @pytest.mark.parametrize("batch", [torch.zeros(2, 1, 8, 8), {"x": torch.zeros(2, 1, 8, 8)}])
    def test_without_labels_inputs_may_stand_alone(self, batch):
        network, source = net(), net(1).eval()
        trained(replace(SHORT, steps=1, task_loss_weight=0.0), context_of([batch], loss=None, source=source), network)
        assert not same(network, net())

    @pytest.mark.parametrize("batch", [torch.zeros(2, 1, 8, 8), (torch.zeros(2, 1, 8, 8),), {"x": torch.zeros(2)}])
    def test_batches_that_are_no_pairs(self, batch):
        with raises_case(TaskError, "not-a-pair"):
            trained(SHORT, context_of([batch]))

    @pytest.mark.parametrize(
        "setting",
        [
            {"epochs": 0},
            {"epochs": float("nan")},
            {"epochs": float("inf")},
            {"minutes": 0},
            {"learning_rate": -1},
            {"clip": 1.0},
            {"weight_decay": -0.1},
            {"warmup": 2},
            {"optimizer": "adam"},
            {"autocast": True},
            {"save_every_s": 0},
            {"losses": ("os.system",)},
            {"hooks": (lambda moment: None, 3)},
        ],
    )
    def test_settings_that_make_no_sense(self, setting):
        with raises_setting(next(iter(setting))) as caught:
            Finetune(**setting)
        assert caught.value.expected is not None


def test_the_same_settings_are_equal_values():
    assert Finetune(epochs=2) == Finetune(epochs=2)
    assert copy.deepcopy(SHORT) == SHORT
