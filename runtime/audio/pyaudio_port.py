"""A live microphone and loudspeaker through PyAudio: two streams, 20 ms a callback.

lost      no callback for half a second (`lost_watch.py`), and every frame was read
stalled   the loudspeaker alone makes no callbacks: its stream is restarted once, the queue stays
closing   calls `close`, not `stop_stream`, which waits for a dead device; `close` has a time limit
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import DeviceLost, SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.lost_watch import Signs, find_lost
from deeptalk_edge.runtime.audio.play_queue import PlayQueue, QueuedPort
from deeptalk_edge.runtime.audio.ports import (
    FRAME_SAMPLES,
    PLAY_RATE_HZ,
    MicFrame,
    PortCounters,
)
from deeptalk_edge.runtime.audio.sound_cards import (
    Direction,
    SoundDevice,
    SoundFormat,
    choose_device,
    choose_format,
    list_devices,
    open_pyaudio,
)
from deeptalk_edge.runtime.audio.streams import BLOCK_SAMPLES, InputStream, OutputStream

if TYPE_CHECKING:
    import pyaudio

Array = NDArray[np.float32]
_Callback = Callable[[Any, int, Mapping[str, float], int], tuple[bytes | None, int]]

_ANSWER_S = 5.0  # limit for the sound system to open a device
_CLOSE_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """Names of the devices and how to open them."""

    input_name: str | None = None
    """Device name or a part of it; None is the system's default."""
    output_name: str | None = None
    input_rate_hz: int = RATE_HZ
    """Rate to open the device at; if it refuses, its own rate is resampled."""
    output_rate_hz: int = PLAY_RATE_HZ
    queue_s: float = 2.0
    """Bound of the queue of sound to play."""
    lost_after_ms: int = 500
    """Time without a callback of either direction until the device counts as lost."""
    one_lost_after_ms: int = 3000
    """Time without a callback of one direction, while the other goes on, until it counts as
    lost."""

    def __post_init__(self) -> None:
        for name in ("input_rate_hz", "output_rate_hz"):
            if getattr(self, name) < 8000 or getattr(self, name) % 50:
                raise SettingsError(
                    f"{name} = {getattr(self, name)}: expected 8000 or more, in steps of 50"
                )
        if self.queue_s < 0.1 or self.lost_after_ms < 2 * FRAME_MS:
            raise SettingsError(
                f"queue_s = {self.queue_s}, lost_after_ms = {self.lost_after_ms}: expected 0.1 s "
                f"and {2 * FRAME_MS} ms at least"
            )
        if self.one_lost_after_ms < self.lost_after_ms:
            raise SettingsError(
                f"one_lost_after_ms = {self.one_lost_after_ms}: expected lost_after_ms = "
                f"{self.lost_after_ms} at least"
            )


class PyAudioPort(QueuedPort):
    """The `SoundPort` of a real device. `read` to `close` belong to one thread."""

    rate_hz = PLAY_RATE_HZ

    def __init__(self, settings: DeviceSettings | None = None) -> None:
        self.settings = settings or DeviceSettings()
        super().__init__(PlayQueue(seconds=self.settings.queue_s, block_samples=BLOCK_SAMPLES))
        self._device: _OpenStreams | None = None
        self._before = PortCounters()  # sums of earlier openings
        self._num_opened = self._num_restarted = 0
        self._stalled_s: float | None = None  # last callback before the loudspeaker's restart

    def open(self) -> None:
        self.close()
        self._queue.rewind()
        opened: list[_OpenStreams] = []
        if not _in_time(lambda: opened.append(_open(self.settings, self._queue)), _ANSWER_S):
            raise DeviceLost(
                f"the sound system did not answer within {_ANSWER_S:.0f} s; restart its service"
            )
        (self._device,) = opened
        self._num_opened += 1

    def read(self, timeout_s: float) -> MicFrame | None:
        if self._device is None:
            raise DeviceLost("the sound device is not open; open it again")
        source, sink = self._device.input, self._device.output
        if not source.num_waiting:  # frames from before the loss are read first
            self._expect_signs(source, sink)
        pcm = source.frame(timeout_s)
        if pcm is None:
            return None
        start, num_waiting = source.num_samples - FRAME_SAMPLES, source.num_waiting
        return MicFrame(pcm, sink.far_frame(num_waiting), start, num_waiting)

    def _expect_signs(self, source: InputStream, sink: OutputStream) -> None:
        """Raises DeviceLost if a direction makes no callbacks."""
        lost = find_lost(
            time.perf_counter(),
            Signs(source.last_s, sink.last_s),
            both_after_ms=self.settings.lost_after_ms,
            one_after_ms=self.settings.one_lost_after_ms,
        )
        if lost:
            raise DeviceLost(
                f"the {lost.direction} device gave no sign for {lost.silent_ms:.0f} ms; plug it in "
                "again or restart the sound service"
            )
        silent_ms = (time.perf_counter() - sink.last_s) * 1000
        if silent_ms > self.settings.lost_after_ms and sink.last_s != self._stalled_s:
            self._stalled_s = sink.last_s
            self._restart_output()

    def _restart_output(self) -> None:
        """Raises DeviceLost if it cannot be started again."""
        device = self._device
        assert device is not None
        if not _in_time(device.restart_output, _ANSWER_S):
            raise DeviceLost(
                f"the output device did not start again within {_ANSWER_S:.0f} s; restart the "
                "sound service"
            )
        self._num_restarted += 1

    def audible(self) -> int:
        return self._device.output.audible() if self._device else 0

    def counters(self) -> PortCounters:
        before = replace(
            self._before,
            underruns=self._queue.num_underruns,
            restarts=max(self._num_opened - 1, 0) + self._num_restarted,
        )
        if self._device is None:
            return before
        device = self._device
        return replace(
            before,
            dropped_in=before.dropped_in + device.input.num_dropped,
            overruns=before.overruns + device.input.num_overruns,
            callbacks_in=before.callbacks_in + device.input.num_callbacks,
            callbacks_out=before.callbacks_out + device.output.num_callbacks,
        )

    def close(self) -> None:
        self._before = self.counters()
        device, self._device = self._device, None
        if device and not _in_time(device.close, _CLOSE_S):
            log.warning("the sound device did not close within %.0f s and stays open", _CLOSE_S)


