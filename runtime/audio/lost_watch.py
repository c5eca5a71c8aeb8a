"""When is a sound device lost, and when is it only late?

both silent   for `lost_after_ms`: the device, or its service, is gone
one silent    while the other goes on, the service lives: that waits longer. A busy machine stalls
              the loudspeaker's stream by underruns, and starting it over mends that; no question
              is lost with it, as with a device that is opened again
"""

from __future__ import annotations

from typing import NamedTuple


class Signs(NamedTuple):
    """When each direction last called back, in seconds of one clock."""

    input_s: float
    output_s: float


class Lost(NamedTuple):
    """A direction that is lost."""

    direction: str
    silent_ms: float


def find_lost(now_s: float, signs: Signs, *, both_after_ms: int, one_after_ms: int) -> Lost | None:
    """The direction that has been silent for longest, if that is too long; else None."""
    silent_ms = {
        "input": (now_s - signs.input_s) * 1000,
        "output": (now_s - signs.output_s) * 1000,
    }
    direction = max(silent_ms, key=lambda name: silent_ms[name])
    if min(silent_ms.values()) > both_after_ms or silent_ms[direction] > one_after_ms:
        return Lost(direction, silent_ms[direction])
    return None
