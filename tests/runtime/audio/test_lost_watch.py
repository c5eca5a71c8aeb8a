"""A device is lost when neither direction calls back; one direction alone has a longer limit."""

from __future__ import annotations

import pytest

from deeptalk_edge.runtime.audio.lost_watch import Lost, Signs, find_lost


@pytest.mark.parametrize(
    ("input_ms", "output_ms", "lost"),
    [
        (0, 0, None),
        (500, 500, None),
        (501, 520, "output"),
        (900, 501, "input"),
        (0, 2900, None),  # a stream that is restarted
        (0, 3001, "output"),
        (3001, 0, "input"),
    ],
)
def test_a_direction_is_lost_with_the_other_or_after_longer(
    input_ms: int, output_ms: int, lost: str | None
) -> None:
    signs = Signs(100 - input_ms / 1000, 100 - output_ms / 1000)
    found = find_lost(100.0, signs, both_after_ms=500, one_after_ms=3000)
    assert (found and found.direction) == lost
    if isinstance(found, Lost):
        assert found.silent_ms == pytest.approx(max(input_ms, output_ms))
