"""Recordings that the shipped checkpoint's understanding is fitted on (needs espeak-ng and flite):

    python -m deeptalk_edge.training.tiny.understanding --out build/understanding
    deeptalk-edge calibrate checkpoints/tiny --understanding \\
        --utterances build/understanding/questions --parts build/understanding/parts \\
        --others build/understanding/others -o checkpoints/tiny

questions    in training voices, at -28 to 0 dB, a third in noise or through a telephone's band,
             with their answers
parts        their beginnings, said as a sentence, as if a comma followed, or with an "um"
others       what no kiosk answers (others.py)
line         what the kiosk says instead, in the answer voice: `not_understood.wav`
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.understanding import LINE
from deeptalk_edge.files import staged_directory
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.sound.wav import WavWriter
from deeptalk_edge.training.tiny.domain import Question, questions
from deeptalk_edge.training.tiny.others import in_room, other_sounds
from deeptalk_edge.training.tiny.voices import (
    ANSWER_VOICE,
    need_synthesisers,
    speak,
    training_voice,
)

Array = NDArray[np.floating]

SPOKEN_LINE = "sorry, i did not understand you. please say it again."
_CODEC_HZ = 24_000
_ROOM_SHARE = 0.33


def write_recordings(out: Path, *, num_questions: int, num_others: int, seed: int) -> None:
    """Write all of them to a new directory.

    Raises SettingsError if a synthesiser is missing or there is something at `out`.
    """
    need_synthesisers()
    with staged_directory(out) as staging:
        for folder in ("questions", "parts", "others"):
            (staging / folder).mkdir()
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(_write_question, staging, i, question, seed)
                for i, question in enumerate(drawn(num_questions, random.Random(seed)))
            ]
            for job in jobs:
                job.result()
        for i, (kind, pcm) in enumerate(other_sounds(num_others, seed)):
            _write(staging / "others" / f"{kind.replace(' ', '_')}-{i:04d}.wav", pcm)
        line = speak(SPOKEN_LINE, ANSWER_VOICE, rate_hz=_CODEC_HZ)
        _write(staging / LINE, line.astype(np.float32) / 2**15, _CODEC_HZ)


def drawn(num: int, rng: random.Random) -> list[Question]:
    """Questions that training may hear, in turn of each intent."""
    by_intent: dict[str, list[Question]] = {}
    for question in questions():
        if not question.is_held_out:
            by_intent.setdefault(question.intent, []).append(question)
    intents = list(by_intent.values())
    return [rng.choice(intents[i % len(intents)]) for i in range(num)]


def beginning_of(question: Question, rng: random.Random) -> str | None:
    """The first third or more of its words, never all; None if that is a question, too."""
    words = question.text.split()
    if len(words) < 3:
        return None
    text = " ".join(words[: rng.randint(max(1, len(words) // 3), len(words) - 1)])
    return None if text in {q.text for q in questions()} else text


def _write_question(staging: Path, i: int, question: Question, seed: int) -> None:
    rng, values = random.Random(f"{seed} {i}"), np.random.default_rng([seed, i])
    voice = training_voice(rng)
    is_in_room, gain = rng.random() < _ROOM_SHARE, 10 ** rng.uniform(-1.2, 0.15)

    def room(pcm: Array) -> Array:
        return gain * (in_room(pcm.astype(np.float64), rng, values) if is_in_room else pcm)

    place = staging / "questions" / f"{i:04d}.wav"
    _write(place, room(speak(question.text, voice, rate_hz=RATE_HZ) / np.float32(2**15)))
    words = f"{question.text}\n{question.answer}\n"
    place.with_suffix(".txt").write_text(words, encoding="utf-8")
    if i % 2 == 0 and (text := beginning_of(question, rng)):
        mark = rng.choice(["", ",", ", um,"])
        pcm = speak(text + mark, voice, rate_hz=RATE_HZ) / np.float32(2**15)
        _write(staging / "parts" / f"{i:04d}.wav", room(pcm))


def _write(place: Path, pcm: Array, rate_hz: int = RATE_HZ) -> None:
    with WavWriter(place, rate_hz) as writer:
        writer.write(np.clip(pcm, -1, 1).astype(np.float32))


def main() -> int:
    """Write the recordings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--others", type=int, default=900)
    parser.add_argument("--seed", type=int, default=24)
    args = parser.parse_args()
    write_recordings(args.out, num_questions=args.questions, num_others=args.others, seed=args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
