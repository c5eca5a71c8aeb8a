"""A bundle that answers utterances on a tape, and that another model's tape is replayed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.tape import Tape, TapedEngine, replay
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation, TextPiece
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.runtime.settings import BackendChoice, ConversationSettings
from deeptalk_edge.runtime.understanding import ANSWER_ALL

Array = NDArray[np.float32]


@dataclass(slots=True)
class AskedUtterance:
    """What one model did with one utterance."""

    texts: list[str] = field(default_factory=list)
    sounds: list[Array] = field(default_factory=list)


class TapedModel:
    """A bundle in conversation, whose engine calls and routes are recorded."""

    def __init__(
        self,
        bundle: Bundle,
        backend: BackendChoice,
        threads: int,
        seed: int,
        make_recorder: Callable[[], RouteRecorder] = RouteRecorder,
    ) -> None:
        settings = replace(
            ConversationSettings.of(bundle, seed=seed, threads=threads),
            backend=backend,
            understanding=ANSWER_ALL,  # a refused question has no rows to compare
        )
        self._make_recorder = make_recorder
        self.recorder = make_recorder()
        self.talk = Conversation(bundle, settings, tap=self._tap)
        self.rate_hz = self.talk.rate_hz

    def _tap(self, engine: Engine) -> Engine:
        self._experts = engine.experts  # type: ignore[attr-defined]
        self.engine = TapedEngine(engine)
        return self.engine

    def ask(self, utterance: Utterance, tape: Tape | None = None) -> AskedUtterance:
        """Answer each question of a conversation; on a tape, routes are recorded too."""
        asked = AskedUtterance()
        self._begin(tape)
        self.talk.reset()
        for turn in utterance.turns:
            text, sound = "", [np.zeros(0, np.float32)]
            for event in self.talk.ask(turn):
                if isinstance(event, TextPiece):
                    text += event.text
                elif isinstance(event, AudioChunk):
                    sound.append(event.pcm)
            asked.texts.append(text)
            asked.sounds.append(np.concatenate(sound))
        self._end()
        return asked

    def replay(self, tape: Tape) -> list[Logits]:
        """The logits for another model's rows, copied."""
        self._begin(Tape())
        found = [Logits(said.text.copy(), said.codes.copy()) for said in replay(tape, self.engine)]
        self._end()
        self.talk.reset()
        return found

    def steps(self) -> list[list[NDArray[np.int64]]]:
        """The experts of every decode step of the last tape: layer by layer, ids (N, k)."""
        return [
            [call.ids for call in each.calls]
            for each in self.recorder.passes
            if each.phase is Phase.SPEAKING
        ]

    def _begin(self, tape: Tape | None) -> None:
        self.engine.tape = tape
        self.recorder = self._make_recorder()
        self._experts.recorder = None if tape is None else self.recorder

    def _end(self) -> None:
        self.engine.tape = None
        self._experts.recorder = None
