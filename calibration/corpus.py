"""The calibration corpus: the user's recordings, dialogues and texts, by path.

.wav ...     one spoken question; NAME.txt beside it may hold what is asked and, in a second line,
             the right answer
.json        a dialogue: a list of turns, each {"wav": FILE} or {"text": "..."}, perhaps {"answer"}
.txt         typed questions, one a line, "question<TAB>answer" where the answer is known

A part of all is held out for the accuracy gate and never measured. The choice is seeded and goes
round the strata (modality, language, length), so that no stratum starves. A folder named after a
language (`en`, `zh`) gives its files that language; else the script of the text does.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, AudioError, SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.schema import Items, checked, read_json_value

Array = NDArray[np.float32]
Modality = Literal["spoken", "typed", "dialogue"]

_SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}
_WORDS_PER_S = 2.5  # of speech: lengths of typed and spoken questions on one scale
_LENGTHS_S = (2.0, 5.0)  # short below the first, long above the last
_MOST_BYTES = 1 << 20  # of a file of texts

TYPED = (
    "hello, who are you?",
    "what time is it?",
    "can you help me, please?",
    "how do I get to the station?",
    "tell me something about the sea",
    "how much is a ticket to london?",
    "where is room two one five?",
    "is the museum open on sunday?",
    "what is seven times eight?",
    "please say that again",
    "which platform does the next train to paris leave from?",
    "I have lost my bag somewhere between the entrance and the second floor, what should I do now?",
    "thank you and goodbye",
    "call doctor maria",
    "what is the weather like today, and what will it be like tomorrow?",
    "can I pay by card?",
)
"""The default corpus where the user gives none; spoken as well where a synthesiser is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One conversation of the corpus: its questions in order, and the right answers if known."""

    name: str
    modality: Modality
    language: str
    turns: tuple[Array | str, ...]
    answers: tuple[str | None, ...]

    @property
    def length_s(self) -> float:
        """Of all questions; a typed one as long as it would take to say."""
        return sum(
            len(t.split()) / _WORDS_PER_S if isinstance(t, str) else len(t) / RATE_HZ
            for t in self.turns
        )

    @property
    def stratum(self) -> tuple[str, str, str]:
        """Modality, language, length."""
        short, long = _LENGTHS_S
        length = "short" if self.length_s < short else "long" if self.length_s > long else "middle"
        return self.modality, self.language, length


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is measured, what is held out, and what could not be used."""

    measured: tuple[Utterance, ...]
    held_out: tuple[Utterance, ...]
    refused: dict[str, str]
    """File to the reason."""
    source: str

    def strata(self) -> dict[str, int]:
        """How many measured utterances each stratum has."""
        counts: dict[str, int] = defaultdict(int)
        for utterance in self.measured:
            counts[" ".join(utterance.stratum)] += 1
        return dict(sorted(counts.items()))


def read_corpus(
    paths: Sequence[Path], *, most: int = 128, seed: int = 0, held_out: float = 0.25
) -> Corpus:
    """Read files and folders and choose at most so many utterances, `held_out` of them for the
    gate.

    Raises SettingsError if a path does not exist, or none of it can be used.
    """
    refused: dict[str, str] = {}
    found: list[Utterance] = []
    for path in _files(paths):
        try:
            found += _read(path)
        except (AudioError, ArtifactError) as error:
            refused[str(path)] = str(error)
    if not found:
        reasons = "; ".join(refused.values()) or "there is no WAV, dialogue or text in it"
        raise SettingsError(f"--utterances: nothing can be used: {reasons}")
    source = ", ".join(map(str, paths))
    return split_corpus(found, refused, source, most=most, seed=seed, held_out=held_out)


def split_corpus(
    found: Sequence[Utterance],
    refused: dict[str, str],
    source: str,
    *,
    most: int,
    seed: int,
    held_out: float,
) -> Corpus:
    """Choose by strata; of every stratum the same share is held out, never all of it."""
    chosen = chosen_by_strata(found, most, seed)
    every = max(2, round(1 / held_out))
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    parts: tuple[list[Utterance], list[Utterance]] = ([], [])
    for utterance in chosen:
        number = seen[utterance.stratum]
        seen[utterance.stratum] += 1
        parts[number % every == every - 1].append(utterance)
    if not parts[1] and len(parts[0]) > 1:  # all strata are tiny
        parts[1].append(parts[0].pop())
    return Corpus(
        measured=tuple(parts[0]), held_out=tuple(parts[1]), refused=refused, source=source
    )


