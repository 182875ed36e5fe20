"""Freed memory is used again inside the block, and returns to the system behind it."""

import platform
import sys

import pytest
import torch

from penjing.allocator import reused_memory
from penjing.tasks.undisturbed import same_process

BYTES, TIMES = 1 << 26, 20
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")


def page_faults():
    """How often the system gives a page to `TIMES` tensors that live one after the other."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
@pytest.mark.parametrize("block", [reused_memory, same_process])
def test_a_tensor_takes_the_pages_of_the_one_before_it(block):
    with block():
        page_faults()  # the first has to be given them
        inside = page_faults()
    outside = page_faults()
    assert inside < outside / 2  # a small block may lie in the way of one or another


@glibc
def test_blocks_within_blocks_end_with_the_outermost():
    with reused_memory():
        with pytest.raises(ZeroDivisionError), reused_memory():
            raise ZeroDivisionError
        page_faults()
        inside = page_faults()
    assert inside < page_faults() / 2


@glibc
def test_memory_returns_to_the_system():
    import psutil

    process = psutil.Process()
    with reused_memory():
        torch.empty(BYTES, dtype=torch.uint8).fill_(1)
        largest = process.memory_info().rss
    assert process.memory_info().rss < largest - BYTES / 2


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(sys.modules["ctypes"], "CDLL", lambda name: pytest.fail("not asked for"))
    with reused_memory():
        assert torch.ones(3).sum() == 3
