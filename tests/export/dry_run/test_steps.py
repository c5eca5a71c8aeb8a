"""Bytes, kernels and floors of a pass, from sizes alone."""

from __future__ import annotations

import json

import pytest

from deeptalk_edge.cli import main
from tests.places import OFFICIAL_SIZE


def steps(
    capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[tuple[str, int], dict[str, float]]:
    assert main(["export", str(OFFICIAL_SIZE), "--dry-run", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    return {(step["profile"], step["num_items"]): step for step in found}


def test_a_pass_of_the_official_size_has_its_bytes_kernels_and_floor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = steps(capsys, "--device", "agx-orin-64gb", "--precision", "experts=int4:128")
    assert len(found) == 5
    one, two = (found["decode, 1024 rows", items] for items in (1, 2))
    # A float16 decoder of 1.79 GB, a head of 0.54, experts of 0.70 an item, 1,024 rows of 31 kB.
    assert one["bytes"] == pytest.approx(1.79e9 + 0.54e9 + 0.70e9 + 0.03e9, rel=0.01)
    assert two["bytes"] - one["bytes"] == pytest.approx(0.73e9, rel=0.01)
    assert two["kernels"] == 26 * (27 + 2) + 24
    assert one["floor_ms"] == pytest.approx(one["bytes"] / 204.8e6)
    assert found["prompt of 256", 1]["bytes"] > 3 * one["bytes"]  # nearly every expert


def test_the_page_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(OFFICIAL_SIZE), "--dry-run", "--device", "rtx-4090"]) == 0
    page = capsys.readouterr().out
    assert "engine, computed from sizes; none was measured\n" in page
    assert page.count("ms at least") == 4
    assert "kernels" not in page  # without the plugin they were not counted


def test_without_engines_there_is_nothing_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps(capsys, "--device", "cpu-int8") == {}