def chosen_by_strata(found: Sequence[Utterance], most: int, seed: int) -> list[Utterance]:
    """Round the strata in turn, each in an order that the seed decides."""
    strata: dict[tuple[str, str, str], list[Utterance]] = defaultdict(list)
    for utterance in sorted(found, key=lambda u: u.name):
        strata[utterance.stratum].append(utterance)
    rng = random.Random(seed)
    queues = [strata[key] for key in sorted(strata)]
    for queue in queues:
        rng.shuffle(queue)
    chosen: list[Utterance] = []
    while len(chosen) < most and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: most - len(chosen)]
    return chosen


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise SettingsError(f"--utterances {path}: no such file or folder")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        yield from (p for p in files if p.suffix.lower() in _SOUNDS | {".json"})
        sounds = {p.with_suffix("") for p in files if p.suffix.lower() in _SOUNDS}
        yield from (
            p for p in files if p.suffix.lower() == ".txt" and p.with_suffix("") not in sounds
        )


def _read(path: Path) -> list[Utterance]:
    """What one file holds. Raises AudioError or ArtifactError if it cannot be used."""
    if path.suffix.lower() in _SOUNDS:
        return [_spoken(path)]
    if path.suffix.lower() == ".json":
        return [_dialogue(path)]
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise ArtifactError(f"{path}: no question in it")
    return [_typed(f"{path}:{i}", line, path) for i, line in enumerate(lines, 1)]


def _spoken(path: Path) -> Utterance:
    notes = path.with_suffix(".txt")
    lines = _text(notes).splitlines() if notes.is_file() else []
    answer = lines[1].strip() if len(lines) > 1 else None
    asked = lines[0] if lines else ""
    return Utterance(
        name=str(path),
        modality="spoken",
        language=_language(path, asked),
        turns=(read_utterance(path),),
        answers=(answer or None,),
    )


def _typed(name: str, line: str, path: Path) -> Utterance:
    question, _, answer = line.partition("\t")
    return Utterance(
        name=name,
        modality="typed",
        language=_language(path, question),
        turns=(question.strip(),),
        answers=(answer.strip() or None,),
    )


_Turn = dict[str, Any]


def _dialogue(path: Path) -> Utterance:
    turns = read_json_value(path)
    if not isinstance(turns, list) or not 1 <= len(turns) <= 64:
        raise ArtifactError(f"{path}: expected a list of 1 to 64 turns")
    questions: list[Array | str] = []
    answers: list[str | None] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or len({"wav", "text"} & turn.keys()) != 1:
            raise ArtifactError(f'{path}: turn {number}: expected {{"wav": FILE}} or {{"text"}}')
        if unknown := turn.keys() - {"wav", "text", "answer"}:
            raise ArtifactError(f"{path}: turn {number}: no such field {min(unknown)!r:.60}")
        for key in turn:
            checked(Annotated[str, Items(1, 4096)], turn[key], f"{path}: turn {number}.{key}")
        is_spoken = "wav" in turn
        questions.append(read_utterance(path.parent / turn["wav"]) if is_spoken else turn["text"])
        answers.append(turn.get("answer"))
    written = " ".join(question for question in questions if isinstance(question, str))
    return Utterance(
        name=str(path),
        modality="dialogue",
        language=_language(path, written),
        turns=tuple(questions),
        answers=tuple(answers),
    )


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ArtifactError(f"{path}: larger than {_MOST_BYTES} bytes of text")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not readable as UTF-8 ({error})") from error


def _language(path: Path, text: str) -> str:
    """From the folders, nearest first, or the script; `und` where neither says."""
    for folder in path.parts[-2::-1]:
        if len(folder) == 2 and folder.isalpha() and folder.islower():
            return folder
    return script_of(text)


def script_of(text: str) -> str:
    """`zh`, `latin` or `und`, by the letters of a text."""
    if any("\u4e00" <= letter <= "\u9fff" for letter in text):
        return "zh"
    return "latin" if any(letter.isalpha() for letter in text) else "und"


def default_corpus(
    speak: Iterable[tuple[str, Array]], *, most: int = 128, seed: int = 0, held_out: float = 0.25
) -> Corpus:
    """A small corpus made here: `TYPED`, and whatever of it was spoken, (text, 16 kHz PCM)."""
    found = [_typed(f"default:{i}", text, Path()) for i, text in enumerate(TYPED)]
    found += [
        Utterance(
            name=f"default-spoken:{i}",
            modality="spoken",
            language=script_of(text),
            turns=(pcm,),
            answers=(None,),
        )
        for i, (text, pcm) in enumerate(speak)
    ]
    return split_corpus(found, {}, "default", most=most, seed=seed, held_out=held_out)


def as_summary(corpus: Corpus) -> dict[str, Any]:
    """For the report, ready for JSON."""
    return {
        "source": corpus.source,
        "measured": len(corpus.measured),
        "held_out": len(corpus.held_out),
        "strata": corpus.strata(),
        "refused": corpus.refused,
    }


def dumps(value: object) -> str:
    """JSON as every file of a table spells it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
