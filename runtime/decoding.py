"""Decoding one answer: row after row, from the prompt's last row to the last sample.

broken    whatever ends it early (Ctrl-C, a closed iterator, a full cache), `close` leaves the
          answer's text so far as the history, ended with EOS
heard     a listener who cut it off has heard some frames; the history then keeps the text that
          belongs with them, rounded down
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.model.prompt import speak_as
from deeptalk_edge.model.rows import AnswerRows, Ids, text_rows
from deeptalk_edge.model.understanding import entropy
from deeptalk_edge.runtime.codec_chunks import CodecChunks
from deeptalk_edge.runtime.events import AudioChunk, Stopped, TextPiece
from deeptalk_edge.runtime.heard_text import num_heard_ids
from deeptalk_edge.runtime.lm.codec_stream import Codec
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.runtime.lm.sampler import Sampler
from deeptalk_edge.runtime.lm.text import TextStream
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.runtime.settings import ConversationSettings

Array = NDArray[np.float32]

_TELLING_ROWS = 20
"""The answer's first rows, 1.7 s of speech: if its text is unsure, half a question was asked."""


class Kept(NamedTuple):
    """What the history keeps of an answer."""

    text: str
    text_ids: Ids
    """(L,), EOS included."""
    pending_rows: Ids
    """Rows of it that are still to be fed."""


