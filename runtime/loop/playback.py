"""Playback of one answer: which samples were sent, which were heard, and where to resume.

heard     samples of this answer that the device was given. A pause flushes the queue and keeps the
          samples that were not heard; the answer resumes there
silent    before the answer is committed, neither sound nor text is sent
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
        """Whether the answer is complete: nothing will be added."""
        self.made = 0
        """Samples added so far."""
        self.text: list[TextPiece | Transcript | NotUnderstood] = []
        """Text that was added and not shown."""
        self._port = port
        self._ahead = port.rate_hz  # most samples in the port's queue: 1 s
        self._chunks: deque[tuple[int, Array]] = deque()  # chunks that may not have been heard
        self._sent = 0
        self._base: int | None = None  # the port's position of the answer's first sample

    def add(self, piece: Piece) -> None:
        """Add a piece of the answer."""
        if isinstance(piece, AudioChunk):
            self._chunks.append((self.made, piece.pcm))
            self.made += piece.pcm.size
        else:
            self.text.append(piece)

    def send(self) -> list[AudioChunk]:
        """Queue samples that the port has room for; returns them in chunks."""
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
        """Samples given to the device."""
        return 0 if self._base is None else self._port.handed - self._base

    @property
    def audible(self) -> int:
        """Samples that have been audible."""
        return 0 if self._base is None else max(self._port.audible() - self._base, 0)

    @property
    def is_heard(self) -> bool:
        """Whether all samples have been audible."""
        return self.is_written and not self.is_paused and self.audible >= self.made

    def pause(self) -> int:
        """Stop the sound; returns the number of samples heard."""
        self.is_paused = True
        if self._base is not None:
            self._sent = min(self._port.flush() - self._base, self.made)
        return self._sent

    def resume(self) -> None:
        """Continue where the sound stopped."""
        self.is_paused = False

    def _next(self, most: int) -> Array:
        """Return at most `most` samples from `_sent` on; drops samples heard long before."""
        while self._chunks[0][0] + self._chunks[0][1].size <= min(self._sent, self.heard):
            self._chunks.popleft()
        start, pcm = next(c for c in self._chunks if c[0] + c[1].size > self._sent)
        return pcm[self._sent - start :][:most]
