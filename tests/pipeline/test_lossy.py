"""Packing with loss: the limit holds in the runtime, the file is smaller, and what can't be is said."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing import cli
from penjing.errors import OutputError, RecipeError, SharingError, TaskError, UsageError
from penjing.storage import packed
from tests.raises import raises_case, raises_setting

pytest.importorskip("numba")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)),
    ).eval()


def batches():
    return [torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def task(**more):
    return pj.Task(example=batches()[0], calibration=batches(), **more)


def pack(out, model=None, calibration=None, **more):
    return pj.pack_to(model or network(), calibration or batches(), out, threads=1, **more)


def in_onnxruntime(folder, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def decibels(folder):
    x = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = network()(x).numpy()
    noise = np.square(in_onnxruntime(folder, x.numpy()) - expected).sum()
    return 10 * np.log10(np.square(expected).sum() / noise)


def test_what_is_unpacked_keeps_the_limit_in_the_runtime_and_the_file_is_smaller(tmp_path):
    done = pack(tmp_path / "small.pj", snr_db=20)
    packed.unpack(tmp_path / "small.pj", tmp_path / "again")
    assert 18 < decibels(tmp_path / "again") < 32
    assert done.packed.size_bytes == (tmp_path / "small.pj").stat().st_size < 0.6 * done.lossless_bytes
    assert done.figures["snr_db"] >= done.limits["snr_db"] == 20
    assert not done.warnings
    assert "limit 20.0 dB" in "\n".join(done.lines())


def test_the_same_seed_gives_the_same_file(tmp_path):
    for name in ("a.pj", "b.pj"):
        pack(tmp_path / name, snr_db=20)
    assert (tmp_path / "a.pj").read_bytes() == (tmp_path / "b.pj").read_bytes()


def test_what_no_grid_holds_is_packed_without_loss(tmp_path):
    done = pack(tmp_path / "same.pj", snr_db=300)
    packed.unpack(tmp_path / "same.pj", tmp_path / "again")
    assert decibels(tmp_path / "again") > 100
    assert done.figures == {} and done.packed.size_bytes == done.lossless_bytes
    assert "snr_db=300" in done.warnings[0] and "without loss" in done.warnings[0]
    assert "without loss" in done.lines()[0]


def test_grids_that_save_nothing_are_not_taken(tmp_path):
    few = network()
    with torch.no_grad():
        for parameter in few.parameters():
            parameter.copy_(parameter.sign() / 8)  # a bit each, in any file
    done = pack(tmp_path / "few.pj", few, snr_db=60)
    assert done.figures == {} and done.packed.size_bytes == done.lossless_bytes
    assert "grids save nothing" in done.warnings[0]
    assert done.parity[1].snr_db > 100


def test_layers_that_are_kept_keep_their_weights(tmp_path):
    pack(tmp_path / "small.pj", snr_db=20, keep=("7",))
    names = {shape: name for name, _, shape, _ in packed.contents(tmp_path / "small.pj").tensors}
    assert np.array_equal(packed.read(tmp_path / "small.pj", names[64 * 5 * 4]), network()[7].weight.detach().numpy())


def test_a_drop_is_of_the_metric_of_select(tmp_path):
    with torch.no_grad():
        labels = network()(batches()[0]).argmax(1).numpy()

    def select(predict):
        return float((predict(batches()[0].numpy()).argmax(1) == labels).mean())

    done = pack(tmp_path / "small.pj", calibration=task(select=select), drop=0.07)
    assert 0 <= done.figures["drop"] <= 0.07
    assert done.packed.size_bytes < 0.6 * done.lossless_bytes


@pytest.mark.parametrize(
    ("settings", "kind", "code"),
    [
        ({}, RecipeError, "limits"),
        ({"drop": 0.1}, TaskError, "no-metric"),
        ({"snr_db": 20, "model": nn.ReLU().eval()}, SharingError, "nothing-to-share"),
        ({"agreement": 0.9, "model": nn.Sequential(nn.Flatten(), nn.Linear(300, 1)).eval()}, TaskError, "no-classes"),
    ],
)
def test_requests_that_make_no_sense_leave_no_file(tmp_path, settings, kind, code):
    with raises_case(kind, code):
        pack(tmp_path / "none.pj", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"snr_db": 0}, {"snr_db": -5}, {"agreement": 97}])
def test_limits_have_a_range(tmp_path, setting):
    with raises_setting(next(iter(setting))):
        pack(tmp_path / "none.pj", **setting)


def test_a_file_is_replaced_by_force_alone_and_that_is_said_before_anything_is_opened(tmp_path):
    (tmp_path / "old.pj").write_text("mine")
    with raises_case(OutputError, "exists"):
        pj.pack_to("no-such-network", "no-such-data", tmp_path / "old.pj", snr_db=20)
    assert (tmp_path / "old.pj").read_text() == "mine"
    assert pack(tmp_path / "old.pj", snr_db=20, force=True).packed.size_bytes > 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lossy")
    pj.compress(
        network(), task(), "minimize size_bytes", runtime="onnxruntime", out=folder / "run", seconds=0, threads=1
    )
    return folder / "run"


def test_an_artifact_in_fp32_is_a_source_and_one_in_integers_is_not(run, tmp_path):
    assert pack(tmp_path / "small.pj", run / "candidates" / "onnxruntime-fp32", snr_db=20).figures
    with raises_case(UsageError, "not-a-network") as refusal:
        pack(tmp_path / "none.pj", run / "candidates" / "onnxruntime-int8", snr_db=20)
    assert "int8" in refusal.value.got
    with raises_case(UsageError, "not-a-network") as refusal:
        pack(tmp_path / "none.pj", run, snr_db=20)
    assert str(run / "candidates" / "onnxruntime-fp32") in refusal.value.remedy
    with raises_case(UsageError, "not-a-network") as refusal:
        pack(tmp_path / "none.pj", tmp_path / "small.pj", snr_db=20)
    assert refusal.value.remedy.startswith("penjing unpack")


FILE = """
import torch
from tests.pipeline.test_lossy import batches, network
"""


def command(tmp_path, *options):
    (tmp_path / "net.py").write_text(FILE)
    return cli.main(["pack", f"{tmp_path}/net.py:network", "-o", str(tmp_path / "small.pj"), *options])


def test_the_command_writes_the_file_and_tells_of_it(tmp_path, capsys):
    data = ("--calibration", f"{tmp_path}/net.py:batches", "--threads", "1")
    assert command(tmp_path, "--noise", "20dB", "--agreement", "90%", *data, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["limits"] == {"snr_db": 20, "agreement": 0.9} and told["figures"]["snr_db"] >= 20
    assert told["packed"]["size_bytes"] == (tmp_path / "small.pj").stat().st_size < told["packed"]["unpacked_bytes"]
    assert command(tmp_path, "--noise", "300", *data, "--force", "--picture", str(tmp_path / "p.svg")) == 0
    printed = capsys.readouterr()
    assert "without loss" in printed.out and "no grid holds" in printed.err and (tmp_path / "p.svg").is_file()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--noise", "20"), "no-calibration"),
        (("--calibration", "data.npy"), "no-limit"),
        (("--keep", "7"), "no-limit"),
        (("--noise", "20", "--checkpoint", "--calibration", "data.npy"), "contradiction"),
        (("--agreement", "97", "--calibration", "CALIBRATION"), "settings"),
    ],
)
def test_options_that_say_nothing_together_are_refused(tmp_path, capsys, options, code):
    options = [f"{tmp_path}/net.py:batches" if text == "CALIBRATION" else text for text in options]
    assert command(tmp_path, *options, "--json") == 2
    assert json.loads(capsys.readouterr().out)["code"] == code


@pytest.mark.parametrize(
    "options", [("--noise", "loud"), ("--noise", "0"), ("--noise", "nan"), ("--drop=-1",), ("--drop", "some")]
)
def test_values_that_are_no_limits_are_usage_errors(tmp_path, options):
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path, *options, "--calibration", "data.npy")
    assert stopped.value.code == 2
