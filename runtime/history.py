"""What was said so far, and how much of it the cache holds.

cache    prompts and answer texts, never speech codes; batch-parallel has it ready in item 1, single
         feeds the answer's text with the next prompt: pending rows
opening  what stands before the first spoken question is fed on its own, so that no answer depends
         on when; a typed question may merge with it and is fed with it
room     the oldest whole turns go, and the rest is fed again, where there are more turns than
         the model may see at once, or the context is full. That is decided by turns and rows
         alone, never by timing
idle     `trim` does both while nobody waits
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.model.prompt import Heard, Segment, Template, Typed
from deeptalk_edge.model.rows import Ids, text_rows
from deeptalk_edge.runtime.lm.engine import Engine

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastTurn:
    """A question and what is kept of its answer."""

    user: Heard | Typed
    features: Array
    """(n, C); n = 0 for a typed question."""
    answer: Ids
    """(L,) text ids, EOS included."""


class Prompted(NamedTuple):
    """A prompt that is cached but for its last row."""

    last_row: Ids
    """(K + 1,)"""
    num_rows: int
    """Rows of the prompt, pending ones included, and the opening unless it was fed before."""
    before: int
    """Rows cached before it."""


class History:
    """The turns of one conversation and their cache. One owner; not thread-safe."""

    def __init__(
        self,
        engine: Engine,
        template: Template,
        *,
        system: str,
        width: int,
        reserve_rows: int,
        max_turns: int | None = None,
    ) -> None:
        """`width` is the model's, C; `reserve_rows` is what a further turn may take; `max_turns`
        is what the model may see at once, the question at hand included."""
        self._engine, self._template, self._system = engine, template, system
        self._reserve_rows = min(reserve_rows, engine.capacity // 2)
        self._max_turns = max_turns
        self._past: deque[PastTurn] = deque()
        self._nothing = text_rows(template.vocabulary, [])
        self.no_features = np.empty((0, width), np.float32)
        self.pending_rows = self._nothing
        """Rows of the history that are not cached yet."""
        self.num_turns = 0
        """Since the conversation began, those that were dropped included."""

    def segment(self, user: Heard | Typed) -> Segment:
        """The rows that ask this question now."""
        return self._segment(user, is_first=not self._past)

    def prompt(self, user: Heard | Typed, features: Array) -> Prompted:
        """Feed a question, all but the last row, which asks for an answer.

        Raises DoesNotFit if not even an empty history leaves it room, BackendError or
        ExpertUnavailable if the model fails; the history is then as before.
        """
        self._drop_oldest()
        segment = self._fit(user)
        num_rows = len(self.pending_rows) + len(segment.rows)
        opened = 0
        if not self._past and isinstance(user, Heard):
            num_rows -= self._engine.num_rows
            opened = self._open()
        elif not self._past:
            self._engine.reset()
        rows = np.concatenate([self.pending_rows, segment.rows[opened:]])
        mask = np.pad(segment.audio_mask[opened:], (len(self.pending_rows), 0))
        before = self._engine.num_rows
        try:
            self._engine.prefill(rows[:-1], features, mask[:-1])
        except BaseException:
            self._engine.trim(before)  # this question was never heard
            raise
        return Prompted(rows[-1], num_rows, before)

    def append(self, turn: PastTurn, pending_rows: Ids) -> None:
        """Add a turn whose rows are cached but for the `pending_rows`."""
        self._past.append(turn)
        self.pending_rows = pending_rows
        self.num_turns += 1

    def rollback(self, position: int) -> None:
        """Forget the rows of a question that was discarded, from `position` on."""
        self._engine.trim(position)

    def trim(self) -> int:
        """Do beforehand what the next question would do: drop the oldest turns where a further one
        is too many or might not fit, feed the opening if there is no turn; returns how many turns
        went."""
        num_dropped = self._drop_oldest()
        if not self._past:
            self._open()
        return num_dropped

    def _drop_oldest(self) -> int:
        """Drop turns beyond `max_turns`; if a further turn might still not fit, the oldest until
        half of the context is free. Returns how many went."""
        num_dropped = 0
        if self._max_turns is not None:
            num_dropped = max(len(self._past) + 1 - self._max_turns, 0)
        num_rows = self._num_rows - sum(self._size(self._past[i]) for i in range(num_dropped))
        if num_rows + self._reserve_rows > self._engine.capacity:
            while num_dropped < len(self._past) and num_rows > self._engine.capacity // 2:
                num_rows -= self._size(self._past[num_dropped])
                num_dropped += 1
        if num_dropped:
            self._drop(num_dropped)
        return num_dropped

    def reset(self) -> None:
        """Forget all turns."""
        self._engine.reset()
        self._past.clear()
        self.pending_rows, self.num_turns = self._nothing, 0

    def _open(self) -> int:
        """Feed what stands before the first spoken question, unless it is there; returns its
        rows."""
        if self._engine.num_rows == 0:
            segment = self._segment(Heard(num_frames=1), is_first=True)
            opening = slice(0, int(segment.audio_mask.argmax()))
            mask = segment.audio_mask[opening]
            try:
                self._engine.prefill(segment.rows[opening], self.no_features, mask)
            except BaseException:
                self._engine.reset()
                raise
        return self._engine.num_rows

    @property
    def _num_rows(self) -> int:
        return self._engine.num_rows + len(self.pending_rows)

    def _fit(self, user: Heard | Typed) -> Segment:
        """The question's rows; drops turns until they and the shortest answer fit."""
        least = self._template.vocabulary.num_codebooks + 1  # rows until the first codec frame
        while True:
            segment = self.segment(user)
            needed = (self._num_rows if self._past else 0) + len(segment.rows) + least
            if needed <= self._engine.capacity:
                return segment
            if not self._past:
                raise DoesNotFit(
                    f"the question takes {len(segment.rows)} rows and an answer {least} at least; "
                    f"the context holds {self._engine.capacity}; ask for less at once, or for more "
                    "context rows"
                )
            self._drop(1)

    def _drop(self, num_turns: int) -> None:
        """Forget the oldest turns and feed the others again, in one go."""
        for _ in range(num_turns):
            self._past.popleft()
        self._engine.reset()
        self.pending_rows = self._nothing
        if not self._past:
            return
        rows, masks = [], []
        for index, turn in enumerate(self._past):
            segment = self._segment(turn.user, is_first=index == 0)
            answer = text_rows(self._template.vocabulary, turn.answer)
            rows += [segment.rows, answer]
            masks += [segment.audio_mask, np.zeros(len(answer), np.bool_)]
        features = np.concatenate([turn.features for turn in self._past])
        try:
            self._engine.prefill(np.concatenate(rows), features, np.concatenate(masks))
        except BaseException:
            self.reset()
            raise

    def _size(self, turn: PastTurn) -> int:
        """Rows that a turn takes behind another one."""
        return len(self._segment(turn.user, is_first=False).rows) + len(turn.answer)

    def _segment(self, user: Heard | Typed, *, is_first: bool) -> Segment:
        if is_first:
            return self._template.opening(self._system, user)
        return self._template.next_turn(user)
