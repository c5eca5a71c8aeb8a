"""The speech of the kiosk: every question in many voices, every answer in one.

corpus.json     seed, utterances in the order of questions.npz, texts in the order of answers.npz,
                the phones of every word that is asked
questions.npz   16 kHz int16 PCM of all utterances end to end, and where each begins
answers.npz     24 kHz, likewise

A voice is drawn from (seed, question, split, take) alone, so neither the order of the work nor the
number of workers changes a sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import staged_directory
from deeptalk_edge.progress import progress
from deeptalk_edge.training.tiny.domain import Question, Split, answers, questions
from deeptalk_edge.training.tiny.voices import (
    ANSWER_VOICE,
    Pcm,
    Voice,
    held_out_voice,
    need_synthesisers,
    phones_of,
    speak,
    training_voice,
)

Samples = npt.NDArray[np.float32]
"""Mono samples in -1..1."""

QUESTION_RATE_HZ = 16000
ANSWER_RATE_HZ = 24000

COMMON_INTENTS = frozenset({"ticket", "room"})
"""So many questions that few takes of each will do; the others would starve."""

TAKES_OF_COMMON = 7
TAKES_OF_RARE = 20

_FILES = ("corpus.json", "questions.npz", "answers.npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One spoken question."""

    question: str
    answer: str
    intent: str
    key: str
    split: Split
    is_test: bool
    """Of what is held out: the half that only the last report may score."""

    voice: Voice


@dataclass(frozen=True, slots=True)
class Clips:
    """Many recordings in one array."""

    pcm: Pcm
    offsets: npt.NDArray[np.int64]
    """Where each clip begins, and after the last one where the array ends."""

    rate_hz: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Samples:
        """One clip's samples in -1..1."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return as_samples(self.pcm[self.offsets[index] : self.offsets[index + 1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All speech that the tiny checkpoint is trained and scored on."""

    seed: int
    utterances: tuple[Utterance, ...]
    questions: Clips
    """As long as `utterances`, and in their order."""

    answer_texts: tuple[str, ...]
    """All answers first, then some questions: more speech of the answer voice, for the codec."""

    answers: Clips
    phones: dict[str, list[str]]
    """How each word of a question is pronounced, whatever the voice."""

    def select(self, split: Split, *, is_test: bool) -> list[int]:
        """Indices of the utterances of a set; for the training split `is_test` must be False."""
        return [
            index
            for index, utterance in enumerate(self.utterances)
            if utterance.split is split and utterance.is_test is is_test
        ]


def as_samples(pcm: Pcm) -> Samples:
    """16-bit PCM as float32 in -1..1."""
    return np.asarray(pcm, np.float32) / np.float32(32768)


def synthesise(root: Path, *, seed: int, workers: int) -> Corpus:
    """Speak the whole domain and write it to `root`: 3 minutes on two cores, 900 MB.

    Raises SettingsError if a synthesiser is missing, AudioError if one fails.
    """
    need_synthesisers()
    utterances = tuple(_plan(seed))
    texts = (*answers(), *_codec_texts(seed))
    words = sorted({word for u in utterances for word in u.question.split()})
    corpus = Corpus(
        seed=seed,
        utterances=utterances,
        questions=_speak_all(
            [(u.question, u.voice) for u in utterances], QUESTION_RATE_HZ, "questions", workers
        ),
        answer_texts=texts,
        answers=_speak_all([(t, ANSWER_VOICE) for t in texts], ANSWER_RATE_HZ, "answers", workers),
        phones={word: phones_of(word) for word in words},
    )
    _save(corpus, root)
    return corpus


def load_corpus(root: Path) -> Corpus:
    """Read what `synthesise` wrote.

    Raises ArtifactError if a file is missing or they do not belong together.
    """
    try:
        plan = json.loads((root / "corpus.json").read_text(encoding="utf-8"))
        corpus = Corpus(
            seed=plan["seed"],
            utterances=tuple(map(_read_utterance, plan["utterances"])),
            questions=_load_clips(root / "questions.npz", QUESTION_RATE_HZ),
            answer_texts=tuple(plan["answer_texts"]),
            answers=_load_clips(root / "answers.npz", ANSWER_RATE_HZ),
            phones=plan["phones"],
        )
    except (OSError, KeyError, TypeError, ValueError, BadZipFile) as error:
        raise ArtifactError(f"{root}: not a corpus ({error}); synthesise it again") from error
    found = (len(corpus.questions), len(corpus.answers))
    if found != (len(corpus.utterances), len(corpus.answer_texts)):
        raise ArtifactError(f"{root}: {found} clips do not match corpus.json; synthesise it again")
    return corpus


def _plan(seed: int) -> Iterator[Utterance]:
    for question in questions():
        if question.is_held_out:
            yield _utterance(question, Split.NEW_COMBINATION, seed)
            yield _utterance(question, Split.BOTH_NEW, seed)
            continue
        takes = TAKES_OF_COMMON if question.intent in COMMON_INTENTS else TAKES_OF_RARE
        for take in range(takes):
            yield _utterance(question, Split.TRAIN, seed, take)
        if random.Random(f"{seed}|new voice|{question.text}").random() < 0.15:
            yield _utterance(question, Split.NEW_VOICE, seed)


def _utterance(question: Question, split: Split, seed: int, take: int = 0) -> Utterance:
    rng = random.Random(f"{seed}|{question.text}|{split.value}|{take}")
    is_new_voice = split in (Split.NEW_VOICE, Split.BOTH_NEW)
    return Utterance(
        question=question.text,
        answer=question.answer,
        intent=question.intent,
        key=question.key,
        split=split,
        is_test=split is not Split.TRAIN and question.is_test,
        voice=held_out_voice(rng) if is_new_voice else training_voice(rng),
    )


def _codec_texts(seed: int) -> list[str]:
    texts = sorted({question.text for question in questions()})
    return [text for text in texts if random.Random(f"{seed}|codec|{text}").random() < 0.25]


def _speak_all(lines: list[tuple[str, Voice]], rate_hz: int, name: str, workers: int) -> Clips:
    with ThreadPoolExecutor(workers) as pool:
        spoken: Iterable[Pcm] = pool.map(lambda line: speak(*line, rate_hz=rate_hz), lines)
        clips = list(progress(spoken, name=name, unit="clip", total=len(lines)))
    offsets = np.cumsum([0, *map(len, clips)], dtype=np.int64)
    return Clips(np.concatenate(clips), offsets, rate_hz)


def _save(corpus: Corpus, root: Path) -> None:
    plan = {
        "seed": corpus.seed,
        "answer_texts": corpus.answer_texts,
        "phones": corpus.phones,
        "utterances": [asdict(utterance) for utterance in corpus.utterances],
    }
    with staged_directory(root, replaces=_FILES) as staging:
        (staging / "corpus.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
        for name, clips in (("questions", corpus.questions), ("answers", corpus.answers)):
            np.savez(staging / f"{name}.npz", pcm=clips.pcm, offsets=clips.offsets)


def _load_clips(path: Path, rate_hz: int) -> Clips:
    with np.load(path) as arrays:
        return Clips(arrays["pcm"], arrays["offsets"], rate_hz)


def _read_utterance(fields: dict[str, Any]) -> Utterance:
    voice = Voice(**fields.pop("voice"))
    return Utterance(split=Split(fields.pop("split")), voice=voice, **fields)
