"""Numbers that a verb cannot use are refused with a line, before anything is read."""

from __future__ import annotations

import pytest

from deeptalk_edge.cli import main

_VERBS = {
    "calibrate": "calibrate C -o table",
    "eval": "train eval C TQAA=q.jsonl",
    "pairs": "train pairs C TQAA=q.jsonl -o p.jsonl",
    "split": "train split C TQAA=q.jsonl -o s.json",
    "check": "train check q.jsonl --checkpoint C",
    "speak": "train speak k.csv --checkpoint C -o k",
    "plan": "train plan joint",
}


@pytest.mark.parametrize(
    ("verb", "flag", "value", "expected"),
    [
        *((verb, "--max-samples", "0", "1 or more") for verb in ("eval", "pairs", "split")),
        ("calibrate", "--most-utterances", "0", "1 or more"),
        ("calibrate", "--threads", "0", "1 or more"),
        ("calibrate", "--threshold", "-1", "0 or more"),
        ("calibrate", "--floor", "x", "0 or more"),
        ("calibrate", "--seed", "-1", "0 or more"),
        ("pairs", "--samples", "-1", "1 or more"),
        ("pairs", "--temperature", "nan", "a number above 0"),
        ("pairs", "--top-k", "0", "1 or more"),
        ("pairs", "--seed", "-1", "0 or more"),
        ("check", "--max-rows", "0", "1 or more"),
        ("speak", "--takes", "many", "0 or more"),
        ("speak", "--held-out", "-1", "0 or more"),
        ("plan", "--gpus", "0", "1 or more"),
        ("plan", "--rows", "0", "1 or more"),
        ("plan", "--samples", "0", "1 or more"),
        ("plan", "--gpu-gb", "-80", "a number above 0"),
        ("plan", "--tflops", "inf", "a number above 0"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(
    verb: str, flag: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_VERBS[verb].split(), f"{flag}={value}"]) == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: {value}: expected" in error
    assert expected in error


def test_a_seed_beyond_64_bits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_VERBS["pairs"].split(), f"--seed={1 << 64}"]) == 1
    assert "64 bits" in capsys.readouterr().err
