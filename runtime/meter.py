"""How much time an answer has taken, without the time that the listener takes."""

from __future__ import annotations

import time


class Meter:
    """A stopwatch that is stopped between steps, and at first."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._resumed_s: float | None = None  # None while it is stopped

    def pause(self) -> None:
        self._spent_s, self._resumed_s = self.elapsed_ms() / 1000, None

    def resume(self) -> None:
        self._resumed_s = time.perf_counter()

    def elapsed_ms(self) -> float:
        running_s = 0.0 if self._resumed_s is None else time.perf_counter() - self._resumed_s
        return (self._spent_s + running_s) * 1000
