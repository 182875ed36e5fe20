"""An artifact measured on a device, and its figures in the record: the device here is a Python without Penjing."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from penjing import records, runtimes
from penjing.errors import OutputError, RecordError
from penjing.measure import meters
from penjing.measure.decibels import IDENTICAL_DB
from penjing.pipeline.device import _packages, _script, add_device, write_bench
from penjing.pipeline.verify import verify
from penjing.records.device import read_bench
from penjing.records.manifest import Manifest
from penjing.runtimes import on_device
from tests.raises import raises_case


@pytest.fixture(scope="module")
def measured(digits_run, tmp_path_factory):
    """The folder for the device, and what `bench.py` printed and wrote there."""
    folder = write_bench(digits_run.folder, tmp_path_factory.mktemp("device") / "bench")
    result, done = _bench(folder)
    assert done.returncode == 0, done.stderr
    return folder, result


def _bench(folder):
    path = folder.parent / "bench.json"
    path.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", _ALONE, str(folder / "bench.py"), "--seconds", "0.02", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return path if path.exists() else None, done


_ALONE = f"""
import runpy, sys
sys.path += {[p for p in sys.path if "site-packages" in p]}
sys.modules["penjing"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_measures_without_penjing(measured, digits_run):
    folder, path = measured
    run = read_bench(path)
    chosen = digits_run.record.chosen
    assert run.sha256 == chosen.sha256 and run.runtime == chosen.runtime
    assert run.latency_ms.median > 0 and len(run.latency_ms.rounds) == on_device.ROUNDS
    assert run.holds and run.parity[0].snr_db == pytest.approx(chosen.parity[0].snr_db, abs=1e-3)
    assert "onnxruntime_perf_test" in (folder / "COMMANDS.md").read_text(encoding="utf-8")


def test_without_numpy_it_says_what_to_install(measured):
    command = [sys.executable, "-S", "-I", str(measured[0] / "bench.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install numpy onnxruntime" in done.stderr


def test_the_figures_go_into_record_and_report(measured, digits_copy):
    record = add_device(digits_copy, measured[1])
    assert records.read(digits_copy).devices == record.devices and len(record.devices) == 1
    assert "On devices" in (digits_copy / "report.html").read_text(encoding="utf-8")
    assert len(add_device(digits_copy, measured[1]).devices) == 1  # the same device again
    held = {check.figure: check.holds for check in verify(digits_copy, seconds=0)}
    assert held["SHA-256 of the files"]


def test_figures_of_another_artifact_are_refused(measured, digits_copy, tmp_path):
    data = json.loads(measured[1].read_text(encoding="utf-8"))
    other = tmp_path / "other.json"
    before = (digits_copy / "record.json").read_bytes()
    for change in ({"sha256": dict.fromkeys(data["sha256"], "0" * 64)}, {"runtime": "ncnn"}, {"precision": "int4"}):
        other.write_text(json.dumps(data | change), encoding="utf-8")
        with raises_case(RecordError, "another"):
            add_device(digits_copy, other)
    assert (digits_copy / "record.json").read_bytes() == before


def test_words_of_a_device_are_text_in_the_report(measured, digits_copy, tmp_path):
    data = json.loads(measured[1].read_text(encoding="utf-8"))
    data["device"]["processor"] = "<script>alert(1)</script>\x1b[31m"
    (tmp_path / "bench.json").write_text(json.dumps(data), encoding="utf-8")
    add_device(digits_copy, tmp_path / "bench.json")
    page = (digits_copy / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data.pop("latency_ms"), "no-field"),
        (lambda data: data["latency_ms"].update(median=-1), "value"),
        (lambda data: data.update(format=2), "newer"),
        (lambda data: data.update(parity=[]), "incomplete"),
        (lambda data: data["device"].update(threads="many"), "type"),
        (lambda data: data.update(energy_mj="much"), "type"),
        (lambda data: data.update(energy_mj=-1.0), "value"),
        (lambda data: data.update(load_ms=-1.0), "value"),
        (lambda data: data["latency_ms"].update(rounds=[-1.0]), "value"),
        (lambda data: data["latency_ms"].update(median=0.0), "value"),
        (lambda data: data["latency_ms"].update(p95=0.0), "value"),
        (lambda data: data["parity"][0].update(holds=False), "value"),
        (lambda data: data["parity"][0].update(snr_db=-300.0), "value"),
        (lambda data: data["parity"][0].update(limit_db=None), "value"),
        (lambda data: data["device"].update(processor="x" * 2000), "value"),
    ],
)
def test_damaged_figures_are_refused(measured, tmp_path, change, code):
    data = json.loads(measured[1].read_text(encoding="utf-8"))
    change(data)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with raises_case(RecordError, code):
        read_bench(path)


def test_text_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "bench.json").write_text("{", encoding="utf-8")
    with raises_case(RecordError, "unreadable"):
        read_bench(tmp_path / "bench.json")


