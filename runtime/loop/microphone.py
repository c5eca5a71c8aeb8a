"""The microphone's side of the loop: where it is, what it brings, and the question out of it.

position  samples, 16 kHz; they go on where the port's begin anew
sound     without the echo of the loudspeaker; kept for the question, and pushed to the stop
          listener while the user speaks over an answer
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.echo import EchoCanceller
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.loop.clock import SampleClock
from deeptalk_edge.runtime.loop.mic_buffer import MicBuffer
from deeptalk_edge.runtime.loop.states import SAMPLES_PER_MS
from deeptalk_edge.runtime.loop.stop_listener import StopListener

Array = NDArray[np.float32]

_STOP_WORD_MS = 1000  # from a voice's first sound over an answer to the end of a stop word


class Microphone:
    """Frames of 20 ms in, voice and questions out. One owner; not thread-safe."""

    def __init__(
        self,
        *,
        max_question_samples: int,
        detector: VoiceDetector,
        canceller: EchoCanceller,
        clock: SampleClock,
        stop_listener: StopListener | None,
    ) -> None:
        self._max_question_samples = max_question_samples
        self._detector, self._canceller, self._clock = detector, canceller, clock
        self.stop_listener = stop_listener
        """Works beside the loop; None if there are no stop words."""
        self.buffer = MicBuffer()
        self.now = 0
        """The end of the last frame."""
        self.num_waiting = 0
        """Samples that wait to be read."""
        self._offset = 0  # of the port's positions, which begin anew when it is reopened
        self._stop_word_end = 0  # where the stop-word listener has stopped

    def num_missed(self, frame: MicFrame) -> int:
        """Samples that were lost before this frame."""
        return max(self._offset + frame.start - self.now, 0)

    def push(self, frame: MicFrame) -> bool:
        """Take 20 ms; returns whether there is a voice in it."""
        start = self._offset + frame.start
        self.now = start + FRAME_SAMPLES
        self.num_waiting = frame.num_waiting * FRAME_SAMPLES
        self._clock.arrived(self.now)
        pcm = self._canceller.process(frame.pcm, frame.far)
        self.buffer.push(start, pcm)
        if self.stop_listener and start < self._stop_word_end:
            self.stop_listener.push(pcm)
        return self._detector.is_voiced(pcm)

    def wait(self, samples: int) -> None:
        """Time passes without frames."""
        self.now += samples

    def reopen(self) -> None:
        """The port's positions begin at 0 again."""
        self._offset = self.now

    def question(self, end: int) -> Array:
        """The open utterance up to `end`, (N,), as much as the model hears at a time."""
        return self.buffer.utterance(end, longest=self._max_question_samples)

    def listen_for_stop_word(self, opened: int, pre_roll_ms: int) -> None:
        """Now, and in the frames that come: the user speaks over the answer since `opened`."""
        listener = self.stop_listener
        if listener is None:
            return
        self._stop_word_end = opened + _STOP_WORD_MS * SAMPLES_PER_MS
        listener.begin(opened)
        start = max(opened - pre_roll_ms * SAMPLES_PER_MS, 0)
        for place in range(start, self.now, FRAME_SAMPLES):
            listener.push(self.buffer.sound(place, min(place + FRAME_SAMPLES, self.now)))
