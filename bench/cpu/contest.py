"""Contenders in separate processes, called in turn, so that other load on the machine affects all.

Separate processes keep thread pools and libraries of equal names apart, and separate memory and CPU
time. Each sleeps while another one works.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deeptalk_edge.errors import BackendError

Call = tuple[Any, ...]
"""The name of a contender's method, then its arguments."""

Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Times of a call."""

    wall_s: float
    cpu_s: float
    """CPU time of all threads of the contender's process."""


class Memory(NamedTuple):
    """Memory of a contender's process."""

    resident_bytes: int
    huge_share: float
    """Part of its anonymous memory that is on huge pages."""


class Contender:
    """An object in a separate process, and the pipe to it."""

    def __init__(self, name: str, opens: Callable[[], object], log: Path) -> None:
        """`opens`, which must be picklable, is called in the process. Output of the process goes to
        `log`.

        Raises BackendError if it fails.
        """
        self.name, self._log = name, log
        context = multiprocessing.get_context("spawn")  # a fork would inherit our threads' locks
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, opens, log), daemon=True)
        self._process.start()
        far.close()
        self._receive()

    def call(self, call: Call) -> Timing:
        """Call a method in the process.

        Raises BackendError with its traceback if it fails.
        """
        self._pipe.send(call)
        timing: Timing = self._receive()
        return timing

    def memory(self) -> Memory:
        self._pipe.send(())
        memory: Memory = self._receive()
        return memory

    def close(self) -> None:
        """End the process; its memory has been freed when this returns."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise BackendError(
                f"{self.name}: its process ended with {self._process.exitcode} (-9 may be for want "
                f"of memory: measure a smaller --model); {self._log} has what it said"
            ) from None
        if isinstance(answer, str):
            raise BackendError(f"{self.name} failed; {self._log} has what it said\n{answer}")
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One thing to time."""

    contender: Contender
    timed: Call
    before: tuple[Call, ...] = ()


def take_turns(works: Mapping[Key, Work], rounds: int, *, warm_up: int = 1) -> dict[Key, Timing]:
    """Return medians by key over rounds in which each work runs once; warm-up rounds do not
    count."""
    timings: dict[Key, list[Timing]] = {key: [] for key in works}
    for number in range(warm_up + rounds):
        for key, work in works.items():
            for call in work.before:
                work.contender.call(call)
            timing = work.contender.call(work.timed)
            if number >= warm_up:
                timings[key].append(timing)
    return {key: _median(values) for key, values in timings.items()}


def _median(timings: Sequence[Timing]) -> Timing:
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def _serve(pipe: Connection, opens: Callable[[], object], log: Path) -> None:
    """Answer calls until the pipe closes: a Timing, or a traceback."""
    with log.open("wb") as file:
        for stream in (1, 2):  # libraries print a lot, and not through Python
            os.dup2(file.fileno(), stream)
    try:
        contender = opens()
        pipe.send(None)
        while True:
            call = pipe.recv()
            pipe.send(_timed(contender, *call) if call else _own_memory())
    except EOFError:
        pass
    except Exception:  # sent to the caller
        pipe.send(traceback.format_exc())


def _timed(contender: object, method: str, *arguments: Any) -> Timing:
    run = getattr(contender, method)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run(*arguments)
    return Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _own_memory() -> Memory:
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, size, _ = line.split()
        sizes[name] = int(size) * 1024
    return Memory(sizes["Rss:"], sizes["AnonHugePages:"] / sizes["Anonymous:"])
