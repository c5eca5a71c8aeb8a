"""When is a sound device lost, and when is it only late?

both silent   neither direction called back for `lost_after_ms`: the device or the sound service is
              gone
one silent    the other direction goes on, so the service works: the limit is longer. A busy machine
              stalls the loudspeaker's stream by underruns; restarting that stream is enough and
              loses no question, while reopening the device does
"""

from __future__ import annotations

from typing import NamedTuple


class Signs(NamedTuple):
    """Time of each direction's last callback, in seconds of one clock."""

    input_s: float
    output_s: float


class Lost(NamedTuple):
    """A direction of a device that no longer calls back."""

    direction: str
    silent_ms: float


def find_lost(now_s: float, signs: Signs, *, both_after_ms: int, one_after_ms: int) -> Lost | None:
    """Return the direction that has been silent for longest, or None if that is within its
    limit."""
    silent_ms = {
        "input": (now_s - signs.input_s) * 1000,
        "output": (now_s - signs.output_s) * 1000,
    }
    direction = max(silent_ms, key=lambda name: silent_ms[name])
    if min(silent_ms.values()) > both_after_ms or silent_ms[direction] > one_after_ms:
        return Lost(direction, silent_ms[direction])
    return None
