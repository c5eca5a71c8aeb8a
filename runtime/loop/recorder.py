"""Records a session, if the user wants it: the microphone's and the loudspeaker's sound.

files    `microphone.wav` and `loudspeaker.wav`, 16 kHz, with the same length and clock. They have
         these names from the first frame on and are valid WAV files at every moment. Nothing else
         in this package writes users' speech
numbers  a pair never replaces another: the next one is `microphone-2.wav`, `loudspeaker-2.wav`. A
         session that fills a pair continues in the next
failure  if a recording cannot continue, it logs a warning and keeps its files; the session
         continues
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from deeptalk_edge.errors import AudioError, DoesNotFit, EdgeError
from deeptalk_edge.files import refusing
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.sound.wav import MAX_BYTES, WavWriter

log = logging.getLogger(__name__)


_NAMES = ("microphone", "loudspeaker")


def is_recording(name: str) -> bool:
    """Whether a recorder could give a file this name."""
    return re.fullmatch(rf"({'|'.join(_NAMES)})(-\d+)?\.wav", name) is not None


class Recorder:
    """Writes frames as they come; `close` completes the files."""

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """A file gets at most `max_bytes` of samples.

        Raises AudioError if the directory cannot be written to. A full disk gives a warning.
        """
        self._directory, self._max_bytes = directory, max_bytes
        self._pair: tuple[WavWriter, ...] = ()
        with refusing(directory, AudioError):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            self._pair = _next_pair(directory)
        except DoesNotFit as error:
            self._give_up(error)

    def push(self, frame: MicFrame) -> None:
        """Write 20 ms; never raises an error of the disk."""
        if not self._pair:
            return
        try:
            if 2 * (self._pair[0].num_samples + len(frame.pcm)) > self._max_bytes:
                self.close()
                self._pair = _next_pair(self._directory)
            for writer, pcm in zip(self._pair, (frame.pcm, frame.far), strict=True):
                writer.write(pcm)
        except EdgeError as error:
            self._give_up(error)

    def close(self) -> None:
        """Complete the files; idempotent."""
        pair, self._pair = self._pair, ()
        for writer in pair:
            try:
                writer.close()
            except EdgeError as error:
                log.warning("%s", error)

    def _give_up(self, error: EdgeError) -> None:
        """Complete both files and stop recording."""
        log.warning("the recording ends here: %s", error)
        num_samples = min((writer.num_samples for writer in self._pair), default=0)
        for writer in self._pair:
            with suppress(EdgeError):  # one warning is enough
                writer.cut(num_samples)
        self.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _next_pair(directory: Path) -> tuple[WavWriter, WavWriter]:
    """Open the first pair of which neither file exists.

    Raises AudioError if it cannot be opened, DoesNotFit if the disk is full.
    """
    for number in itertools.count(1):
        end = "" if number == 1 else f"-{number}"
        places = [directory / f"{name}{end}.wav" for name in _NAMES]
        if not any(os.path.lexists(place) for place in places):
            break
    first = WavWriter(places[0], RATE_HZ, is_new=True)
    try:
        return first, WavWriter(places[1], RATE_HZ, is_new=True)
    except BaseException:
        first.close()
        raise
