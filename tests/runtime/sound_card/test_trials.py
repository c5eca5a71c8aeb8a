"""A failed trial is repeated only if the machine stood still during it."""

from __future__ import annotations

import pytest

from tests.runtime.sound_card.trials import MAX_REPEATS, STILL_S, TrialRepeated, on_a_steady_machine
from tests.runtime.sound_card.warbles import assert_intact, warble


class Clock:
    """Returns given standstills of the machine for each trial."""

    def __init__(self, *still_s: float) -> None:
        self._still_s = list(still_s)

    def __call__(self) -> Clock:
        self._now_s = self._still_s.pop(0)
        return self

    def stop(self) -> float:
        return self._now_s


class Room:
    """Counts its trials and restarts; the last of `results` repeats."""

    def __init__(self, *results: bool) -> None:
        self._results = list(results)
        self.num_trials = self.num_restarts = 0

    def restart(self) -> None:
        self.num_restarts += 1

    def try_once(self) -> None:
        self.num_trials += 1
        assert self._results.pop(0) if len(self._results) > 1 else self._results[0]


def run(room: Room, clock: Clock) -> None:
    def trial(card: Room) -> None:
        card.try_once()

    on_a_steady_machine(trial, clock)(card=room)


@pytest.mark.parametrize("still_s", [0.0, STILL_S])
def test_a_failure_on_a_steady_machine_counts_at_once(still_s: float) -> None:
    room = Room(False, True)
    with pytest.raises(AssertionError):
        run(room, Clock(still_s, 0.0))
    assert (room.num_trials, room.num_restarts) == (1, 0)


def test_a_failure_during_a_standstill_is_repeated_and_counted() -> None:
    room = Room(False, True)
    with pytest.warns(TrialRepeated, match=r"trial: stood still for 0\.050 s"):
        run(room, Clock(0.05, 0.0))
    assert (room.num_trials, room.num_restarts) == (2, 1)


def test_a_failure_in_every_repeat_counts() -> None:
    room = Room(False)
    with pytest.raises(AssertionError), pytest.warns(TrialRepeated):
        run(room, Clock(*[0.05] * MAX_REPEATS))
    assert room.num_trials == MAX_REPEATS + 1


def test_one_ruined_quarter_second_is_not_intact() -> None:
    said = warble(4.0, 16000)
    assert_intact(said, said, 16000)
    heard = said.copy()
    heard[8000:8400] = 0.0  # 25 ms
    with pytest.raises(AssertionError):
        assert_intact(said, heard, 16000)
