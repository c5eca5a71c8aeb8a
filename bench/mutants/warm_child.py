"""Runs pytest in forks of a Python that has imported the slow libraries already.

It is a separate program: it must not import the project, because each fork imports the copy with
its fault. It reads one JSON request per line and answers each with one line; see warm.py.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

DATA_BYTES = 10 << 30
"""Limit, so that a faulty loop does not take the machine's memory."""

_PR_SET_PDEATHSIG = 1


def main(libraries: list[str]) -> None:
    sys.path.pop(0)  # this file's folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps libraries' output apart from answers
    for library in libraries:
        with suppress(ImportError):
            importlib.import_module(library)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(request)
    code = _wait(child, request["limit_s"])
    return {"code": code, "seconds": round(time.monotonic() - start, 2)}


def _wait(child: int, limit_s: float) -> int | None:
    """Return the exit status, or None after `limit_s`. Ends the child's whole process group."""
    ended = os.pidfd_open(child)
    in_time = bool(select.select([ended], [], [], limit_s)[0])
    os.close(ended)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if in_time else None


def _run(request: dict[str, Any]) -> None:
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end together with the parent
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        if request["cpu_s"] is not None:
            seconds = math.ceil(request["cpu_s"])
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in ((0, nothing), (1, output), (2, output)):
            os.dup2(descriptor, number)
        os.environ.update(request["environment"])
        code = _covered(request) if request["coverage"] else _tested(request)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _tested(request: dict[str, Any]) -> int:
    import pytest

    return int(pytest.main(request["arguments"]))


def _covered(request: dict[str, Any]) -> int:
    import coverage

    recorder = coverage.Coverage(config_file=request["coverage"])
    recorder.start()
    try:
        return _tested(request)
    finally:
        recorder.stop()
        recorder.save()


if __name__ == "__main__":
    main(sys.argv[1:])
