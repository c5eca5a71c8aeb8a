"""The table of questions and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.kiosk import read_table
from tests.places import ROOT


def _table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "answers.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_words_are_folded_and_an_empty_answer_asks_the_checkpoint(tmp_path: Path) -> None:
    first, second = read_table(
        _table(tmp_path, 'question,answer\n"Where is it, please?",Over There!\nhello,\n')
    )
    assert (first.question, first.answer) == ("where is it please", "over there")
    assert (second.question, second.answer, second.line) == ("hello", "", 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question;answer\na;b\n", "expected question and any of"),
        ("answer\nb\n", "expected question"),
        ("question,answer\n", "no line below the header"),
        ("question,answer\na,b,c\n", ":2: no question, or more values"),
        ("question,answer\n,b\n", ":2: no question"),
        ("question,answer_wav\na,gone.wav\n", ":2: .*gone.wav does not exist"),
    ],
)
def test_an_invalid_table_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        read_table(_table(tmp_path, text))


def test_the_example_tables_are_tables() -> None:
    assert len(read_table(ROOT / "examples" / "kiosk_answers" / "answers.csv")) == 20
    old = read_table(ROOT / "examples" / "kiosk_answers" / "rehearse.csv")
    assert len(old) > 100
    assert not any(pair.answer for pair in old)
