"""A conversation: questions in, text pieces and sound out as they come.

turn      prompt rows are prefilled but for the last one, which asks for speech; then a row at a
          time
history   what the next turn finds in the cache: prompts and answer texts, never speech codes.
          Batch-parallel has it ready in item 1; single feeds the answer's text again with the next
          prompt
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.features import log_mel, num_frames
from deeptalk_edge.prompt import Heard, Segment, Typed
from deeptalk_edge.rows import text_rows
from deeptalk_edge.runtime.backends.ort import OrtEngine, OrtGraph
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.events import AudioChunk, Event, Metrics, TextPiece, TurnDone
from deeptalk_edge.runtime.golden import check_golden
from deeptalk_edge.runtime.lm.engine import Engine
from deeptalk_edge.runtime.lm.text import TextTokenizer
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.turn import Meter, Turn

Array = NDArray[np.float32]

__all__ = [
    "AudioChunk",
    "Conversation",
    "ConversationSettings",
    "Event",
    "Metrics",
    "TextPiece",
    "TurnDone",
]


class Conversation:
    """One conversation with one model. One owner; not thread-safe."""

    def __init__(self, bundle: Bundle, settings: ConversationSettings | None = None) -> None:
        """Load the graphs and check on them that this device computes what the exporter did.

        Raises ArtifactError if the bundle lacks what the settings ask for, BackendError if a graph
        does not load or computes something else.
        """
        manifest = bundle.manifest
        self.settings = settings or ConversationSettings.of(bundle)
        self.bundle = bundle
        self._vocabulary = manifest.model.vocabulary
        self._vocabulary.speaker(self.settings.speaker)
        self._encoder_spec = manifest.model.encoder
        self._tokenizer = TextTokenizer(bundle.file("tokenizer.json"), self._vocabulary)
        self._encoder = self._load(manifest.graphs.encoder)
        self._codec = self._load(manifest.graphs.codec)
        self._engine: Engine = OrtEngine(
            bundle, context_rows=self.settings.context_rows, threads=self.settings.threads
        )
        check_golden(bundle, encoder=self._encoder, engine=self._engine, codec=self._codec)
        self._num_turns = 0
        self._is_answering = False
        self._owed = text_rows(self._vocabulary, [])  # rows of the history that are not cached yet

    @property
    def rate_hz(self) -> int:
        """The rate of the sound that comes out."""
        return self.bundle.manifest.codec.spec.sampling_rate

    def ask(self, question: Array | str) -> Generator[Event, None, None]:
        """Answer a question: 16 kHz PCM (N,) of one utterance, or text.

        The last event is `TurnDone`. A closed iterator ends the answer where it is.

        Raises AudioError if the PCM cannot be used, DoesNotFit if the conversation is too long for
        its context, BackendError or ExpertUnavailable if the model fails.
        """
        if self._is_answering:
            raise ValueError("ask: the answer before is not over; exhaust or close its iterator")
        self._is_answering = True
        meter = Meter()
        try:
            with contextlib.closing(self._answer(question, meter)) as events:
                for event in events:
                    meter.pause()
                    yield event
                    meter.resume()
        finally:
            self._is_answering = False

    def reset(self) -> None:
        """Forget the conversation; the next question begins a new one."""
        self._engine.reset()
        self._num_turns, self._owed = 0, self._owed[:0]

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self, name: str) -> OrtGraph:
        return OrtGraph(self.bundle.file(name), threads=self.settings.threads)

    def _answer(self, question: Array | str, meter: Meter) -> Generator[Event, None, None]:
        features, segment = self._listen(question)
        encoder_ms = None if isinstance(question, str) else meter.elapsed_ms()
        prefill_start_ms = meter.elapsed_ms()
        rows = np.concatenate([self._owed, segment.rows])
        mask = np.pad(segment.audio_mask, (len(self._owed), 0))
        before = self._engine.num_rows
        self._refuse_overflow(before + len(rows))
        try:
            self._engine.prefill(rows[:-1], features, mask[:-1])
        except BaseException:
            self._engine.trim(before)  # this turn was never heard
            raise
        turn = Turn(
            self._num_turns,
            rows[-1],
            settings=self.settings,
            manifest=self.bundle.manifest,
            engine=self._engine,
            codec=self._codec,
            text=self._tokenizer.stream(),
            meter=meter,
        )
        self._num_turns += 1
        try:
            logits = turn.open()
            prefill_ms = meter.elapsed_ms() - prefill_start_ms
            yield from turn.run(logits)
        finally:
            self._owed = turn.close()
        yield TurnDone(
            turn.text.text,
            Metrics(
                num_prompt_rows=len(rows),
                num_rows=turn.rows.num_rows,
                encoder_ms=encoder_ms,
                prefill_ms=prefill_ms,
                first_frame_ms=turn.first_frame_ms,
                first_sample_ms=turn.first_sample_ms,
                step_ms_p50=_percentile(turn.step_ms, 50),
                step_ms_p95=_percentile(turn.step_ms, 95),
                compute_s=meter.elapsed_ms() / 1000,
                audio_s=turn.num_samples / self.rate_hz,
                stopped=turn.stopped,
                num_clamped=turn.rows.num_clamped,
            ),
        )

    def _listen(self, question: Array | str) -> tuple[Array, Segment]:
        """The question's audio features (n, C) and prompt rows."""
        template = self._tokenizer.template
        user: Heard | Typed
        if isinstance(question, str):
            user = Typed(text=question)
            features = np.empty((0, self.bundle.manifest.model.decoder.width), np.float32)
        else:
            user = Heard(num_frames=num_frames(len(question)))
            mel = log_mel(question, self._encoder_spec)
            features = self._encoder.run({"log_mel": mel[None]})[0][: user.num_frames]
        if self._num_turns:
            return features, template.next_turn(user)
        return features, template.opening(self.settings.system, user)

    def _refuse_overflow(self, num_rows: int) -> None:
        """Refuse a prompt behind which no answer would have room."""
        least = self._vocabulary.num_codebooks + 1  # rows until the first codec frame is complete
        if num_rows + least > self._engine.capacity:
            raise DoesNotFit(
                f"the conversation would be {num_rows} rows and an answer needs {least} at least; "
                f"the context holds {self._engine.capacity}; start a new conversation, or ask for "
                "more context rows"
            )


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
