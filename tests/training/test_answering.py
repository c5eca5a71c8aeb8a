"""The shipped checkpoint answers data files: `train eval` and `train pairs`, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from tests.places import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped questions without codes, because only the questions are used."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = []
    for wav in sorted((TINY / "questions").glob("new_voice-*.wav"))[:2]:
        question, answer = wav.with_suffix(".txt").read_text().splitlines()[:2]
        words = list(range(0, 2 * len(answer.split()), 2))
        user = {"role": "user", "content": question, "wavpath": str(wav)}
        said = {
            "role": "assistant",
            "content": answer,
            "codec": [0] * 7 * 40,
            "word_frames": words,
        }
        lines.append(json.dumps([user, said]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_shipped_checkpoint_answers_typed_and_spoken(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "eval", str(TINY), f"RQACONVA={data}", "--base", str(TINY), "--json"]
    assert main(words) == 0
    scores = json.loads(capsys.readouterr().out)
    for kind in ("spoken", "typed"):
        assert scores[kind]["text_exact"]["share"] == 1.0
        assert scores[kind]["spoken_exact"]["share"] == 1.0
        assert scores[kind]["spoken_word_error_rate"] == 0.0
        assert scores[kind]["agreed"]["n"] == 2
    assert scores["language_drop"] == 0.0
    assert len(scores["codebook_accuracy"]) == 7


def test_pairs_of_answers_differ_in_their_heard_words(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs.jsonl"
    bold = ["--temperature", "3", "--top-k", "40", "--samples", "4"]
    assert main(["train", "pairs", str(TINY), f"RQACONVA={data}", "-o", str(out), *bold]) == 0
    assert "pairs of 2 questions" in capsys.readouterr().out
    for line in out.read_text().splitlines():
        pair = json.loads(line)
        assert pair["win_reward"] < pair["lose_reward"]
    words = [f"TQAA={out}", "--preference", "--checkpoint", str(TINY)]
    assert main(["train", "check", *words]) == 0
