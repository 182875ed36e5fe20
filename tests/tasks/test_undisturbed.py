"""What belongs to the user stays as it was."""

import subprocess
import sys
import warnings
from collections import deque

import pytest
import torch
from torch import nn

from penjing.tasks.undisturbed import same_process, same_state


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(4)
        self.count, self.kept, self.named, self.recent = 0, [1], {"a": 1}, deque([1])
        self.plain = torch.zeros(4)  # a tensor that is not a buffer
        self.register_buffer("none", None)


def test_a_module_is_put_back_whatever_it_holds():
    cell = Cell()
    plain, kept = cell.plain, cell.kept
    with same_state(cell) as state:
        assert state.changed() == []
        cell.count += 1
        cell.kept.append(2)
        cell.named["b"] = 2
        cell.recent.append(2)
        cell.plain += 1
        cell.new = 3
        cell.none = torch.ones(1)
        cell.inner.running_mean = cell.inner.running_mean + 1
        cell.inner.num_batches_tracked += 1
        with torch.no_grad():
            cell.inner.weight.mul_(2)
        assert sorted(state.changed()) == sorted(
            ["count", "kept", "named", "recent", "plain", "new", "none"]
            + ["inner.running_mean", "inner.num_batches_tracked", "inner.weight"]
        )
    assert (cell.count, cell.kept, cell.named, cell.recent) == (0, [1], {"a": 1}, deque([1]))
    assert cell.plain is plain and cell.kept is kept and not cell.plain.any()
    assert not hasattr(cell, "new") and cell.none is None
    assert not cell.inner.running_mean.any() and cell.inner.num_batches_tracked == 0


def test_a_module_is_put_back_after_an_error():
    cell = Cell()
    with pytest.raises(ZeroDivisionError), same_state(cell):
        cell.count = 5
        raise ZeroDivisionError
    assert cell.count == 0


def test_what_the_first_forward_makes_stays():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with same_state(lazy):
        lazy(torch.randn(3, 5))
    assert lazy.eval()(torch.randn(3, 5)).shape == (3, 4)


def test_the_settings_of_the_process_are_put_back_after_an_error():
    threads, filters, numbers = torch.get_num_threads(), list(warnings.filters), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), same_process():
        torch.set_num_threads(threads + 1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.rand(3)
        warnings.simplefilter("ignore")
        raise ZeroDivisionError
    assert (torch.get_num_threads(), list(warnings.filters)) == (threads, filters)
    assert torch.equal(numbers, torch.get_rng_state())
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


SCRIPT = """
import random, sys, warnings
import numpy as np
import torch
import penjing as pj

def now():
    return (torch.get_num_threads(), list(warnings.filters), torch.get_rng_state().tolist(),
            str(np.random.get_state()), random.getstate(), torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled())

network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
batches = [torch.randn(8, 4) for _ in range(3)]
task = pj.Task(example=torch.zeros(1, 4), calibration=batches)
bad = pj.Task(example=torch.zeros(1, 4), calibration=batches, evaluate=lambda predict: 1 / 0)
before = now()
pj.apply(pj.Recipe(pj.quantize.Static()), network, task)
assert now() == before, "apply"
settings = dict(seconds=0.01, threads=torch.get_num_threads() + 1, runtime="onnxruntime")
pj.compress(network, task, "minimize size_bytes", out=sys.argv[1] + "/a", **settings)
assert now() == before, "compress"
try:
    pj.compress(network, bad, "minimize size_bytes", out=sys.argv[1] + "/b", **settings)
except pj.PenjingError:
    assert now() == before, "after an error"
else:
    raise AssertionError("no error")
"""


def test_compress_and_apply_leave_threads_generators_and_filters_as_they_were(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


class Recording(nn.Module):
    """It installs a hook in its first forward, and remembers that by a flag, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.installed = False
        self.seen = []

    def forward(self, x):
        if not self.installed:
            self.fc.register_forward_hook(lambda module, args, output: self.seen.append(output))
            self.installed = True
        self.seen = []
        return self.fc(x), len(self.seen)


def test_hooks_that_a_forward_installs_go_with_their_flag():
    module = Recording()
    own = module.fc.register_forward_pre_hook(lambda module, args: None)
    for _ in range(3):
        with same_state(module):
            module(torch.zeros(1, 2))
        assert not module.installed and not module.fc._forward_hooks
        assert list(module.fc._forward_pre_hooks) == [own.id]
    module(torch.zeros(1, 2))
    assert len(module.seen) == 1
