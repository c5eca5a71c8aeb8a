"""Refused memory advice changes nothing; a refused thread is an error."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading

import pytest

from deeptalk_edge import host
from deeptalk_edge.errors import BackendError


def test_the_peak_of_memory_is_that_of_this_process() -> None:
    code = "from deeptalk_edge.host import peak_resident_mb; print(peak_resident_mb())"
    held = bytearray(b"x" * 200_000_000)
    own = host.peak_resident_mb()
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert own is not None
    assert own > len(held) / 1e6 > float(child.stdout) > 1


class Stubborn(mmap.mmap):
    """Memory whose kernel refuses advice."""

    def madvise(self, *advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_refused_advice_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in ("posix_fadvise", "getpriority", "setpriority"):
        monkeypatch.setattr(os, name, refuse)
    with Stubborn(-1, 4096) as memory:
        memory[:4] = b"kept"
        host.ask_for_huge_pages(memory)
        host.give_memory_back(memory, 0, 4096)
        assert memory[:4] == b"kept"
    host.drop_from_page_cache(0, 0, 4096)
    host.yield_to_other_threads(5)


def test_the_error_for_a_refused_thread_says_what_to_do() -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with pytest.raises(BackendError, match=r"the thread reader .*TasksMax"):
        host.start_thread(Refused(name="reader"))
