"""The differences that `bench same_as` reports."""

from __future__ import annotations

import pytest

from deeptalk_edge.bench.same_as import differing

SEEN = {"cpu/embed.onnx": "aa", "cpu, ort, text 0": "yes"}


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (SEEN, []),
        ({**SEEN, "cpu, ort, text 0": "no"}, ["cpu, ort, text 0"]),
        ({"cpu/embed.onnx": "aa"}, ["cpu, ort, text 0"]),
        ({**SEEN, "cpu/extra.onnx": "bb"}, ["cpu/extra.onnx"]),
    ],
    ids=["equal", "changed", "lost", "new"],
)
def test_changed_missing_and_new_observations_differ(
    other: dict[str, str], names: list[str]
) -> None:
    assert differing(SEEN, other) == names
