"""Energy in a run: modelled where the machine has no meter, and then said; metered side by side where it has one."""

import contextlib
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import penjing as pj
from penjing import measure
from penjing.pipeline import energies
from penjing.pipeline.comparison import measure_artifact
from penjing.pipeline.run import Run
from penjing.records.events import Events
from penjing.records.folder import SOURCE, RunFolder
from penjing.report import table


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)).eval()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    task = pj.Task(example=torch.zeros(1, 3, 8, 8), calibration=[torch.randn(16, 3, 8, 8)])
    out = tmp_path_factory.mktemp("energy") / "run"
    goal = "minimize energy_mj, drop<=50%"
    return pj.compress(_network(), task, goal, runtime="onnxruntime", out=out, seconds=0.05, threads=1)


def test_a_goal_on_energy_is_met_and_says_that_it_is_modelled(result):
    rows = {c.precision: c.measured.energy_mj for c in result.record.candidates}
    assert result.met and result.record.chosen.precision == "int8"
    assert rows["int8"].value < 0.5 * rows["fp32"].value <= result.record.source.energy_mj.value
    if energies.meter_of("onnxruntime") is None:
        assert "energy is modelled, not measured" in result.record.goal.reason
        assert any("no meter" in text for text in result.record.warnings)
        page = (result.folder / "report.html").read_text(encoding="utf-8")
        assert "Energy a call <small>modelled</small>" in page


def test_measuring_a_run_tells_its_energy(result):
    rows = measure_artifact(result.folder, seconds=0.05, threads=1)
    assert rows["artifact"].energy_mj.value < rows["source"].energy_mj.value
    assert [str(cell) for cell in table.measurements(rows).columns[0].cells][-1] == "  known by"


def test_a_run_is_metered_where_there_is_a_meter(result, tmp_path, monkeypatch):
    """The meter follows the work of the processes that this one started: 10 W for each that computes, 0.1 W at rest."""
    counter = tmp_path / "class/powercap/intel-rapl:0/energy_uj"
    counter.parent.mkdir(parents=True)
    counter.write_text("1000")
    over, start = threading.Event(), time.perf_counter()

    def count():
        aside, ended = tmp_path / "aside", {}
        while not over.wait(0.005):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    ended[child.pid] = sum(child.cpu_times()[:2])
            aside.write_text(str(1000 + int(1e7 * sum(ended.values()) + 1e5 * (time.perf_counter() - start))))
            aside.replace(counter)

    monkeypatch.setattr(energies, "LEAST_S", 1.0)
    chosen, inputs = result.record.chosen, [np.zeros((1, 3, 8, 8), dtype=np.float32)]
    targets = [measure.Target("source", result.folder / SOURCE, inputs, 1)]
    targets += [measure.Target(chosen.name, result.folder / chosen.folder, inputs, 1)]
    folder = RunFolder(tmp_path / "run", resume=False, force=False)
    folder.claim({"of": "this test"}, None)
    about = {"seed": 0, "device": "cpu", "threads": 1, "batch": 1, "seconds": 0.1, "instruction_sets": ()}
    task = pj.Task(example=torch.zeros(1, 3, 8, 8))
    run = Run(network=torch.fx.symbolic_trace(_network()), task=task, folder=folder, events=Events(), **about)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        spent = energies.metered(run, [chosen], targets, sysfs=tmp_path)
    finally:
        over.set()
        thread.join()
    assert spent["source"].value > spent[chosen.name].value > 0 and spent["source"].method == "measured"
    assert energies.metered(run, [chosen], targets, sysfs=tmp_path / "elsewhere") == spent  # as a resume reads it
    assert not run.warnings
