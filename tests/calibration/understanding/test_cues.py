"""What a model makes of recordings: each is asked by itself, and some not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.understanding.cues import measure
from deeptalk_edge.calibration.understanding.recordings import Recording
from tests.runtime.sounds import voice


def test_each_recording_is_asked_by_itself_and_one_that_is_too_long_is_left_out(
    bundle_path: Path,
) -> None:
    short = Recording(name="short", pcm=voice(0.5))
    too_long = replace(short, name="too long", pcm=voice(60.0))
    answered = replace(short, name="answered", answer="another answer")
    asked = [short, too_long, answered, short]
    first, second, third = measure(Bundle.open(bundle_path), asked, 1)
    assert [one.recording.name for one in (first, second, third)] == ["short", "answered", "short"]
    assert (first.mean_entropy, first.said) == (third.mean_entropy, third.said)
    np.testing.assert_array_equal(first.features, third.features)
    # Only where the right answer is known is more than the first rows written.
    assert second.mean_entropy == first.mean_entropy
    assert second.said.startswith(first.said)
    assert len(second.said) > len(first.said)
    assert [one.is_right for one in (first, second)] == [True, False]
    assert replace(second, said=" another answer ").is_right
