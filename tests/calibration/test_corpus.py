"""A corpus accepts, refuses and chooses its samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.calibration.corpus import (
    Utterance,
    chosen_by_strata,
    default_corpus,
    read_corpus,
)
from deeptalk_edge.errors import SettingsError
from tests.calibration.conftest import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "en").mkdir()
    (tmp_path / "zh").mkdir()
    wav = next((TINY / "questions").glob("*.wav"))
    shutil.copy(wav, tmp_path / "en" / "asked.wav")
    (tmp_path / "en" / "asked.txt").write_text("where is it?\nover there\n", encoding="utf-8")
    (tmp_path / "zh" / "typed.txt").write_text("现在几点?\t三点\n你好\n", encoding="utf-8")
    turns = [{"text": "hello", "answer": "good day"}, {"wav": "en/asked.wav"}]
    (tmp_path / "talk.json").write_text(json.dumps(turns), encoding="utf-8")
    return tmp_path


def test_recordings_dialogues_and_texts_come_with_their_language_and_answers(folder: Path) -> None:
    corpus = read_corpus([folder])
    found = {Path(u.name).name: u for u in (*corpus.measured, *corpus.held_out)}
    assert found["asked.wav"].modality == "spoken"
    assert found["asked.wav"].language == "en"
    assert found["asked.wav"].answers == ("over there",)
    assert found["typed.txt:1"].answers == ("三点",)
    assert found["typed.txt:1"].language == "zh"
    assert found["talk.json"].answers == ("good day", None)
    assert [isinstance(turn, str) for turn in found["talk.json"].turns] == [True, False]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("silence.wav", b"RIFF", "silence.wav"),
        ("noise.wav", b"\0" * 400, "noise.wav"),
        ("broken.json", b"[{", "not readable as JSON"),
        ("empty.json", b"[]", "1 to 64 turns"),
        ("both.json", b'[{"wav": "a", "text": "b"}]', "turn 0"),
        ("strange.json", b'[{"text": "b", "speaker": "c"}]', "no such field"),
        ("number.json", b'[{"text": 3}]', "turn 0.text"),
        ("latin.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("blank.txt", b"\n \n", "no question"),
    ],
)
def test_a_file_that_cannot_be_used_is_left_out_with_its_reason(
    folder: Path, name: str, content: bytes, reason: str
) -> None:
    (folder / name).write_bytes(content)
    refused = read_corpus([folder]).refused
    assert list(refused) == [str(folder / name)]
    assert reason in refused[str(folder / name)]


def test_a_corpus_without_usable_files_is_refused_with_every_reason(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no")
    with pytest.raises(SettingsError, match=r"nothing can be used: .*a\.wav"):
        read_corpus([tmp_path])
    with pytest.raises(SettingsError, match="no such file"):
        read_corpus([tmp_path / "missing"])


def typed(number: int, length: int, language: str = "en") -> Utterance:
    return Utterance(
        name=f"{language}{number:03d}",
        modality="typed",
        language=language,
        turns=(" ".join(["word"] * length),),
        answers=(None,),
    )


def test_a_choice_takes_the_strata_in_turn_and_follows_the_seed() -> None:
    many = [typed(i, 2) for i in range(50)] + [typed(i, 30, "zh") for i in range(3)]
    chosen = chosen_by_strata(many, 6, seed=0)
    assert sum(u.language == "zh" for u in chosen) == 3
    assert chosen == chosen_by_strata(list(reversed(many)), 6, seed=0)
    assert chosen != chosen_by_strata(many, 6, seed=1)


def test_held_out_turns_are_never_measured() -> None:
    corpus = default_corpus([("hi", np.zeros(16000, np.float32))], held_out=0.25)
    names = {u.name for u in corpus.measured}
    assert names
    assert corpus.held_out
    assert not names & {u.name for u in corpus.held_out}
