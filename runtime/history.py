"""The turns of a conversation, and which of their rows the cache holds.

cache    holds prompts and answer texts, never speech codes. In batch-parallel mode item 1 has these
         rows already; in single mode the answer's text is fed with the next prompt: pending rows
opening  the rows before the first spoken question are fed separately, so that no answer depends on
         when they are fed; a typed question may merge with them and is fed with them
room     if there are more turns than the model may see at once, or the context is full, the oldest
         whole turns are dropped and the rest is fed again. Turns and rows decide that, never timing
idle     `trim` does both while no answer is awaited
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
    """A question and the kept part of its answer."""

    user: Heard | Typed
    features: Array
    """Audio features (n, C); n = 0 for a typed question."""
    answer: Ids
    """Text ids (L,) of the answer, EOS included."""


class Prompted(NamedTuple):
    """A prompt whose rows are cached, except for the last."""

    last_row: Ids
    """(K + 1,)"""
    num_rows: int
    """Rows of the prompt: pending ones included, and the opening if it was not fed before."""
    before: int
    """Rows cached before the prompt."""


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
        """`width` is the model's, C; `reserve_rows` is the most rows of a turn to come; `max_turns`
        is the number of turns that the model may see, the present question included."""
        self._engine, self._template, self._system = engine, template, system
        self._reserve_rows = min(reserve_rows, engine.capacity // 2)
        self._max_turns = max_turns
        self.past: deque[PastTurn] = deque()
        """The turns that the model sees, the oldest first."""
        self._nothing = text_rows(template.vocabulary, [])
        self.no_features = np.empty((0, width), np.float32)
        self.pending_rows = self._nothing
        """Rows of the history that are not cached yet."""
        self.num_turns = 0
        """Turns since the conversation began, dropped ones included."""

    def segment(self, user: Heard | Typed) -> Segment:
        """Return the rows of this question at this point of the conversation."""
        return self._segment(user, is_first=not self.past)

    def prompt(self, user: Heard | Typed, features: Array) -> Prompted:
        """Feed all rows of a question but the last, which starts the answer.

        Raises DoesNotFit if the question does not fit even without a history, BackendError or
        ExpertUnavailable if the model fails; the history is then unchanged.
        """
        self._drop_oldest()
        segment = self._fit(user)
        num_rows = len(self.pending_rows) + len(segment.rows)
        opened = 0
        if not self.past and isinstance(user, Heard):
            num_rows -= self._engine.num_rows
            opened = self._open()
        elif not self.past:
            self._engine.reset()
        rows = np.concatenate([self.pending_rows, segment.rows[opened:]])
        mask = np.pad(segment.audio_mask[opened:], (len(self.pending_rows), 0))
        before = self._engine.num_rows
        try:
            self._engine.prefill(rows[:-1], features, mask[:-1])
        except BaseException:
            self._engine.trim(before)  # the question is not part of the history
            raise
        return Prompted(rows[-1], num_rows, before)

    def append(self, turn: PastTurn, pending_rows: Ids) -> None:
        """Add a turn whose rows are cached but for the `pending_rows`."""
        self.past.append(turn)
        self.pending_rows = pending_rows
        self.num_turns += 1

    def rollback(self, position: int) -> None:
        """Remove the rows of a discarded question, from `position` on."""
        self._engine.trim(position)

    def trim(self) -> int:
        """Do in advance what the next question would do: drop the oldest turns if another turn is
        too many or might not fit, and feed the opening if there is no turn. Returns the number of
        dropped turns."""
        num_dropped = self._drop_oldest()
        if not self.past:
            self._open()
        return num_dropped

    def _drop_oldest(self) -> int:
        """Drop turns beyond `max_turns`; if another turn might still not fit, drop the oldest until
        half of the context is free. Returns the number of dropped turns."""
        num_dropped = 0
        if self._max_turns is not None:
            num_dropped = max(len(self.past) + 1 - self._max_turns, 0)
        num_rows = self._num_rows - sum(self._size(self.past[i]) for i in range(num_dropped))
        if num_rows + self._reserve_rows > self._engine.capacity:
            while num_dropped < len(self.past) and num_rows > self._engine.capacity // 2:
                num_rows -= self._size(self.past[num_dropped])
                num_dropped += 1
        if num_dropped:
            self._drop(num_dropped)
        return num_dropped

    def reset(self) -> None:
        """Remove all turns."""
        self._engine.reset()
        self.past.clear()
        self.pending_rows, self.num_turns = self._nothing, 0

    def _open(self) -> int:
        """Feed the rows before the first spoken question, unless they are cached; returns their
        number."""
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
        """Return the question's rows after dropping turns until they and the shortest answer
        fit."""
        least = self._template.vocabulary.num_codebooks + 1  # rows until its first codec frame
        while True:
            segment = self.segment(user)
            needed = (self._num_rows if self.past else 0) + len(segment.rows) + least
            if needed <= self._engine.capacity:
                return segment
            if not self.past:
                raise DoesNotFit(
                    f"the question takes {len(segment.rows)} rows and an answer {least} at least; "
                    f"the context holds {self._engine.capacity}; ask for less at once, or for more "
                    "context rows"
                )
            self._drop(1)

    def _drop(self, num_turns: int) -> None:
        """Remove the oldest turns and feed the others again in one prefill."""
        for _ in range(num_turns):
            self.past.popleft()
        self._engine.reset()
        self.pending_rows = self._nothing
        if not self.past:
            return
        rows, masks = [], []
        for index, turn in enumerate(self.past):
            segment = self._segment(turn.user, is_first=index == 0)
            answer = text_rows(self._template.vocabulary, turn.answer)
            rows += [segment.rows, answer]
            masks += [segment.audio_mask, np.zeros(len(answer), np.bool_)]
        features = np.concatenate([turn.features for turn in self.past])
        try:
            self._engine.prefill(np.concatenate(rows), features, np.concatenate(masks))
        except BaseException:
            self.reset()
            raise

    def _size(self, turn: PastTurn) -> int:
        """Rows of a turn that follows another one."""
        return len(self._segment(turn.user, is_first=False).rows) + len(turn.answer)

    def _segment(self, user: Heard | Typed, *, is_first: bool) -> Segment:
        if is_first:
            return self._template.opening(self._system, user)
        return self._template.next_turn(user)
