"""The two streams of a sound device: their callbacks, and what the reader does with the sound.

callbacks   copy between PortAudio's buffer and a ring, count, and note the time. The reader
            resamples the microphone's rate; the loudspeaker's callback resamples, because it alone
            knows what comes next
positions   include the resampler's delay of 2 ms in what is heard and in the far end. The
            microphone's frames are late by those 2 ms
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.play_queue import PlayQueue, Taken
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, PLAY_RATE_HZ
from deeptalk_edge.runtime.audio.ring import SampleRing
from deeptalk_edge.runtime.audio.sound_cards import SoundFormat
from deeptalk_edge.sound.pcm import Downmix, as_int16
from deeptalk_edge.sound.rates import StreamResampler

Array = NDArray[np.float32]
Clock = Callable[[], float]
"""Clock in seconds."""

BLOCK_SAMPLES = PLAY_RATE_HZ * FRAME_MS // 1000
"""Samples of a block of the loudspeaker: 480."""

_RING_S = 15.0  # lag of a reader on a busy machine that still loses nothing
_START_S = 2.0  # a device's first callback may take longer than the others
_FAR_LEAD_BLOCKS = 2  # with more, the far end could come after its echo
_FAR_WATCH = 50  # blocks in one second
_FAR_WAIT_S = 0.06
_FAR_SILENT_S = 0.2  # without a callback: then the loudspeaker has stalled and is not waited for
_FAR_WAIT_BLOCKS = 2  # a reader with a larger lag does not wait, but catches up
_CONTINUE, _INPUT_OVERFLOW = 0, 2  # PortAudio's constants


class InputStream:
    """The microphone's stream: its callback, and what the reader takes."""

    def __init__(self, fmt: SoundFormat, clock: Clock = time.perf_counter) -> None:
        block = fmt.rate_hz * FRAME_MS // 1000 * fmt.num_channels
        self.fmt, self._clock = fmt, clock
        self._block = block
        self._ring = SampleRing(int(_RING_S * fmt.rate_hz) * fmt.num_channels, block, np.int16)
        self._downmix = Downmix("the microphone")
        self._resampler = StreamResampler(fmt.rate_hz, RATE_HZ)
        self._ready = np.empty(0, np.float32)  # at 16 kHz, less than a frame between two reads
        self._arrived = threading.Event()
        self._num_given = 0
        self.num_callbacks = self.num_overruns = 0
        self.last_s = self._clock() + _START_S

    def callback(
        self, content: Any, num_frames: int, times: Mapping[str, float], status: int
    ) -> tuple[None, int]:
        self._ring.push(np.frombuffer(content, np.int16))
        self.num_callbacks += 1
        self.num_overruns += bool(status & _INPUT_OVERFLOW)
        self.last_s = self._clock()
        self._arrived.set()
        return None, _CONTINUE

    @property
    def num_dropped(self) -> int:
        """Samples at 16 kHz that were dropped."""
        return self._ring.num_dropped // self.fmt.num_channels * RATE_HZ // self.fmt.rate_hz

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz up to the end of the last frame, dropped ones included."""
        return self._num_given + self.num_dropped

    @property
    def num_waiting(self) -> int:
        """Blocks of 20 ms that have arrived and are not read."""
        return self._ring.available // self._block

    def frame(self, timeout_s: float) -> Array | None:
        deadline_s = self._clock() + timeout_s
        while len(self._ready) < FRAME_SAMPLES:
            self._arrived.clear()
            block = self._ring.pop(self._block)
            if block is not None:
                wide = block.reshape(-1, self.fmt.num_channels).astype(np.float32) / np.float32(
                    2**15
                )
                mono = self._downmix.push(wide)
                self._ready = np.concatenate([self._ready, self._resampler.push(mono)])
            elif not self._arrived.wait(max(deadline_s - self._clock(), 0.0)):
                return None
        pcm, self._ready = np.split(self._ready, [FRAME_SAMPLES])
        self._num_given += FRAME_SAMPLES
        return pcm


class OutputStream:
    """The loudspeaker's stream: its callback, the sound it was given, and when that is heard."""

    def __init__(
        self, fmt: SoundFormat, queue: PlayQueue, clock: Clock = time.perf_counter
    ) -> None:
        self.fmt, self._queue, self._clock = fmt, queue, clock
        num_frames = fmt.rate_hz * FRAME_MS // 1000
        self._block = np.zeros(BLOCK_SAMPLES, np.float32)
        self._wide = np.zeros((num_frames, fmt.num_channels), np.int16)
        self._far = SampleRing(int(_RING_S * PLAY_RATE_HZ), BLOCK_SAMPLES, np.float32)
        self._far_resampler = StreamResampler(PLAY_RATE_HZ, RATE_HZ)
        self._is_starting = True
        self._arrived = threading.Event()
        self._leads: deque[int] = deque(maxlen=_FAR_WATCH)
        self._resampler = StreamResampler(PLAY_RATE_HZ, fmt.rate_hz)
        self._ready = np.empty(0, np.float32)  # at the device's rate
        # The last 64 blocks: time at which the first sample is heard, and the content.
        self._heard: list[tuple[float, Taken]] = [(0.0, Taken(0, 0))] * 64
        self.num_callbacks = self._num_blocks = 0
        self.last_s = self._clock() + _START_S

    def callback(
        self, content: Any, num_frames: int, times: Mapping[str, float], status: int
    ) -> tuple[bytes, int]:
        now_s = self._clock()
        # Some drivers give no sensible time: then the block counts as heard at once.
        ahead_s = min(max(times["output_buffer_dac_time"] - times["current_time"], 0.0), 1.0)
        while len(self._ready) < num_frames:
            ready_s = len(self._ready) / self.fmt.rate_hz + self._resampler.waiting_s
            self._take(now_s + ahead_s + ready_s + self._resampler.late_s)
            self._ready = np.concatenate([self._ready, self._resampler.push(self._block)])
        native, self._ready = np.split(self._ready, [num_frames])
        self._wide[:] = as_int16(native)[:, None]
        self.num_callbacks += 1
        self.last_s = now_s
        return self._wide.tobytes(), _CONTINUE

    def _take(self, heard_s: float) -> None:
        taken = self._queue.take(self._block)
        self._heard[self._num_blocks % len(self._heard)] = heard_s, taken
        self._num_blocks += 1
        self._far.push(self._block)
        self._arrived.set()

    def audible(self) -> int:
        """Content samples heard by now."""
        # A device without callbacks plays nothing.
        now_s = min(self._clock(), self.last_s + 2 * FRAME_MS / 1000)
        return max(
            taken.start + min(int((now_s - heard_s) * PLAY_RATE_HZ), taken.size)
            for heard_s, taken in self._heard
            if heard_s <= now_s
        )

    def far_frame(self, num_waiting: int) -> Array:
        """Sound that the loudspeaker was given in the time of the microphone's oldest block.

        To the canceller, any shift between the two is a new echo path. So the far end starts one
        block ahead, a late callback is waited for, and a block is skipped only if the far end was
        too far ahead for a whole second. Zeros replace a block that does not come.
        """
        lead = self._far.available // BLOCK_SAMPLES - num_waiting
        self._leads.append(lead)
        if self._is_starting and lead > 0:
            self._is_starting = False
            self._far.pop((lead - 1) * BLOCK_SAMPLES)
        elif len(self._leads) == _FAR_WATCH and min(self._leads) > _FAR_LEAD_BLOCKS:
            self._far.pop(BLOCK_SAMPLES)
            self._leads.clear()
        self._arrived.clear()
        block = self._far.pop(BLOCK_SAMPLES)
        is_alive = self._clock() - self.last_s < _FAR_SILENT_S
        may_wait = is_alive and not self._is_starting and num_waiting <= _FAR_WAIT_BLOCKS
        if block is None and may_wait and self._arrived.wait(_FAR_WAIT_S):
            block = self._far.pop(BLOCK_SAMPLES)
        return self._far_resampler.push(np.zeros_like(self._block) if block is None else block)
