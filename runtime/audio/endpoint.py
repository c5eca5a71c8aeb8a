"""Endpointing: when has the user finished the utterance?

opens    after `start_ms` of voiced frames
closes   after `hangover_ms` of unvoiced frames

A frame is 20 ms. The utterance begins `pre_roll_ms` before the first voiced frame, because
detectors miss soft first consonants, and ends `tail_ms` after the last one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from deeptalk_edge.errors import SettingsError

FRAME_MS = 20


class Edge(enum.Enum):
    """An edge of an utterance that a frame completes."""

    OPENED = "opened"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """Times of voice and silence before an edge counts, and margins of an utterance, in ms."""

    start_ms: int = 60
    """Voiced time before an utterance opens."""

    hangover_ms: int = 500
    """Unvoiced time before it closes; longer cuts fewer pauses and adds to the latency."""

    pre_roll_ms: int = 300
    """Sound kept before the first voiced frame."""

    tail_ms: int = 200
    """Sound kept after the last voiced frame."""

    def __post_init__(self) -> None:
        if self.start_ms < FRAME_MS or self.hangover_ms < FRAME_MS:
            raise SettingsError(
                f"start_ms = {self.start_ms}, hangover_ms = {self.hangover_ms}: a frame is "
                f"{FRAME_MS} ms already"
            )
        if self.pre_roll_ms < 0 or self.tail_ms < 0:
            raise SettingsError("pre_roll_ms and tail_ms: expected 0 or more")


class Endpointer:
    """Turns voiced and unvoiced frames into utterance edges. One per stream; not thread-safe."""

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        self._open = False
        self._run_ms = 0  # time that frames have disagreed with `_open`

    @property
    def is_open(self) -> bool:
        return self._open

    def push(self, voiced: bool) -> Edge | None:
        """Take one frame's verdict; return the edge that this frame completes, if any."""
        if voiced == self._open:
            self._run_ms = 0
            return None
        self._run_ms += FRAME_MS
        need_ms = self._settings.hangover_ms if self._open else self._settings.start_ms
        if self._run_ms < need_ms:
            return None
        self._open, self._run_ms = voiced, 0
        return Edge.OPENED if voiced else Edge.CLOSED


def voiced_span(verdicts: Iterable[bool], settings: EndpointSettings) -> tuple[int, int] | None:
    """Return the frames [first, end) from the first opening to the last voiced frame after it.

    Returns None if nothing opened. Pauses of any length belong to the utterance.
    """
    endpointer = Endpointer(settings)
    first, end = None, 0
    for frame, voiced in enumerate(verdicts):
        edge = endpointer.push(voiced)
        if edge is Edge.OPENED and first is None:
            first = frame + 1 - -(-settings.start_ms // FRAME_MS)
        if voiced and endpointer.is_open:
            end = frame + 1
    return None if first is None else (first, end)
