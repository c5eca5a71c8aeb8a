"""Small C libraries that replace system calls of a child process (LD_PRELOAD), to refuse advice or
threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]

REFUSED_THREADS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
static int left = -1;
void refuse_threads_after(int n) { left = n; }
int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!real) real = dlsym(RTLD_NEXT, "pthread_create");
    if (left == 0) return EAGAIN;
    if (left > 0) --left;
    return real(thread, how, run, with);
}
"""
"""Refuses threads like a pids limit, from the call of `refuse_threads_after` on."""

REFUSED_ADVICE = r"""
#include <errno.h>
#include <stddef.h>
#include <sys/types.h>
int madvise(void *at, size_t size, int advice) { errno = EINVAL; return -1; }
int posix_fadvise(int fd, off_t start, off_t size, int advice) { return ENOSYS; }
int posix_fadvise64(int fd, off_t start, off_t size, int advice) { return ENOSYS; }
int setpriority(int which, unsigned who, int priority) { errno = EPERM; return -1; }
int getpriority(int which, unsigned who) { errno = EPERM; return -1; }
"""


def build(source: str, folder: Path) -> Path:
    """Compile a shim; skips the test without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine: a system that refuses was not tried")
    place = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(place), "-ldl"]
    subprocess.run(command, input=source, text=True, check=True)
    return place


def run_child(script: str, *args: object, shim: Path | None = None) -> Done:
    """Run a Python script under a shim; a child that hangs fails the test."""
    preloaded = {} if shim is None else {"LD_PRELOAD": str(shim)}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env={**os.environ, **preloaded},
        capture_output=True,
        text=True,
        timeout=120,
    )
