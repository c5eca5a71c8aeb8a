"""Progress of long work: lines in a log file, nothing of work that is short."""

from __future__ import annotations

import pytest

from deeptalk_edge import progress as module
from deeptalk_edge.progress import progress


def test_a_log_file_gets_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)
    assert list(progress("abc", name="hear", unit="clip", total=3)) == ["a", "b", "c"]
    out, err = capfd.readouterr()
    assert not out
    assert "\r" not in err
    lines = err.splitlines()
    assert all(line.startswith("hear: ") for line in lines)
    assert "0/3" in lines[0]
    assert "3/3" in lines[-1]


def test_short_work_leaves_a_log_file_empty(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], name="hear", unit="clip")) == [1, 2]
    assert list(progress([], name="hear", unit="clip")) == []
    assert capfd.readouterr().err == ""


def test_what_is_not_shown_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)
    bar = progress(name="train", unit="step", total=4, first=1, is_shown=False)
    bar.update()
    bar.close()
    assert capfd.readouterr().err == ""
