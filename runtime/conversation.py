"""A conversation: questions in, text pieces and sound out as they come.

turn      prompt rows are prefilled but for the last one, which asks for speech; then a row at a
          time
ask       one question after the other; `begin` hands out the answer itself, for a caller who wants
          to let go of it between two steps
closed    every further call is a UsageError, and so it is in a forked child. What another thread
          closes under a step goes when that step ends
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
"""Rows of a turn that are neither heard nor answered, roomily."""

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
        """Load the graphs and check on them that this device computes what the exporter did.

        `tap` gets the checked engine and returns what the conversation uses in its place, for who
        wants to observe it; the conversation still closes the engine itself.

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
            self._history = History(
                self._engine,
                self._tokenizer.template,
                system=self.settings.system,
                width=manifest.model.decoder.width,
                reserve_rows=self._encoder_spec.max_frames
                + self.settings.max_rows
                + _TEMPLATE_ROWS,
                max_turns=self.settings.max_turns,
            )
            self.setup = self._setup()
            """What runs, and how."""
            self._judge = Judge(bundle, self.settings.understanding)
            self._lifetime = Lifetime("the conversation", opened.pop_all().close)
        self._answer: Answer | None = None
        self.on_expert_counts: Callable[[dict[str, Any]], None] | None = None
        """Gets what the experts counted in a turn when it ends, on the thread that runs it."""

    def _open(self, opened: ExitStack, tap: Callable[[Engine], Engine] | None) -> None:
        """Open what `opened` then closes."""
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
        """The rate of the sound that comes out."""
        return self.bundle.manifest.codec.spec.sampling_rate

    @property
    def max_question_samples(self) -> int:
        """At 16 kHz: what the encoder hears at a time."""
        return max_samples(self._encoder_spec)

    @property
    def knows_whole(self) -> bool:
        """Whether its answers say whether the question is whole (`Answer.is_whole`)."""
        return self._judge.knows_whole

    def ask(self, question: Pcm | str) -> Generator[Piece | TurnDone, None, None]:
        """Answer a question: 16 kHz PCM (N,) of one utterance, float or int16, or text.

        A spoken question begins with its `Transcript`, and one that is refused goes on with
        `NotUnderstood`. The last event is `TurnDone`. A closed iterator ends the answer where it
        is.

        Raises AudioError if the PCM cannot be used, SettingsError if the text cannot, DoesNotFit if
        the question is too long for the context, BackendError or ExpertUnavailable if the model
        fails, UsageError if the answer before is not over, or the conversation is closed, busy in
        another thread, or another process's.
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
            if self._lifetime.is_open:  # else there is nothing to leave it in
                answer.finish()
                self._end_turn()
        yield TurnDone(answer.text, answer.metrics())
        self._trim_early()

    def _trim_early(self) -> None:
        """The answer is complete, and whoever asked goes on: nobody waits."""
        if not self._lifetime.is_open or (self._answer is not None and not self._answer.is_over):
            return
        try:
            self.trim_history()
        except EdgeError as error:  # the next question does it again, and fails with it if it must
            log.warning("between turns: %s", error)

    @while_open
    def user_started_speaking(self) -> None:
        """The user has begun to speak: what a prompt needs of the experts may be read meanwhile.
        Changes no answer."""
        self._experts.user_started_speaking()

    expect_question = old_method("expect_question", "user_started_speaking")

    def begin(self, question: Pcm | str) -> Answer:
        """An answer to advance step by step; the next one waits until this one is finished or
        discarded.

        Raises as `ask` does.
        """
        self._expect_no_answer()
        return self._begin(self._checked(question))

    def _begin(self, question: Array | str) -> Answer:
        self._expect_no_answer()
        self._answer = Answer(
            question,
            history=self._history,
            hear=self._backend.encoder.hear,
            open_decoding=self._open_decoding,
            lifetime=self._lifetime,
            judge=self._judge,
            gpu_stages=self._backend.gpu_stages,
        )
        return self._answer

    def _checked(self, question: Pcm | str) -> Array | str:
        """The question as the model gets it: PCM as the encoder takes it, text folded if the
        settings say so.

        Raises AudioError or SettingsError if it is neither.
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
            raise UsageError("the answer before is not over; exhaust, finish or discard it first")

    def listen(
        self,
        port: SoundPort | None = None,
        settings: LoopSettings | None = None,
        hearing: Hearing | None = None,
        *,
        recorder: Recorder | None = None,
        trace: Trace = NO_TRACE,
    ) -> LiveConversation:
        """Talk by voice: a context in which a thread listens, thinks and speaks, and an iterator
        over what happens. The conversation belongs to it until it is left.

        `port` is the system's microphone and loudspeaker by default.

        Raises UsageError if the conversation is closed or another process's.
        """
        self._lifetime.check()
        from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort
        from deeptalk_edge.runtime.loop.live import LiveConversation

        return LiveConversation(
            self, port or PyAudioPort(), settings, hearing, recorder=recorder, trace=trace
        )

    @while_open
    def idle(self) -> int:
        """Nobody talks: `trim_history`, and let the experts that are likely be read. It would be
        done in time anyway.

        Raises UsageError as `ask` does, BackendError or ExpertUnavailable if the model fails.
        """
        self._expect_no_answer()
        self._end_turn()
        try:
            return self._history.trim()
        finally:
            self._experts.idle()

    make_room = old_method("make_room", "idle")

    @while_open
    def trim_history(self) -> int:
        """Drop the oldest turns where the next one is too many or might not fit, and have the
        system prompt read before the first one; returns how many turns went. It would be done in
        time anyway: call it while nobody waits for an answer. `ask` does, after the last event.

        Raises UsageError as `ask` does, BackendError or ExpertUnavailable if the model fails.
        """
        self._expect_no_answer()
        return self._history.trim()

    @contextmanager
    def record_routes(self, path: Path) -> Iterator[None]:
        """Take down which experts every row chooses; the file is written when the block ends. A
        full disk is a warning then.

        Raises SettingsError at once if `path` cannot be written, UsageError if a block like this is
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
            self._history.reset()

    def close(self) -> None:
        """End the answer under way and give everything back; doing it twice is doing it once."""
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
            self._history.num_turns,
            last_row,
            settings=self.settings,
            manifest=self.bundle.manifest,
            engine=self._engine,
            codec=self._backend.codec,
            text=self._tokenizer.stream(),
            meter=meter,
        )
