"""When things happened to each answer, in samples of the microphone, and the metrics of its turn.

An answer that is begun is timed from its commit on; one that is discarded is only counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.events import VoiceMetrics
from deeptalk_edge.runtime.loop.clock import SampleClock
from deeptalk_edge.runtime.loop.playback import Playback
from deeptalk_edge.runtime.loop.states import SAMPLES_PER_MS


@dataclass(slots=True)
class _Timing:
    """Of one answer."""

    opened: int
    last_voice: int
    committed: int
    was_speculative: bool
    num_discarded: int
    underruns_before: int
    queued: int | None = None
    audible: int | None = None
    stop_ms: float | None = None
    heard_samples: int = 0

    @property
    def speech_s(self) -> float:
        return (self.last_voice - self.opened) / RATE_HZ


class TurnTimings:
    """Of the answers that are not finished yet. One owner; not thread-safe."""

    def __init__(self, port: SoundPort, clock: SampleClock) -> None:
        self._port, self._clock = port, clock
        self._open: dict[int, _Timing] = {}  # by epoch
        self._num_discarded = 0
        self._begun = 0  # when the attempt at hand was

    @property
    def is_empty(self) -> bool:
        """Every answer is finished."""
        return not self._open

    def begin(self, now: int) -> None:
        """An attempt begins with the frame that ended at `now`."""
        self._begun = now

    def commit(self, epoch: int, opened: int, last_voice: int, now: int) -> float:
        """The attempt answers the speech [opened, last_voice); returns its seconds."""
        self._open[epoch] = timing = _Timing(
            opened=opened,
            last_voice=last_voice,
            committed=self._clock.now(),
            was_speculative=self._begun < now,
            num_discarded=self._num_discarded,
            underruns_before=self._port.counters().underruns,
        )
        return timing.speech_s

    def discard(self, epoch: int) -> None:
        """The attempt was for nothing."""
        self._num_discarded += 1
        self._open.pop(epoch, None)

    def forget_discarded(self) -> None:
        """No answer is due: the next one counts from 0."""
        self._num_discarded = 0

    def follow(self, playback: Playback, *, has_sent: bool) -> bool:
        """Note how far the sound has come; returns whether its first samples were sent just now."""
        timing = self._open.get(playback.epoch)
        if timing is None:
            return False
        is_first = has_sent and timing.queued is None
        if is_first:
            timing.queued = self._clock.now()
        if timing.audible is None and (audible := playback.audible):
            timing.audible = self._clock.now() - audible * RATE_HZ // self._port.rate_hz
        return is_first

    def pause(self, epoch: int, opened: int, device_ms: float) -> None:
        """The answer stops for a voice that began at `opened`, after what the device holds."""
        self._open[epoch].stop_ms = (self._clock.now() - opened) / SAMPLES_PER_MS + device_ms

    def resume(self, epoch: int) -> None:
        """The answer goes on: nothing stopped it."""
        self._open[epoch].stop_ms = None

    def end(self, epoch: int, heard_samples: int) -> None:
        """No more of the answer is played."""
        self._open[epoch].heard_samples = heard_samples
        self._num_discarded = 0

    def finish(self, epoch: int) -> VoiceMetrics:
        """The turn is over."""
        timing = self._open.pop(epoch)
        return VoiceMetrics(
            speech_s=timing.speech_s,
            hangover_ms=(timing.committed - timing.last_voice) / SAMPLES_PER_MS,
            was_speculative=timing.was_speculative,
            num_discarded=timing.num_discarded,
            queued_ms=_since(timing.last_voice, timing.queued),
            audible_ms=_since(timing.last_voice, timing.audible),
            heard_s=timing.heard_samples / self._port.rate_hz,
            underruns=self._port.counters().underruns - timing.underruns_before,
            stop_ms=timing.stop_ms,
        )


def _since(start: int, moment: int | None) -> float | None:
    return None if moment is None else (moment - start) / SAMPLES_PER_MS
