"""A recording of a session, for those who ask for one: what was heard and what was played.

`microphone.wav` and `loudspeaker.wav` have the same length and the same clock, 16 kHz; nothing else
in this package writes what people say.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from deeptalk_edge.errors import AudioError
from deeptalk_edge.features import RATE_HZ
from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.runtime.audio.wav import WavWriter


class Recorder:
    """Writes frames as they come; closing it completes the files."""

    def __init__(self, directory: Path) -> None:
        """Raises AudioError if the directory cannot be written to."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AudioError(f"{directory}: cannot be written ({error.strerror})") from error
        self._stack = ExitStack()
        self._microphone, self._loudspeaker = (
            self._stack.enter_context(WavWriter(directory / name, RATE_HZ))
            for name in ("microphone.wav", "loudspeaker.wav")
        )

    def push(self, frame: MicFrame) -> None:
        """Take 20 ms."""
        self._microphone.write(frame.pcm)
        self._loudspeaker.write(frame.far)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
