import sys

import numpy as np
import pytest

from penjing.measure.memory import _high_water, peak_memory_bytes, reset_peak, rss_bytes

SIZE = 64 << 20


def test_resident_memory_follows_what_is_held():
    before = rss_bytes()
    held = np.ones(SIZE, np.uint8)
    assert rss_bytes() - before >= 0.9 * held.nbytes
    assert peak_memory_bytes() >= rss_bytes() - (8 << 20)


def test_peak_remembers_what_was_let_go():
    held = np.ones(SIZE, np.uint8)
    full = rss_bytes()
    del held
    assert peak_memory_bytes() >= 0.98 * full


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")
def test_peak_begins_again_after_a_reset():
    held = np.ones(4 * SIZE, np.uint8)
    high = peak_memory_bytes()
    del held
    if not reset_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    assert peak_memory_bytes() <= high - 2 * SIZE


def test_kernel_text():
    assert _high_water("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    2200 kB\nVmRSS:\t 1 kB\n") == 2200 * 1024
    assert _high_water("Name:\tx\nVmRSS:\t 1 kB\n") is None
