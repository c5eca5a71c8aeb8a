"""`train pairs`: answers to prefer and answers to avoid, from the checkpoint itself.

sample    every question is answered several times; text greedily, codes drawn
score     word errors of what a recogniser hears, against the *requested* text; an answer with
          another text is left out, for DPO changes the speech alone
pick      the best and the worst answer, if the worst has more errors; ties are no preference

The reward is the released data's (word error rate, lower is better); how its pairs were made was
not released. Source: DeepTalk `data_util_rl.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import check_output, write_file
from deeptalk_edge.sound.recogniser import WordRecogniser
from deeptalk_edge.training.answering import Answerer, Said, open_reader, questions_of
from deeptalk_edge.training.data.check import sources_of
from deeptalk_edge.training.generate import Sampling
from deeptalk_edge.training.tiny.scorer import can_be_heard, normalise, pronounce, score

_LAST_WORD_ROWS = 6  # ids of the last word, EOS and EOT

MAX_CODES = 1000
"""Longer winning answers are dropped, as the released loader does (12 s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One sampled answer and its word error rate."""

    said: Said
    word_error_rate: float


def make_pairs(
    checkpoint: Path,
    data: Sequence[str],
    out: Path,
    *,
    num_samples: int,
    temperature: float,
    top_k: int,
    max_questions: int,
    seed: int,
) -> str:
    """Write pairs as JSONL; returns what was found, in a line.

    Raises SettingsError if no sample is good, no pair was found or the recogniser is missing.
    """
    check_output(out)
    sources = sources_of(data)
    config = read_config(checkpoint)
    reader, answerer = open_reader(config, sources), Answerer(config)
    named = [
        (name, question)
        for name, question in questions_of(reader, "TQAA", max_questions)
        if can_be_heard(normalise(question.answer))
    ]
    if not named:
        raise SettingsError("no question can be typed and answered aloud in English letters")
    hear = WordRecogniser(
        (normalise(question.answer) for _, question in named),
        answerer.codec.spec.sampling_rate,
        pronounce,
    )
    takes = [
        answerer.answers(
            [question for _, question in named],
            Sampling(audio_top_k=top_k, temperature=temperature, seed=seed + i),
        )
        for i in range(num_samples)
    ]
    lines, rates = [], []
    for (_, question), answers in zip(named, zip(*takes, strict=True), strict=True):
        wanted, scored = hear.fold(normalise(question.answer)), []
        for said in answers:
            if can_be_paired(said, question.answer):
                heard = hear(answerer.sound_of(said.frames))
                rate = score([wanted], [heard]).word_error_rate
                scored.append(Scored(said=said, word_error_rate=rate))
                rates.append(rate)
        if (pair := pick(scored)) is not None:
            lines.append(json.dumps(_line(question.text, question.answer, *pair)))
    found = f"{len(rates)} of {len(named) * num_samples} answers have the requested text"
    if not lines:
        raise SettingsError(
            f"{found}, and none to the same question is better than another: there is nothing to "
            "prefer; sample more widely with --temperature or --samples"
        )
    write_file(out, ("\n".join(lines) + "\n").encode())
    mean = sum(rates) / len(rates)
    return (
        f"{out}: {len(lines)} pairs of {len(named)} questions; {found}; their mean word error rate "
        f"is {mean:.3f}"
    )


def can_be_paired(said: Said, answer: str) -> bool:
    """Whether the text of an answer is the requested one, and the speech neither too long nor
    broken off."""
    return (
        0 < said.frames.size < MAX_CODES
        and normalise(said.text) == normalise(answer)
        and _has_room(said)
    )


def pick(scored: Sequence[Scored]) -> tuple[Scored, Scored] | None:
    """The best and the worst of some answers to one question; None if none is better than
    another."""
    if len(scored) < 2:
        return None
    best = min(scored, key=lambda one: one.word_error_rate)
    worst = max(scored, key=lambda one: one.word_error_rate)
    return (best, worst) if worst.word_error_rate > best.word_error_rate else None


def _has_room(said: Said) -> bool:
    """Whether the speech is as long as its text: what ends too early cannot be trained on."""
    num_rows = sum(said.frames.shape)  # the last codebook ends so many rows after the text began
    last_word = said.word_frames[-1] if said.word_frames else 0
    return num_rows > last_word + _LAST_WORD_ROWS


def _line(question: str, answer: str, win: Scored, lose: Scored) -> dict[str, object]:
    text = {"role": "assistant", "content": answer, "word_frames": list(win.said.word_frames)}
    return {
        "conversations": [{"role": "user", "content": question}, text],
        "win_codec": win.said.frames.flatten().tolist(),
        "win_reward": win.word_error_rate,
        "lose_codec": lose.said.frames.flatten().tolist(),
        "lose_reward": lose.word_error_rate,
    }
