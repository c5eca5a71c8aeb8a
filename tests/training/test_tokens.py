"""When codes that nothing uses are moved."""

from __future__ import annotations

import pytest

from deeptalk_edge.training.tiny.tokens import REVIVE_AFTER, TokenSettings


@pytest.mark.parametrize("num_steps", [700, 1000, 101])
def test_codes_are_revived_between_their_first_counts_and_the_last_fifth(num_steps: int) -> None:
    settings = TokenSettings(num_steps=num_steps)
    steps = range(num_steps)
    assert list(settings.revival_steps) == [
        step
        for step in steps
        if step % settings.revive_every == 0
        and step >= int(num_steps * settings.unquantised_share) + REVIVE_AFTER
        and step < int(num_steps * settings.revive_until)
    ]
