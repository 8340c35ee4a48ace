"""memory.py: what a process has freed goes back to the system."""

import ctypes
import pathlib

import pytest

from rlhf_jax.training.memory import peak_memory_gib, release_memory

STATUS = pathlib.Path("/proc/self/status")


def resident_mib():
    return next(int(line.split()[1]) / 2**10 for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))


@pytest.mark.skipif(
    not STATUS.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library cannot trim"
)
def test_freed_memory_goes_back():
    small = [bytes(1000) for _ in range(100_000)]  # too small to be given back one by one
    last = small[-1]  # keeps the heap from shrinking
    full = resident_mib()
    del small
    release_memory()
    assert resident_mib() < full - 60
    assert len(last) == 1000
    assert peak_memory_gib() * 2**10 > full - 1


def test_nothing_happens_where_the_c_library_cannot_trim(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    release_memory()
