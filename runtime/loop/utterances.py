"""The utterances of a recording, cut at the same places as the live loop cuts them.

The loop's state machine (`states.py`) gets the frames, with the loop's detector and timeouts.
Answers take no time here, so no speech overlaps them. One thing differs: the model's confidence in
its first words, which can end a pause sooner live, is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import open_detector
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn, open_end_of_turn
from deeptalk_edge.runtime.audio.level import loud_dbfs, raise_quiet
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.loop import signals, states
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.states import Loop, State
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import resample

Array = NDArray[np.float32]
Span = tuple[int, int]


def read_utterances(
    path: Path, max_question_samples: int, *, end_of_turn: EndOfTurn | None = None
) -> list[Array]:
    """Read each utterance of a sound file of any rate and channel count: 16 kHz mono (N,), at most
    `max_question_samples` long. Speech that is too quiet is amplified.

    Raises AudioError if the file cannot be used or there is no speech in it.
    """
    pcm = raise_quiet(resample(read_sound(path), RATE_HZ).pcm, str(path))
    cutter = UtteranceCutter(
        LoopSettings().within(max_question_samples),
        open_detector(),
        end_of_turn or open_end_of_turn(),
    )
    spans = list(cutter.cut(pcm))
    if not spans:
        raise AudioError(
            f"{path}: no speech heard in {len(pcm) / RATE_HZ:.1f} s of sound, the loudest of it at "
            f"{loud_dbfs(pcm):.0f} dBFS; speak up, move closer, or check the microphone"
        )
    return [pcm[start:end] for start, end in spans]


class UtteranceCutter:
    """Cuts one recording. Not thread-safe."""

    def __init__(
        self, settings: LoopSettings, detector: VoiceDetector, end_of_turn: EndOfTurn
    ) -> None:
        self._settings, self._detector, self._end_of_turn = settings, detector, end_of_turn
        self._loop = Loop()
        self._start = self._end = 0  # of the present utterance, or of the last one

    def cut(self, pcm: Array) -> Iterator[Span]:
        """Return the samples [start, end) of every utterance in 16 kHz PCM (N,), in order and
        disjoint."""
        for start in range(0, len(pcm), FRAME_SAMPLES):
            frame = pcm[start : start + FRAME_SAMPLES]
            frame = np.pad(frame, (0, FRAME_SAMPLES - len(frame)))
            is_voiced = self._detector.is_voiced(frame)
            if self._push(is_voiced, start + FRAME_SAMPLES, pcm):
                yield self._start, min(self._end, len(pcm))
        now = -(-len(pcm) // FRAME_SAMPLES) * FRAME_SAMPLES
        while self._loop.state is not State.LISTENING:  # silence follows
            now += FRAME_SAMPLES
            if self._push(False, now, pcm):
                yield self._start, min(self._end, len(pcm))

    def _push(self, is_voiced: bool, now: int, pcm: Array) -> bool:
        """Take a frame; True if it ends an utterance."""
        actions = self._step(signals.Frame(is_voiced), now)
        for action in actions:
            match action:
                case signals.UserStartedSpeaking(start):
                    self._start = max(start, self._end)  # no overlap with the last one
                case signals.JudgePause(end):
                    hangover_ms = self._end_of_turn.hangover_ms(pcm[self._start : end])
                    self._step(signals.HangoverChosen(hangover_ms), now)
                case signals.BeginAnswer(_, end):
                    self._end = end
                case signals.CommitAnswer(epoch):
                    self._settings.warn_if_cut(self._loop.last_voice - self._loop.opened)
                    self._step(signals.SoundBegan(epoch, interruptible=False), now)
                    self._step(signals.AnswerHeard(epoch), now)
                    return True
        return False

    def _step(self, event: signals.Event, now: int) -> tuple[signals.Action, ...]:
        self._loop, actions = states.step(self._loop, event, now, self._settings)
        return actions
