"""The voice loop's timeouts are those of docs/runtime.md."""

from __future__ import annotations

import re

import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.loop.settings import LoopSettings
from tests.places import ROOT

OWN = LoopSettings()


def states_of_the_page() -> dict[str, str]:
    """The exits of each state, from the table in docs/runtime.md."""
    page = (ROOT / "docs" / "runtime.md").read_text("utf-8")
    table = page.partition("| state | what ends it |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([\w ,]+) \| (.*) \|$", table, re.MULTILINE))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            "listening",
            f"{OWN.start_ms} ms of voice; the utterance includes the {OWN.pre_roll_ms}",
        ),
        ("user speaking", f"After {OWN.max_utterance_ms // 1000} s, or"),
        ("endpointing", f"{OWN.speculate_ms} ms of silence begin"),
        ("thinking", f"It fails after {OWN.thinking_ms // 1000} s"),
        ("speaking", f"{OWN.duck_ms} ms of voice ("),
        (
            "speaking",
            f"({OWN.confirm_ms} ms within its first {OWN.warm_up_ms} ms) make it",
        ),
        ("overlap", f"{OWN.confirm_ms} ms of voice stop the answer"),
        ("interrupted", f"{OWN.turn_ms} ms of voice are a turn"),
        ("false interruption", f"{OWN.resume_answer_ms / 1000} s of silence"),
        (
            "stopped by a word",
            f"{OWN.turn_ms} ms of voice are a turn, and {OWN.release_ms} ms",
        ),
    ],
)
def test_the_docs_page_has_every_timeout(state: str, words: str) -> None:
    assert words in states_of_the_page()[state]


def test_a_duck_is_12_db() -> None:
    assert OWN.duck_gain == pytest.approx(10 ** (-12 / 20), abs=0.002)


@pytest.mark.parametrize("name", [n for n in LoopSettings.__slots__ if n.endswith("_ms")])
def test_a_timeout_is_at_least_a_frame(name: str) -> None:
    if name == "pre_roll_ms":
        assert LoopSettings(pre_roll_ms=0).pre_roll_ms == 0
        return
    with pytest.raises(SettingsError, match=f"{name} = {FRAME_MS - 1}"):
        LoopSettings(**{name: FRAME_MS - 1})  # type: ignore[arg-type]
