"""One answer being written: row after row, from the prompt's last row to the last sample.

broken    whatever ends it early (Ctrl-C, a closed iterator, a full cache), `close` leaves the
          answer's text so far as the history, ended with EOS
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.prompt import speak_as
from deeptalk_edge.rows import AnswerRows, Ids, text_rows
from deeptalk_edge.runtime.audio.codec import CodecGraph, StreamingCodec, frames_to_sound
from deeptalk_edge.runtime.bundle import Manifest
from deeptalk_edge.runtime.events import AudioChunk, Stopped, TextPiece
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.runtime.lm.sampler import Sampler
from deeptalk_edge.runtime.lm.text import TextStream
from deeptalk_edge.runtime.settings import ConversationSettings

Array = NDArray[np.float32]

_CHUNK_FRAMES = (1, 1, 2, 2, 4)
"""Frames of the chunks behind the first sound: small until some sound is ahead of the listener."""


class Meter:
    """A stopwatch that stands still while the caller has the turn."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._resumed_s = time.perf_counter()

    def pause(self) -> None:
        self._spent_s += time.perf_counter() - self._resumed_s

    def resume(self) -> None:
        self._resumed_s = time.perf_counter()

    def elapsed_ms(self) -> float:
        return (self._spent_s + time.perf_counter() - self._resumed_s) * 1000


class Turn:
    """One answer being written."""

    def __init__(
        self,
        number: int,
        last_row: Ids,
        *,
        settings: ConversationSettings,
        manifest: Manifest,
        engine: Engine,
        codec: CodecGraph,
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
        self._entry = manifest.codec
        self._codec = StreamingCodec(codec, self._entry, seed=settings.sampler.seed)
        self._sampler = Sampler(self._vocabulary, settings.sampler, turn=number)
        self._text_ids: list[int] = []  # of the history: as fed, up to EOS
        self._waiting: list[Ids] = []  # frames for the codec's next chunk
        self._num_chunks = 0
        self.rows = AnswerRows(self._vocabulary, speech=self._speaks)
        self.text = text
        self.stopped: Stopped = "end"
        self.first_frame_ms: float | None = None
        self.first_sample_ms: float | None = None
        self.step_ms: list[float] = []
        self.num_samples = 0

    def open(self) -> Logits:
        """Feed the last row of the prompt, which asks for speech."""
        quiet = self._last_row[None]
        if self._settings.mode == "text":
            return self._engine.decode_step(quiet)
        spoken = speak_as(self._vocabulary, quiet, self._settings.speaker)
        if self._settings.mode == "single":
            return self._engine.decode_step(spoken)
        self._engine.fork()
        self._forked = True
        return self._engine.decode_step(np.concatenate([spoken, quiet]))

    def run(self, logits: Logits) -> Iterator[TextPiece | AudioChunk]:
        """Write row after row until the answer or its room ends."""
        room = self._engine.capacity - self._engine.num_rows + 1  # the last row is never fed
        while True:
            row, frame, choose_ms = self._choose(logits)
            if piece := self._hear_text(row):
                yield TextPiece(piece)
            if frame is not None:
                yield from self._hear_frame(frame)
            if self._is_over(room):
                break
            start_ms = self._meter.elapsed_ms()
            logits = self._feed(row)
            self.step_ms.append(choose_ms + self._meter.elapsed_ms() - start_ms)
        if piece := self.text.finish():
            yield TextPiece(piece)
        yield from self._sound(self._decode_waiting())
        yield from self._sound(self._codec.finish())

    def close(self) -> Ids:
        """Leave the history in the engine; returns the rows of it that are still to be fed."""
        if not self._text_ids or self._text_ids[-1] != self._vocabulary.eos:
            self._text_ids.append(self._vocabulary.eos)
        history = text_rows(self._vocabulary, [int(self._last_row[-1]), *self._text_ids])
        engine = self._engine
        if self._settings.mode == "single":
            engine.trim(self._start)  # its rows hold speech, the history's do not
        elif engine.num_items == 2:
            engine.keep(0)
        if self._forked:
            engine.recall()
        return history[engine.num_rows - self._start :]

    def _choose(self, logits: Logits) -> tuple[Ids, Ids | None, float]:
        """The next row (K + 1,), the codec frame that it completes, and the time that this took."""
        start_ms = self._meter.elapsed_ms()
        text_logits = None if self.rows.is_text_done else logits.text[-1]
        code_logits = None if self.rows.is_speech_done else logits.codes[0]
        row, frame = self.rows.push(*self._sampler.sample(text_logits, code_logits))
        return row, frame, self._meter.elapsed_ms() - start_ms

    def _hear_text(self, row: Ids) -> str:
        """Take the row's text id; returns the text that it makes certain."""
        eos = self._vocabulary.eos
        if self._text_ids and self._text_ids[-1] == eos:
            return ""
        self._text_ids.append(int(row[-1]))
        return self.text.push(int(row[-1]))

    def _hear_frame(self, frame: Ids) -> Iterator[AudioChunk]:
        """Take a codec frame; decode as soon as that gives sound, then in growing chunks."""
        if self.first_frame_ms is None:
            self.first_frame_ms = self._meter.elapsed_ms()
        self._waiting.append(frame)
        if self._num_chunks == 0:
            enough = frames_to_sound(self._entry)
        else:
            enough = _CHUNK_FRAMES[min(self._num_chunks, len(_CHUNK_FRAMES)) - 1]
        if len(self._waiting) >= enough:
            yield from self._sound(self._decode_waiting())

    def _decode_waiting(self) -> Array:
        if not self._waiting:
            return np.empty(0, np.float32)
        frames, self._waiting = np.stack(self._waiting), []
        self._num_chunks += 1
        return self._codec.push(frames)

    def _sound(self, pcm: Array) -> Iterator[AudioChunk]:
        if not pcm.size:
            return
        if self.first_sample_ms is None:
            self.first_sample_ms = self._meter.elapsed_ms()
        self.num_samples += pcm.size
        yield AudioChunk(pcm)

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

    def _feed(self, row: Ids) -> Logits:
        """Feed the row to every item; item 1 only writes, and has said all once EOS is fed."""
        if self._engine.num_items == 1:
            return self._engine.decode_step(row[None])
        quiet = text_rows(self._vocabulary, row[-1:])
        logits = self._engine.decode_step(np.concatenate([row[None], quiet]))
        if self.rows.is_text_done:
            self._engine.keep(0)
        return logits
