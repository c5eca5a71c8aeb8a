"""The kernels' threads: fewer if the system refuses some, and their exceptions are rethrown."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import UsageError
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary
from native.cpu.build import SOURCES

# The program's pthread_create replaces the system's.
PROGRAM = r"""
#include <dlfcn.h>
#include <pthread.h>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <stdexcept>
#include "pool.h"

static int left = 1000;
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*),
                              void* with) {
    using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    static const auto real = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
    return left-- > 0 ? real(thread, how, run, with) : EAGAIN;
}

int main() {
    for (int given = 0; given <= 3; ++given) {
        left = given;
        deeptalk::Pool pool(4);
        for (int round = 0; round < 50; ++round) {
            std::atomic<int> sum{0};
            pool.run(1000, [&](int chunk) { sum += chunk; });
            if (sum != 499500) return 1;
            try {
                pool.run(1000, [](int chunk) {
                    if (chunk % 7 == 3) throw std::runtime_error("chunk");
                });
                return 2;
            } catch (const std::runtime_error&) {
            }
        }
        std::printf("%d ", pool.threads());
    }
}
"""


def test_a_pool_works_with_the_threads_that_it_gets_and_rethrows_a_chunks_exception(
    tmp_path: Path,
) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine: the pool was not checked")
    source, program = tmp_path / "pool_check.cpp", tmp_path / "pool_check"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", f"-I{SOURCES}", str(source), f"{SOURCES}/pool.cpp"]
    subprocess.run([*command, "-o", str(program), "-pthread", "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1 2 3 4 "), done.stderr


def test_fewer_threads_give_one_warning(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native_library._say_fewer_threads.cache_clear()
    monkeypatch.setattr(library.calls, "dt_threads", lambda handle: 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            CpuContext(library, threads=4).close()
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "the system refuses threads: 2 of 4 compute"
    ]


def test_a_closed_context_refuses_every_call(library: CpuLibrary) -> None:
    context = CpuContext(library)
    context.close()
    context.close()
    x, byte = np.zeros((1, 128), np.float32), np.zeros(1 << 16, np.uint8)
    uses: list[Callable[[], object]] = [
        lambda: context.snake(x, np.ones(1, np.float32)),
        lambda: context.read(byte),
        lambda: context.call(context.calls.dt_threads, context.handle),
        lambda: context.run("head", context.calls.dt_head, None, None),
        lambda: context.open(context.calls.dt_codec_open, context.calls.dt_codec_close, None),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="the native context is closed"):
            use()