@dataclass(slots=True, kw_only=True)
class _OpenStreams:
    """What one opening made."""

    audio: pyaudio.PyAudio
    input: InputStream
    output: OutputStream
    streams: list[pyaudio.PyAudio.Stream]
    """The microphone's and the loudspeaker's."""
    loudspeaker: SoundDevice

    def restart_output(self) -> None:
        """Raises DeviceLost if it does not open."""
        self.streams.pop().close()
        self.streams.append(
            _start(self.audio, self.loudspeaker, "output", self.output.fmt, self.output.callback)
        )

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.audio.terminate()


def _open(settings: DeviceSettings, queue: PlayQueue) -> _OpenStreams:
    """Raises DeviceLost if either device cannot be used."""
    audio = open_pyaudio()
    try:
        devices = list_devices(audio)
        microphone = choose_device(devices, settings.input_name, "input")
        loudspeaker = choose_device(devices, settings.output_name, "output")
        source = InputStream(_agree(audio, microphone, "input", settings.input_rate_hz))
        sink = OutputStream(_agree(audio, loudspeaker, "output", settings.output_rate_hz), queue)
        streams = [
            _start(audio, microphone, "input", source.fmt, source.callback),
            _start(audio, loudspeaker, "output", sink.fmt, sink.callback),
        ]
    except BaseException:
        audio.terminate()
        raise
    return _OpenStreams(
        audio=audio, input=source, output=sink, streams=streams, loudspeaker=loudspeaker
    )


def _agree(
    audio: pyaudio.PyAudio, device: SoundDevice, direction: Direction, rate_hz: int
) -> SoundFormat:
    import pyaudio

    def is_supported(fmt: SoundFormat) -> bool:
        about = {
            f"{direction}_device": device.index,
            f"{direction}_channels": fmt.num_channels,
            f"{direction}_format": pyaudio.paInt16,
        }
        try:
            return bool(audio.is_format_supported(fmt.rate_hz, **about))
        except ValueError:  # PyAudio's refusal
            return False

    return choose_format(device, direction, rate_hz, is_supported)


def _start(
    audio: pyaudio.PyAudio,
    device: SoundDevice,
    direction: Direction,
    fmt: SoundFormat,
    callback: _Callback,
) -> pyaudio.PyAudio.Stream:
    """Raises DeviceLost if the device does not open."""
    import pyaudio

    try:
        return audio.open(
            rate=fmt.rate_hz,
            channels=fmt.num_channels,
            format=pyaudio.paInt16,
            frames_per_buffer=fmt.rate_hz * FRAME_MS // 1000,
            stream_callback=callback,
            **{direction: True, f"{direction}_device_index": device.index},
        )
    except OSError as error:
        raise DeviceLost(
            f"{direction} device {device.name!r} does not open at {fmt.rate_hz} Hz ({error}); is "
            "another program holding it?"
        ) from error


def _in_time(action: Callable[[], None], limit_s: float) -> bool:
    """Run an action in a new thread and raise its error; False if it has not returned in time.

    Raises BackendError if the system refuses the thread.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="sound device", daemon=True)
    host.start_thread(thread)
    thread.join(limit_s)
    if errors:
        raise errors[0]
    return not thread.is_alive()