def test_a_changed_file_is_not_opened(measured, tmp_path):
    folder = shutil.copytree(measured[0], tmp_path / "bench")
    model = next(folder.glob("model.*"))
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    path, done = _bench(folder)
    assert path is None and done.returncode == 1
    assert f"{model.name} is not the file that was written" in done.stderr


def test_answers_that_are_too_far_away_end_with_3(measured, tmp_path):
    folder = shutil.copytree(measured[0], tmp_path / "bench")
    script = folder / "bench.py"
    limit = '"snr_db": 30'
    text = script.read_text(encoding="utf-8")
    assert limit in text
    script.write_text(text.replace(limit, '"snr_db": 230'), encoding="utf-8")
    path, done = _bench(folder)
    assert done.returncode == 3 and not read_bench(path).holds


def test_an_artifact_without_a_run_is_compared_with_its_own_answers(digits_run, tmp_path):
    folder = write_bench(digits_run.folder / "artifact", tmp_path / "bench", threads=1)
    path, done = _bench(folder)
    assert done.returncode == 0, done.stderr
    (row,) = read_bench(path).parity
    assert row.largest == 0.0 and row.snr_db == IDENTICAL_DB


def test_a_folder_with_other_files_stays(digits_run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with raises_case(OutputError, "foreign"):
        write_bench(digits_run.folder, tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    out = write_bench(digits_run.folder, tmp_path / "bench")
    with raises_case(OutputError, "foreign"):
        write_bench(digits_run.folder, out)
    assert write_bench(digits_run.folder, out, force=True) == out
    (out / "bench.json").write_text("measured", encoding="utf-8")
    with raises_case(OutputError, "foreign") as refusal:  # --force does not take what the device measured
        write_bench(digits_run.folder, out, force=True)
    assert "bench.json" in refusal.value.got and (out / "bench.json").exists()


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n", encoding="ascii")


@pytest.mark.parametrize("wrong", [("--threads", "0"), ("--threads", "-1"), ("--seconds", "nan"), ("--seconds", "inf")])
def test_what_can_not_be_timed_is_said_before_anything_is_opened(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        on_device.main({"threads": 1}, tmp_path, lambda: None, wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_energy_of_a_counter_and_of_a_sensor(tmp_path):
    zone = tmp_path / "rapl/class/powercap/intel-rapl:0/energy_uj"
    _write(zone, 1000)
    name, read = meters.power_meter(tmp_path / "rapl")
    with meters.metered((name, read)) as energy:
        _write(zone, 6000)
    assert name.startswith("RAPL") and energy["mj"] == 5.0
    with meters.metered((name, read)) as energy:
        _write(zone, 10)  # it began again
    assert energy == {}

    chip = tmp_path / "ina/class/hwmon/hwmon1"
    for file, value in (("name", "ina3221"), ("in1_label", "VDD_IN"), ("in1_input", 5000), ("curr1_input", 400)):
        _write(chip / file, value)
    name, read = meters.power_meter(tmp_path / "ina")
    assert "VDD_IN" in name and read() == pytest.approx(2.0)
    with meters.metered((name, read)) as energy:
        start = time.perf_counter()
        time.sleep(4 * meters.SAMPLING_S)
        seconds = time.perf_counter() - start
    assert energy["mj"] == pytest.approx(2e3 * seconds, rel=0.2)

    supply = tmp_path / "battery/class/power_supply/BAT0"
    for file, value in (("status", "Discharging"), ("current_now", -500_000), ("voltage_now", 4_000_000)):
        _write(supply / file, value)
    name, read = meters.power_meter(tmp_path / "battery")
    assert name.startswith("battery") and read() == pytest.approx(2.0)
    _write(supply / "status", "Charging")
    assert meters.power_meter(tmp_path / "battery") is None


def test_integer_outputs_and_nan_are_judged():
    limits = [{"output": "y", "snr_db": 30.0, "equal": 0.9}]
    (row,) = on_device.parity([np.array([1, 2, 3, 4])], [np.array([1, 2, 3, 5])], limits)
    assert row["equal"] == 0.75 and not row["holds"] and row["limit_db"] is None
    (row,) = on_device.parity([np.array([1.0, np.nan])], [np.array([1.0, 2.0])], limits)
    assert not row["holds"]
    (row,) = on_device.parity([np.array([1.0, np.nan])], [np.array([1.0, np.nan])], limits)
    assert row["holds"]


@pytest.mark.parametrize("name", [name for name in runtimes.SPECS if runtimes.installed(name)])
def test_the_script_of_every_runtime_is_python(name):
    manifest = Manifest(runtime=name, precision="fp32", programs=(), structure={"kind": "tensor"})
    text = _script(manifest, {"threads": 2, "packages": _packages(name)})
    tree = ast.parse(text, feature_version=(3, 9))
    newer = {"UTC", "pairwise", "batched"}  # of the standard library, since 3.10 and later
    assert not newer & {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not any(word.arg == "strict" for word in ast.walk(tree) if isinstance(word, ast.keyword))
    assert "def run(inputs)" in text and "@" not in text.partition("def open_artifact")[2].partition("FACTS")[0]
    assert _packages(name) or runtimes.SPECS[name].levels  # a library needs nothing
