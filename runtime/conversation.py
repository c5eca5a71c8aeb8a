"""A conversation: it takes questions and yields text pieces and sound as they are made.

turn      all prompt rows but the last are prefilled; the last one starts the answer, which is
          decoded row by row
ask       takes one question after the other; `begin` returns the answer itself, for a caller that
          wants to pause or drop it between two steps
closed    every further call raises UsageError, as does every call in a forked child. If another
          thread closes it during a step, it closes when the step ends
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.deprecation import OldKeys, old_method
from deeptalk_edge.errors import EdgeError, SettingsError, UsageError
from deeptalk_edge.files import check_output, side_output
from deeptalk_edge.lifetime import Lifetime, while_open
from deeptalk_edge.model.features import max_samples
from deeptalk_edge.model.prompt import folded
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.answer import Answer
from deeptalk_edge.runtime.audio.level import warn_if_quiet
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.decoding import Decoding
from deeptalk_edge.runtime.events import AudioChunk, Metrics, Piece, Setup, TextPiece, TurnDone
from deeptalk_edge.runtime.experts.open import recorded_routes
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.history import History
from deeptalk_edge.runtime.lm.engine import Engine
from deeptalk_edge.runtime.lm.text import TextTokenizer
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.understanding import Judge
from deeptalk_edge.sound.pcm import Pcm, as_pcm
from deeptalk_edge.trace import NO_TRACE, Trace

if TYPE_CHECKING:
    from deeptalk_edge.runtime.audio.ports import SoundPort
    from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
    from deeptalk_edge.runtime.loop.recorder import Recorder
    from deeptalk_edge.runtime.loop.settings import LoopSettings

Array = NDArray[np.float32]

_TEMPLATE_ROWS = 64
"""Upper bound on a turn's template rows: role tokens and separators."""

log = logging.getLogger(__name__)

__all__ = [
    "AudioChunk",
    "Conversation",
    "ConversationSettings",
    "Metrics",
    "TextPiece",
    "TurnDone",
]