class Decoding:
    """Of one answer. One owner; not thread-safe."""

    def __init__(
        self,
        number: int,
        last_row: Ids,
        *,
        settings: ConversationSettings,
        manifest: Manifest,
        engine: Engine,
        codec: Codec,
        text: TextStream,
        meter: Meter,
    ) -> None:
        """`last_row` (K + 1,) ends the prompt; everything before it is cached."""
        self._settings, self._engine, self._meter = settings, engine, meter
        self._vocabulary = manifest.model.vocabulary
        self._last_row = last_row
        self._start = engine.num_rows
        self._forked = False
        self._speaks = settings.mode != "text"
        self._alignment = manifest.model.text_alignment
        self._codec_spec = manifest.codec.spec
        self._sampler = Sampler(self._vocabulary, settings.sampler, turn=number)
        self._text_ids: list[int] = []  # of the history: as fed, up to EOS
        self._text_log_ps: list[float] = []  # of the first rows
        self._text_entropies: list[float] = []
        self.rows = AnswerRows(self._vocabulary, speech=self._speaks)
        self.text = text
        self.sound = CodecChunks(
            codec, manifest.codec, seed=settings.sampler.seed, elapsed_ms=meter.elapsed_ms
        )
        self.stopped: Stopped = "end"
        self.step_ms: list[float] = []

    def open(self) -> Logits:
        """Feed the last row of the prompt, which requests speech."""
        quiet = self._last_row[None]
        if self._settings.mode == "text":
            return self._engine.decode_step(quiet)
        spoken = speak_as(self._vocabulary, quiet, self._settings.speaker)
        if self._settings.mode == "single":
            return self._engine.decode_step(spoken)
        self._engine.fork()
        self._forked = True
        return self._engine.decode_step(np.concatenate([spoken, quiet]))

    def run(self, logits: Logits) -> Iterator[tuple[TextPiece | AudioChunk, ...]]:
        """Write row after row until the answer or its room ends; yields what each one brought."""
        room = self._engine.capacity - self._engine.num_rows + 1  # the last row is never fed
        while True:
            row, frame, step_ms = self._choose(logits)
            is_over = self._is_over(room)
            if not is_over:  # first, so that a device is at work while the frame becomes sound
                step_ms += self._feed(row)
            pieces: list[TextPiece | AudioChunk] = []
            pieces += self._add_text(row)
            if frame is not None:
                pieces += self.sound.push(frame)
            if is_over:
                break
            yield tuple(pieces)
            start_ms = self._meter.elapsed_ms()
            logits = self._fed_logits()
            self.step_ms.append(step_ms + self._meter.elapsed_ms() - start_ms)
        if piece := self.text.finish():
            pieces.append(TextPiece(piece))
        yield (*pieces, *self.sound.finish())

    @property
    def text_log_p(self) -> float | None:
        """How sure the model is of what it says: over the first rows, the mean log-probability of
        the likeliest text id. None until they are written, or the text is."""
        return float(np.mean(self._text_log_ps)) if self._is_telling else None

    @property
    def text_entropy(self) -> float | None:
        """Mean entropy of the text logits over the same rows, in nats."""
        return float(np.mean(self._text_entropies)) if self._is_telling else None

    @property
    def _is_telling(self) -> bool:
        return len(self._text_log_ps) >= _TELLING_ROWS or self.rows.is_text_done

    def close(self, heard_samples: int | None = None) -> Kept:
        """Leave the history in the engine, up to what was heard; by default all that was said."""
        kept = self._text_ids
        if heard_samples is not None:
            kept = kept[: self._num_heard_ids(heard_samples)]
        is_ended = bool(kept) and kept[-1] == self._vocabulary.eos
        text_ids = kept if is_ended else [*kept, self._vocabulary.eos]
        history = text_rows(self._vocabulary, [int(self._last_row[-1]), *text_ids])
        engine = self._engine
        if self._settings.mode == "single":
            engine.trim(self._start)  # its rows hold speech, the history's do not
        elif engine.num_items == 2:
            engine.keep(0)
        if self._forked:
            engine.recall()
        engine.trim(min(engine.num_rows, self._start + 1 + len(kept)))
        return Kept(
            self.text.reading(kept),
            np.array(text_ids, np.int64),
            history[engine.num_rows - self._start :],
        )

    def _choose(self, logits: Logits) -> tuple[Ids, Ids | None, float]:
        """The next row (K + 1,), the codec frame that it completes, and the time that this took."""
        start_ms = self._meter.elapsed_ms()
        text_logits = None if self.rows.is_text_done else logits.text[-1]
        code_logits = None if self.rows.is_speech_done else logits.codes[0]
        row, frame = self.rows.push(*self._sampler.sample(text_logits, code_logits))
        if text_logits is not None and len(self._text_log_ps) < _TELLING_ROWS:
            likelihoods = np.exp(text_logits - text_logits.max())
            self._text_log_ps.append(-float(np.log(likelihoods.sum())))
            self._text_entropies.append(entropy(text_logits))
        return row, frame, self._meter.elapsed_ms() - start_ms

    def _num_heard_ids(self, heard_samples: int) -> int:
        return num_heard_ids(
            heard_samples,
            num_ids=len(self._text_ids),
            num_samples=self.sound.num_samples,
            is_speech_done=self.rows.is_speech_done,
            codec=self._codec_spec,
            alignment=self._alignment,
        )

    def _add_text(self, row: Ids) -> Iterator[TextPiece]:
        """Add the row's text id; yields the text that it makes certain."""
        eos = self._vocabulary.eos
        if self._text_ids and self._text_ids[-1] == eos:
            return
        self._text_ids.append(int(row[-1]))
        if piece := self.text.push(int(row[-1])):
            yield TextPiece(piece)

    def _is_over(self, room: int) -> bool:
        if self.rows.is_done:
            return True
        if self._settings.ends_with_speech and self._speaks and self.rows.is_speech_done:
            return True
        if self.rows.num_rows == self._settings.max_rows:
            self.stopped = "max_rows"
        elif self.rows.num_rows == room:
            self.stopped = "context"
        return self.stopped != "end"

    def _feed(self, row: Ids) -> float:
        """Feed the row to every item, of which item 1 only writes; the time that this took."""
        start_ms, rows = self._meter.elapsed_ms(), row[None]
        if self._engine.num_items == 2:
            rows = np.concatenate([rows, text_rows(self._vocabulary, row[-1:])])
        self._engine.feed(rows)
        return self._meter.elapsed_ms() - start_ms

    def _fed_logits(self) -> Logits:
        """The logits after the row that was fed; item 1 is complete once EOS is chosen."""
        logits = self._engine.logits()
        if self.rows.is_text_done and self._engine.num_items == 2:
            self._engine.keep(0)
        return logits
