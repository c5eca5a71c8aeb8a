"""One answer on its way through the loudspeaker: what was sent, what was heard, what can go on.

heard     samples of this answer that the device was handed; a pause flushes the queue and keeps
          what was not heard, and the answer goes on from there
silent    until it is committed, neither sound nor text leaves it
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.events import AudioChunk, NotUnderstood, Piece, TextPiece, Transcript
from deeptalk_edge.runtime.loop.settings import ReplyPolicy

Array = NDArray[np.float32]


class Playback:
    """The sound of one attempt. One owner; not thread-safe."""

    def __init__(self, epoch: int, port: SoundPort) -> None:
        self.epoch = epoch
        self.policy = ReplyPolicy()
        self.is_committed = False
        self.is_paused = False
        self.is_written = False
        """Nothing will be added."""
        self.made = 0
        """Samples added so far."""
        self.text: list[TextPiece | Transcript | NotUnderstood] = []
        """Added and not yet shown."""
        self._port = port
        self._ahead = port.rate_hz  # what waits in the port at most: 1 s
        self._chunks: deque[tuple[int, Array]] = deque()  # made and not known to be heard
        self._sent = 0
        self._base: int | None = None  # the port's position of our first sample

    def add(self, piece: Piece) -> None:
        """Take more of the answer."""
        if isinstance(piece, AudioChunk):
            self._chunks.append((self.made, piece.pcm))
            self.made += piece.pcm.size
        else:
            self.text.append(piece)

    def send(self) -> list[AudioChunk]:
        """Queue what the port has room for; returns it."""
        if not self.is_committed or self.is_paused:
            return []
        sent = []
        while self._sent < self.made and self._port.queued < self._ahead:
            if self._base is None:
                self._base = self._port.handed
            pcm = self._next(self._ahead - self._port.queued)
            self._port.write(pcm)
            self._sent += pcm.size
            sent.append(AudioChunk(pcm))
        if sent and self.is_written and self._sent == self.made:
            self._port.finish()
        return sent

    @property
    def heard(self) -> int:
        """Samples handed to the device."""
        return 0 if self._base is None else self._port.handed - self._base

    @property
    def audible(self) -> int:
        """Samples that have sounded by now."""
        return 0 if self._base is None else max(self._port.audible() - self._base, 0)

    @property
    def is_heard(self) -> bool:
        """All of it has sounded."""
        return self.is_written and not self.is_paused and self.audible >= self.made

    def pause(self) -> int:
        """Stop the sound; returns what was heard."""
        self.is_paused = True
        if self._base is not None:
            self._sent = min(self._port.flush() - self._base, self.made)
        return self._sent

    def resume(self) -> None:
        """Go on where the sound stopped."""
        self.is_paused = False

    def _next(self, most: int) -> Array:
        """Samples from `_sent` on; drops what was heard long before."""
        while self._chunks[0][0] + self._chunks[0][1].size <= min(self._sent, self.heard):
            self._chunks.popleft()
        start, pcm = next(c for c in self._chunks if c[0] + c[1].size > self._sent)
        return pcm[self._sent - start :][:most]
