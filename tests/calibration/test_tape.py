"""A tape holds every call of a conversation; another engine that plays it gets the same calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deeptalk_edge.calibration.tape import Tape, TapedEngine, replay
from deeptalk_edge.runtime.lm.engine import Logits

ROWS = np.arange(6).reshape(2, 3)
FEATURES, MASK = np.ones((1, 4), np.float32), np.array([True, False])
PROMPT = ("prefill", (ROWS, FEATURES, MASK))

CALLS = [
    PROMPT,
    ("fork", ()),
    ("decode_step", (ROWS,)),
    ("keep", (0,)),
    ("decode_step", (ROWS[:1],)),
    ("recall", ()),
    ("trim", (1,)),
    ("reset", ()),
    ("logits", ()),
]


class NotedEngine:
    """Notes its calls; its logits count them, in arrays that the next call overwrites."""

    num_rows, num_items, capacity = 7, 2, 9

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._logits = Logits(np.zeros(1, np.float32), np.zeros(1, np.float32))

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Logits | None:
            self.calls.append((name, arguments))
            for each in self._logits:
                each[:] = len(self.calls)
            return self._logits if name in ("decode_step", "logits") else None

        return call


def asked(tape: Tape | None, calls: list[tuple[str, Any]]) -> NotedEngine:
    engine = NotedEngine()
    taped = TapedEngine(engine)
    taped.tape = tape
    for name, arguments in calls:
        getattr(taped, name)(*arguments)
    return engine


def same(found: list[tuple[str, Any]], expected: list[tuple[str, Any]]) -> bool:
    return repr(found) == repr(expected)


def test_every_call_is_handed_on_and_noted_in_order() -> None:
    tape = Tape()
    assert same(asked(tape, CALLS).calls, CALLS)
    assert same(tape.calls, CALLS)
    assert [int(said.text[0]) for _, said in tape.logits] == [3, 5, 9]  # copies
    assert [is_text for is_text, _ in tape.logits] == [True, False, True]


@pytest.mark.parametrize("after", ["recall", "reset", "fork"])
def test_text_is_to_come_again_after_the_spoken_item(after: str) -> None:
    tape = Tape()
    asked(tape, [("keep", (0,)), ("logits", ()), (after, ()), ("logits", ())])
    assert [is_text for is_text, _ in tape.logits] == [False, True]


def test_without_a_tape_calls_are_only_handed_on() -> None:
    assert same(asked(None, CALLS).calls, CALLS)


def test_a_row_that_is_fed_is_one_step_unless_the_cache_moves_before_it() -> None:
    tape = Tape()
    calls = [("feed", (ROWS,)), ("logits", ()), ("feed", (ROWS,)), ("trim", (0,)), ("logits", ())]
    asked(tape, calls)
    assert same(tape.calls, [("decode_step", (ROWS,)), ("trim", (0,)), ("logits", ())])


def test_what_a_caller_changes_later_is_on_the_tape_as_it_was() -> None:
    tape, rows, features, mask = Tape(), ROWS.copy(), FEATURES.copy(), MASK.copy()
    asked(tape, [("prefill", (rows, features, mask)), ("decode_step", (rows,))])
    for each in (rows, features, mask):
        each[:] = 0
    assert same(tape.calls, [PROMPT, ("decode_step", (ROWS,))])


def test_another_engine_gets_the_calls_and_its_logits_come_in_order() -> None:
    other = NotedEngine()
    found = [int(said.text[0]) for said in replay(Tape(calls=CALLS), other)]
    assert found == [3, 5, 9]
    assert same(other.calls, CALLS)


def test_the_sizes_are_the_engines() -> None:
    taped = TapedEngine(NotedEngine())
    assert (taped.num_rows, taped.num_items, taped.capacity) == (7, 2, 9)
