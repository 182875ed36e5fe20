"""Energy: the model against a hand computation, and meters that are folders and libraries of the tests' own."""

import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from penjing.measure import Target, energy, meters
from penjing.records import LayerRow

CONV = LayerRow(name="conv", kind="conv", parameters=72, macs=4608, activation_bytes=2048, weight_bytes=288)
RELU = LayerRow(name="relu", kind="relu", activation_bytes=2048)
TABLE = LayerRow(name="table", kind="embedding", parameters=10**6, activation_bytes=64, weight_bytes=4 * 10**6)


def _as(row, executed, **changes):
    return LayerRow(**{**vars(row), "planned": executed or row.planned, "executed": executed, **changes})


def test_floats_cost_what_the_constants_say():
    expected = 4608 * (3.7 + 0.9) + 288 * 1300 / 8 + 2 * 2048 * 100 / 8  # operations, weights, values
    assert energy.modelled([CONV]).value == pytest.approx(expected / 1e9)
    assert energy.modelled([CONV]).method == "model"


def test_integers_cost_what_the_constants_say():
    rows = [_as(CONV, "int8", weight_bytes=72, stored="int8")]
    expected = 4608 * (0.2 + 0.1) + 72 * 1300 / 8 + 2 * 512 * 100 / 8
    assert energy.modelled(rows).value == pytest.approx(expected / 1e9)


def test_weights_are_read_once_for_a_whole_batch():
    one, eight = energy.modelled([CONV]).value, energy.modelled([CONV], 8).value
    assert eight == pytest.approx(8 * one - 7 * 288 * 1300 / 8 / 1e9)


def test_what_a_runtime_fused_moves_nothing():
    alone = energy.modelled([_as(CONV, "fp32")])
    assert energy.modelled([_as(CONV, "fp32"), _as(RELU, None)]) == alone
    assert energy.modelled([CONV, RELU]).value > energy.modelled([CONV]).value  # eager torch computes it apart


def test_of_a_table_the_rows_that_are_looked_up_are_read():
    assert energy.modelled([TABLE]).value == pytest.approx((64 * 1300 / 8 + 2 * 64 * 100 / 8) / 1e9)


def test_values_beyond_the_cache_come_from_memory():
    large = _as(RELU, "fp32", activation_bytes=2**21)
    assert energy.modelled([large]).value == pytest.approx(2 * 2**21 * 1300 / 8 / 1e9)


@pytest.fixture
def machine(tmp_path):
    """A machine that takes 1 W at rest, which its second package counts; the first counts what calls add."""
    zones = tmp_path / "sys/class/powercap"
    for place in (0, 1):
        (zones / f"intel-rapl:{place}").mkdir(parents=True)
        (zones / f"intel-rapl:{place}/energy_uj").write_text("1000")
    over, start = threading.Event(), time.perf_counter()

    def rest():
        counter, aside = zones / "intel-rapl:1/energy_uj", zones / "aside"
        while not over.wait(0.001):
            aside.write_text(str(1000 + int(1e6 * (time.perf_counter() - start))))
            aside.replace(counter)

    thread = threading.Thread(target=rest)
    thread.start()
    yield tmp_path
    over.set()
    thread.join()


def test_idle_power_is_subtracted_from_what_calls_take(machine):
    meter = meters.power_meter(machine / "sys")
    assert meter is not None
    (machine / "artifact").mkdir()
    target = Target("artifact", machine / "artifact", [np.zeros(1, dtype=np.float32)], 1)
    opener = "tests.measure.tiny_openers:spends"
    measured = energy.measured([target], meter, threads=1, seconds=1.0, rounds=4, opener=opener)["artifact"]
    # A call adds 2 mJ, and the machine takes 5 mJ or more in its time.
    assert measured.value == pytest.approx(2.0, rel=0.3)
    assert measured.method == "measured" and "idle power subtracted" in measured.source
    assert measured.spread is not None


def test_what_takes_no_more_than_rest_has_no_energy(tmp_path):
    (tmp_path / "artifact").mkdir()
    np.save(tmp_path / "artifact/matrix.npy", np.zeros((1, 1), dtype=np.float32))
    (tmp_path / "class/powercap/intel-rapl:0").mkdir(parents=True)
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").write_text("1000")
    meter = meters.power_meter(tmp_path)
    target = Target("artifact", tmp_path / "artifact", [np.zeros((1, 1), dtype=np.float32)], 1)
    opener = "tests.measure.tiny_openers:matmul"
    assert energy.measured([target], meter, threads=1, seconds=0.1, rounds=2, opener=opener) == {}


def test_a_counter_that_tells_its_range_goes_on_at_its_end(tmp_path):
    zone = tmp_path / "class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "max_energy_range_uj").write_text("10000")
    (zone / "energy_uj").write_text("9000")
    meter = meters.power_meter(tmp_path)
    with meters.metered(meter) as spent:
        (zone / "energy_uj").write_text("500")
    assert spent["mj"] == 1.5


LIBRARY = """
static unsigned long long spent = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &spent; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
  return device == &spent ? (*mj = spent += 7, 0) : 2;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_gpu_is_read_through_its_library(tmp_path):
    (tmp_path / "nvml.c").write_text(LIBRARY, encoding="utf-8")
    path = tmp_path / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, tmp_path / "nvml.c"], check=True)
    meter = meters.gpu_meter(str(path))
    assert meter is not None and meter[0].startswith("NVML")
    with meters.metered(meter) as spent:
        pass
    assert spent["mj"] == 7.0
    assert meters.gpu_meter(str(tmp_path / "none.so")) is None
