"""The fake backend answers without weights, and equal questions equally."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import AudioChunk, TurnDone
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.runtime.sounds import voice


@pytest.fixture
def talk(bundle: Bundle) -> Iterator[Conversation]:
    settings = replace(ConversationSettings.of(bundle), backend="fake", max_rows=200)
    with Conversation(bundle, settings) as talk:
        yield talk


def answer(talk: Conversation, question: object) -> tuple[str, bytes]:
    *events, done = talk.ask(question)  # type: ignore[arg-type]
    assert isinstance(done, TurnDone)
    return done.text, b"".join(e.pcm.tobytes() for e in events if isinstance(e, AudioChunk))


@pytest.mark.parametrize("question", ["Why?", voice(0.5)], ids=["typed", "spoken"])
def test_a_question_asked_again_gets_the_same_answer(talk: Conversation, question: object) -> None:
    text, sound = answer(talk, question)
    assert text.startswith("This is answer ")
    assert text.endswith(" of the fake backend.")
    talk.reset()
    assert answer(talk, question) == (text, sound)


def test_other_questions_get_other_answers(talk: Conversation) -> None:
    answers = set()
    for question in ("Why?", "Who?", voice(0.5), voice(0.6)):
        talk.reset()
        answers.add(answer(talk, question))
    assert len(answers) == 4


def test_an_answer_has_tones_in_proportion_to_its_text(talk: Conversation) -> None:
    text, sound = answer(talk, "Why?")
    pcm = np.frombuffer(sound, np.float32)
    num_ids = len(text.encode()) + 1  # the test's tokenizer gives bytes, and EOS
    assert len(pcm) == 3 * num_ids * 2048
    assert 0.09 < np.abs(pcm).max() <= 0.1


def test_no_weight_is_read(bundle_path: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    bundle = Bundle.open(place)
    for name in bundle.manifest.files:
        if name != "tokenizer.json":
            (place / name).unlink()
    with Conversation(bundle, replace(ConversationSettings.of(bundle), backend="fake")) as talk:
        assert talk.setup.backend == "fake"
        assert answer(talk, "Why?")[0]


def test_run_says_that_the_fake_answered(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--backend", "fake", "--text", "Why?"]
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["backend"], record["kernel_path"]) == ("fake", None)
