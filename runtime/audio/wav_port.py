"""A WAV file as the microphone, and a WAV file that records what the loudspeaker would play."""

from __future__ import annotations

import time
from pathlib import Path

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.ports import PLAY_RATE_HZ, MicFrame
from deeptalk_edge.runtime.audio.virtual_port import EchoPath, VirtualPort, recording
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import WavWriter, resample


class WavPort(VirtualPort):
    """Plays a recording into the loop, then silence; in real time or as fast as it is read.

    `read` raises DoesNotFit when the loudspeaker's file cannot grow. That file is the
    conversation's output, so the conversation ends and the file keeps what it has.
    """

    def __init__(
        self,
        microphone: Path,
        loudspeaker: Path | None = None,
        *,
        is_realtime: bool = True,
        echo: EchoPath | None = None,
    ) -> None:
        """`loudspeaker` gets the silences, too, so both files have one time line.

        Raises AudioError if the recording cannot be used or the other file cannot be written.
        """
        pcm = resample(read_sound(microphone), RATE_HZ).pcm
        self._num_samples = len(pcm)
        self._writer = WavWriter(loudspeaker, PLAY_RATE_HZ) if loudspeaker else None
        self._is_realtime = is_realtime
        self._due_s: float | None = None
        on_played = self._writer.write if self._writer else None
        super().__init__(recording(pcm), echo=echo, on_played=on_played)

    @property
    def is_over(self) -> bool:
        """Whether the recording has been read to its end."""
        return self._passed >= self._num_samples

    def read(self, timeout_s: float) -> MicFrame | None:
        if self._is_realtime:
            now_s = time.monotonic()
            due_s = now_s if self._due_s is None else self._due_s
            if due_s > now_s + timeout_s:
                time.sleep(timeout_s)
                return None
            time.sleep(max(due_s - now_s, 0.0))
            self._due_s = due_s + FRAME_MS / 1000
        return super().read(timeout_s)

    def close(self) -> None:
        super().close()
        if self._writer:
            self._writer.close()
