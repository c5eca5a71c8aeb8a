"""A checkpoint whose routers never choose 11 of 16 experts, calibrated whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.bench.skewed_router import SEEN, ours, write_skewed
from tests.places import QUESTIONS_FOLDER, TINY


@pytest.mark.slow
def test_unseen_experts_fail_the_run_by_name_and_are_topped_up_with_a_lower_floor(
    tmp_path: Path,
) -> None:
    write_skewed(TINY, QUESTIONS_FOLDER, tmp_path / "checkpoint")
    found = ours(tmp_path / "checkpoint", QUESTIONS_FOLDER, tmp_path)
    num_unseen = 3 * (16 - len(SEEN))
    assert found["experts"] == 48
    assert found["unseen"] == found["topped_up"] == num_unseen == 33
    assert found["default_floor_status"] == 1
    assert "33 of 48 experts" in found["default_floor_says"]
    assert "layer 1 expert 3 (text, 0)" in found["default_floor_says"]
    assert "layer 1 expert 10 (audio, 0)" in found["default_floor_says"]
    assert 0 < found["worst_error"] < 0.2
