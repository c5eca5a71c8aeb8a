"""The history keeps exactly the text of the heard sound."""

from __future__ import annotations

import pytest

from deeptalk_edge.model.spec import TextAlignment
from deeptalk_edge.runtime.heard_text import num_heard_ids
from tests.runtime.speaking_checkpoint import CODEC

FRAME = CODEC.frame_samples
SECOND = CODEC.sampling_rate


@pytest.mark.parametrize(
    ("alignment", "is_speech_done", "heard_samples", "expected"),
    [
        ("word", False, 0, 1),
        ("word", False, 3 * FRAME - 1, 2),
        ("word", True, 3 * FRAME, 3),
        ("word", True, 10 * FRAME, 20),
        ("ahead", True, 5 * FRAME, 10),
        ("ahead", True, 5 * FRAME - 1, 9),
        ("ahead", True, 10 * FRAME, 20),
        ("ahead", False, 2 * SECOND, 5),
        ("ahead", False, 0, 1),
    ],
)
def test_the_ids_that_were_heard_are_rounded_down_to_one_at_least(
    alignment: TextAlignment, is_speech_done: bool, heard_samples: int, expected: int
) -> None:
    found = num_heard_ids(
        heard_samples,
        num_ids=20,
        num_samples=10 * FRAME,
        is_speech_done=is_speech_done,
        codec=CODEC,
        alignment=alignment,
    )
    assert found == expected
