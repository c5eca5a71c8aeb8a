"""Trials on a machine that may stand still: which failures count, and how often a trial is
repeated.

A virtual sound card stops when the machine stops. So a trial that fails while the machine stood
still proves nothing and is repeated, at most three times. Each repeat gives a warning in the run's
summary. Any other failure counts at once.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

MAX_REPEATS = 3
STILL_S = 0.02
"""Standstill of the machine that also stops the card's daemon."""


class TrialRepeated(UserWarning):
    """A sound trial failed while the machine stood still."""


class Restartable(Protocol):
    def restart(self) -> None:
        """Restart for another trial."""


class Watch(Protocol):
    def stop(self) -> float:
        """The longest standstill since the watch was made, in seconds."""


class Machine:
    """Measures the standstills of this machine."""

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        last_s = time.perf_counter()
        while not self._is_over.wait(0.005):
            now_s = time.perf_counter()
            self._longest_s = max(self._longest_s, now_s - last_s)
            last_s = now_s

    def stop(self) -> float:
        self._is_over.set()
        self._thread.join()
        return self._longest_s


def on_a_steady_machine(
    test: Callable[..., None], watch: Callable[[], Watch] = Machine
) -> Callable[..., None]:
    """Repeat a test with a `card` if it fails during a standstill of the machine."""

    @functools.wraps(test)
    def again(card: Restartable, **fixtures: Any) -> None:
        for _ in range(MAX_REPEATS):
            machine = watch()
            try:
                return test(card=card, **fixtures)
            except Exception as error:
                still_s = machine.stop()
                if still_s <= STILL_S:
                    raise
                why = f"{test.__name__}: stood still for {still_s:.3f} s; {error!r:.80}"
                warnings.warn(TrialRepeated(why), stacklevel=1)
                card.restart()
            finally:
                machine.stop()
        return test(card=card, **fixtures)

    return again
