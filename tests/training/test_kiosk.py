"""The table of questions and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.kiosk import read_table
from deeptalk_edge.training.stages.recipe import read_recipe
from deeptalk_edge.training.tiny.domain import questions
from tests.places import ROOT

EXAMPLE = ROOT / "examples" / "kiosk_answers"


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
    assert len(read_table(EXAMPLE / "answers.csv")) == 20
    old = read_table(EXAMPLE / "rehearse.csv")
    assert len(old) > 100
    assert not any(pair.answer for pair in old)


def test_forgetting_is_measured_on_old_questions_that_were_not_rehearsed() -> None:
    right = {question.text: question.answer for question in questions()}
    trained = {
        p.question for n in ("answers", "rehearse") for p in read_table(EXAMPLE / f"{n}.csv")
    }
    kept = read_table(EXAMPLE / "not_rehearsed.csv")
    assert len(kept) > 200
    assert all(right[pair.question] == pair.answer for pair in kept)
    assert not trained & {pair.question for pair in kept}


def test_the_example_recipe_rehearses_and_judges_what_it_does_not_train() -> None:
    recipe = read_recipe(str(EXAMPLE / "kiosk.toml"))
    trained = {source.path for source in recipe.data.train}
    assert trained == {"kiosk/new/train.jsonl", "kiosk/old/train.jsonl"}
    assert {source.path for source in recipe.data.evaluate} == {"kiosk/new/held_out.jsonl"}
    assert recipe.data.corrupted_codes > 0