class Conversation:
    """One conversation with one model. One owner; not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        settings: ConversationSettings | None = None,
        *,
        tap: Callable[[Engine], Engine] | None = None,
    ) -> None:
        """Load the graphs and check that this device computes what the exporter computed.

        `tap` gets the checked engine and returns the engine to use in its place, for example one
        that records calls. The conversation still closes the original engine.

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
        with ExitStack() as opened:
            self._open(opened, tap)
            self.history = History(
                self._engine,
                self._tokenizer.template,
                system=self.settings.system,
                width=manifest.model.decoder.width,
                reserve_rows=self._encoder_spec.max_frames
                + self.settings.max_rows
                + _TEMPLATE_ROWS,
                max_turns=self.settings.max_turns,
            )
            """The turns so far, to read; `ask`, `trim_history` and `reset` change it."""
            self.setup = self._setup()
            """The backend, model and precision in use."""
            self._judge = Judge(bundle, self.settings.understanding)
            self._lifetime = Lifetime("the conversation", opened.pop_all().close)
        self._answer: Answer | None = None
        self.on_expert_counts: Callable[[dict[str, Any]], None] | None = None
        """Called with the experts' counters at the end of each turn, on the thread that runs the
        turn."""

    def _open(self, opened: ExitStack, tap: Callable[[Engine], Engine] | None) -> None:
        """Open all parts; `opened` closes them."""
        settings = self.settings
        backend = open_backend(self.bundle, settings.backend, settings.for_backend())
        self._backend = opened.enter_context(closing(backend))
        self._experts = backend.experts
        self._engine = tap(backend.engine) if tap else backend.engine
        self._experts.idle()

    def _setup(self) -> Setup:
        return Setup(
            bundle_sha256=self.bundle.sha256,
            backend=self._backend.name,
            kernel_path=self._backend.kernel_path,
            threads=self.settings.threads,
            mode=self.settings.mode,
            precision=dict(self.bundle.manifest.precision),
        )

    @property
    def rate_hz(self) -> int:
        """Rate of the answers' sound."""
        return self.bundle.manifest.codec.spec.sampling_rate

    @property
    def max_question_samples(self) -> int:
        """Longest question in samples at 16 kHz: the encoder's window."""
        return max_samples(self._encoder_spec)

    @property
    def knows_whole(self) -> bool:
        """Whether its answers say whether the question is whole (`Answer.is_whole`)."""
        return self._judge.knows_whole

    def ask(self, question: Pcm | str) -> Generator[Piece | TurnDone, None, None]:
        """Answer a question: 16 kHz PCM (N,) of one utterance, float or int16, or text.

        The events of a spoken question begin with its `Transcript`; if it is refused,
        `NotUnderstood` follows. The last event is `TurnDone`. Closing the iterator ends the answer
        at its present row.

        Raises AudioError if the PCM cannot be used, SettingsError if the text cannot be used,
        DoesNotFit if the question is too long for the context, BackendError or ExpertUnavailable if
        the model fails. Raises UsageError if the last answer is not finished, or the conversation
        is closed, busy in another thread, or belongs to another process.
        """
        self._expect_no_answer()
        checked = self._checked(question)
        if not isinstance(checked, str):
            warn_if_quiet(checked)
        return self._answer_to(checked)

    def _answer_to(self, question: Array | str) -> Generator[Piece | TurnDone, None, None]:
        self.user_started_speaking()
        answer = self._begin(question)
        try:
            while (pieces := answer.advance()) is not None:
                for piece in pieces:
                    self._lifetime.check()
                    yield piece
        finally:
            if self._lifetime.is_open:  # a closed conversation has no history
                answer.finish()
                self._end_turn()
        yield TurnDone(answer.text, answer.metrics())
        self._trim_early()

    def _trim_early(self) -> None:
        """Trim the history after a complete answer, while the caller does not wait for anything."""
        if not self._lifetime.is_open or (self._answer is not None and not self._answer.is_over):
            return
        try:
            self.trim_history()
        except EdgeError as error:  # the next question tries again and raises
            log.warning("between turns: %s", error)

    @while_open
    def user_started_speaking(self) -> None:
        """The user has begun to speak: experts that a prompt is likely to need may be read
        meanwhile. It changes no answer."""
        self._experts.user_started_speaking()

    expect_question = old_method("expect_question", "user_started_speaking")

    def begin(self, question: Pcm | str) -> Answer:
        """Begin an answer, to be advanced step by step. Finish or discard it before the next one.

        Raises as `ask` does.
        """
        self._expect_no_answer()
        return self._begin(self._checked(question))

    def _begin(self, question: Array | str) -> Answer:
        self._expect_no_answer()
        self._answer = Answer(
            question,
            history=self.history,
            hear=self._backend.encoder.hear,
            open_decoding=self._open_decoding,
            lifetime=self._lifetime,
            judge=self._judge,
            gpu_stages=self._backend.gpu_stages,
        )
        return self._answer

    def _checked(self, question: Pcm | str) -> Array | str:
        """Return the question in the model's form: PCM for the encoder, or text, folded if the
        settings say so.

        Raises AudioError or SettingsError if the question cannot be used.
        """
        if not isinstance(question, str):
            return as_pcm(question)
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"the question is no text that UTF-8 can hold ({error})") from None
        text = folded(question) if self.settings.fold_typed else question
        if not text.strip():
            raise SettingsError("the question is empty; write one with at least a word in it")
        return text

    def _expect_no_answer(self) -> None:
        self._lifetime.check()
        if self._answer is not None and not self._answer.is_over:
            raise UsageError("the last answer is not finished; exhaust, finish or discard it first")

    def listen(
        self,
        port: SoundPort | None = None,
        settings: LoopSettings | None = None,
        hearing: Hearing | None = None,
        *,
        recorder: Recorder | None = None,
        trace: Trace = NO_TRACE,
    ) -> LiveConversation:
        """Talk by voice. Returns a context that runs the voice loop in threads and iterates over
        its events. The context owns the conversation until it is left.

        `port` is the system's microphone and loudspeaker by default.

        Raises UsageError if the conversation is closed or belongs to another process.
        """
        self._lifetime.check()
        from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort
        from deeptalk_edge.runtime.loop.live import LiveConversation

        return LiveConversation(
            self, port or PyAudioPort(), settings, hearing, recorder=recorder, trace=trace
        )

    @while_open
    def idle(self) -> int:
        """Neither side speaks: call `trim_history`, and let likely experts be read. This is
        optional: the next question does what is missing.

        Raises UsageError as `ask` does, BackendError or ExpertUnavailable if the model fails.
        """
        self._expect_no_answer()
        self._end_turn()
        try:
            return self.history.trim()
        finally:
            self._experts.idle()

    make_room = old_method("make_room", "idle")

    @while_open
    def trim_history(self) -> int:
        """Drop the oldest turns if the next turn is one too many or might not fit, and feed the
        system prompt before the first turn; returns the number of dropped turns. The next question
        does it otherwise, so call it while no answer is awaited. `ask` calls it after the last
        event.

        Raises UsageError as `ask` does, BackendError or ExpertUnavailable if the model fails.
        """
        self._expect_no_answer()
        return self.history.trim()

    @contextmanager
    def record_routes(self, path: Path) -> Iterator[None]:
        """Record which experts every row chooses; the file is written when the block ends. A full
        disk then gives a warning.

        Raises SettingsError at once if `path` cannot be written, UsageError if another recording is
        under way, or as `ask` does.
        """
        self._lifetime.check()
        if self._experts.recorder is not None:
            raise UsageError("record_routes: another recording is under way; end it first")
        check_output(path)
        self._experts.recorder = recorder = RouteRecorder()
        try:
            yield
        finally:
            self._experts.recorder = None
            with side_output(path):
                recorded_routes(self.bundle, recorder).save(path)

    def _end_turn(self) -> None:
        counts = OldKeys(self._experts.end_turn(), whole_passes="all_resident_passes")
        log.info(
            "experts: %d passes with all there; %d hits, %d misses, %.1f MB read, %.1f ms waited",
            counts["all_resident_passes"],
            counts["hits"],
            counts["misses"],
            sum(counts["moved_bytes"].values()) / 1e6,
            sum(counts["stall_ms"].values()),
        )
        log.debug("experts: %s", counts)
        if self.on_expert_counts is not None:
            self.on_expert_counts(counts)

    def reset(self) -> None:
        """Forget the conversation; the next question begins a new one."""
        self._lifetime.check()
        if self._answer is not None:
            self._answer.discard()
        with self._lifetime:
            self.history.reset()

    def close(self) -> None:
        """End the answer under way and release everything; idempotent."""
        self._lifetime.close()

    def __enter__(self) -> Conversation:
        self._lifetime.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_decoding(self, last_row: Ids, meter: Meter) -> Decoding:
        return Decoding(
            self.history.num_turns,
            last_row,
            settings=self.settings,
            manifest=self.bundle.manifest,
            engine=self._engine,
            codec=self._backend.codec,
            text=self._tokenizer.stream(),
            meter=meter,
        )
