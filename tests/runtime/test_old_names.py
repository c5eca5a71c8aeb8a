"""Renamed public names still work under their old names; CHANGELOG.md lists them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest

from deeptalk_edge import deprecation
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime import events
from deeptalk_edge.runtime.answer import Answer
from deeptalk_edge.runtime.audio.end_of_turn import HangoverSettings
from deeptalk_edge.runtime.conversation import Conversation
from tests.places import ROOT

_SURE: dict[str, Any] = {"sure_log_p": -0.5}  # a type checker knows no old keyword
OLD: dict[str, Callable[[], object]] = {
    "events.BargedIn": lambda: operator.attrgetter("BargedIn")(events) is events.Interrupted,
    "HangoverSettings.sure_log_p": lambda: (
        HangoverSettings(**_SURE) == HangoverSettings(confident_log_p=-0.5)
    ),
    "VoiceMetrics.was_on_trial": lambda: operator.attrgetter("was_on_trial")(
        events.VoiceMetrics(
            speech_s=1.0,
            hangover_ms=500.0,
            was_speculative=True,
            num_discarded=0,
            queued_ms=None,
            audible_ms=None,
            heard_s=0.0,
            underruns=0,
            stop_ms=None,
        )
    ),
}
METHODS = {
    "Conversation.expect_question": Conversation.expect_question,
    "Conversation.make_room": Conversation.make_room,
    "Answer.settle": Answer.settle,
}


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "_warned", set())


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_works_and_warns(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=name.split(".")[1]):
        assert OLD[name]()


def test_old_methods_and_keys_of_a_conversation_work_and_warn(bundle: Bundle) -> None:
    counts: list[dict[str, object]] = []
    with Conversation(bundle) as talk:
        talk.on_expert_counts = counts.append
        with pytest.warns(DeprecationWarning, match="user_started_speaking"):
            talk.expect_question()
        with pytest.warns(DeprecationWarning, match="called idle now"):
            assert talk.make_room() == 0
        answer = talk.begin("Why?")
        with pytest.warns(DeprecationWarning, match="called finish now"):
            assert answer.settle() == ""
    with pytest.warns(DeprecationWarning, match="all_resident_passes"):
        assert counts[0]["whole_passes"] == 0


def test_the_changelog_lists_every_old_name() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    for name in (*OLD, *METHODS, "whole_passes"):
        assert f"`{name.split('.')[-1]}`" in changes, name
