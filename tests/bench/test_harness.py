"""Common code of the benches: the list, the head and the last line."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from deeptalk_edge.bench import harness
from deeptalk_edge.bench.__main__ import BENCHES, main


def test_the_last_line_is_json_with_machine_settings_and_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = harness.arguments("soak", "Hours.").parse_args([])
    with harness.measured(args) as figures:
        print("a table")
        figures["answers"] = 3
    out = capsys.readouterr().out
    assert "a table" in out
    report = json.loads(out.splitlines()[-1])
    assert (report["bench"], report["figures"]) == ("soak", {"answers": 3})
    assert report["machine"]["cores"] > 0
    assert report["machine"]["numpy"]


def test_with_json_stdout_has_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = harness.arguments("soak", "Hours.").parse_args(["--json"])
    with harness.measured(args):
        print("a table")
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "a table" in said.err


def test_compared_code_alternates_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = harness.interleaved(ways, rounds=2)
    assert order == list("ababab")
    assert set(medians) == {"a", "b"}


@pytest.mark.parametrize("name", BENCHES)
def test_every_listed_bench_can_be_imported(name: str) -> None:
    assert find_spec(f"deeptalk_edge.bench.{BENCHES[name][0]}") is not None


def test_an_unknown_bench_is_refused_and_the_others_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["nothing"]) == 2
    assert "no nothing; there are answers" in capsys.readouterr().err
    assert main([]) == 0
    assert "voice_wait" in capsys.readouterr().out
