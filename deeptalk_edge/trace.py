"""What happened when, for chrome://tracing and Perfetto: spans and counters, of any thread.

off      `NO_TRACE` takes the same calls and costs an attribute look-up
on       an event is a tuple in a bounded list; nothing is written before `save`
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from deeptalk_edge.files import write_file

_MAX_EVENTS = 500_000  # about 100 MB; the oldest go first

_Event = tuple[
    str, str, int, int, int, dict[str, Any]
]  # name, phase, start, duration, thread, args


class Trace:
    """Collects events. Every method may be called from any thread."""

    def __init__(self, max_events: int = _MAX_EVENTS) -> None:
        self._events: deque[_Event] = deque(maxlen=max_events)
        self._num_seen = 0

    def span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        """Time what happens inside."""
        return self._span(name, args)

    def count(self, name: str, value: float) -> None:
        """Note a value; it is drawn as a curve."""
        self._add(name, "C", time.perf_counter_ns(), 0, {"value": value})

    def mark(self, name: str, **args: Any) -> None:
        """Note a moment."""
        self._add(name, "i", time.perf_counter_ns(), 0, args)

    def save(self, path: Path) -> None:
        """Write what was collected, whole or not at all.

        Raises SettingsError if `path` cannot be written, DoesNotFit if the disk is full.
        """
        process = os.getpid()
        events = [
            {
                "name": name,
                "ph": phase,
                "ts": start_ns / 1000,
                "pid": process,
                "tid": thread,
                "args": args,
                **({"dur": duration_ns / 1000} if phase == "X" else {}),
            }
            for name, phase, start_ns, duration_ns, thread, args in list(self._events)
        ]
        num_dropped = self._num_seen - len(events)
        content = {"traceEvents": events, "otherData": {"dropped_events": num_dropped}}
        write_file(path, json.dumps(content).encode())

    @contextmanager
    def _span(self, name: str, args: dict[str, Any]) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self._add(name, "X", start_ns, time.perf_counter_ns() - start_ns, args)

    def _add(
        self, name: str, phase: str, start_ns: int, duration_ns: int, args: dict[str, Any]
    ) -> None:
        self._num_seen += 1
        self._events.append((name, phase, start_ns, duration_ns, threading.get_ident(), args))


class _NoTrace(Trace):
    """Collects nothing."""

    _nothing = nullcontext()

    def span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        return self._nothing

    def count(self, name: str, value: float) -> None:
        pass

    def mark(self, name: str, **args: Any) -> None:
        pass


NO_TRACE = _NoTrace(0)
