"""`train speak`: a CSV of questions and answers becomes spoken data to fine-tune on.

question    spoken in many voices by espeak-ng and flite, or your own recordings (`question_wav`,
            several with `;` between them)
answer      spoken in the answer voice and encoded by the codec, or your own recording
            (`answer_wav`); left empty, the checkpoint's own answer to the typed question: what it
            knows already is rehearsed so that it is not forgotten
held out    every question in voices that no training question has, in a separate file

Words are folded to lower case without punctuation, as the shipped checkpoint reads them.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from deeptalk_edge.checkpoint.config import read_codec_spec, read_config
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import staged_directory
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.model.prompt import folded
from deeptalk_edge.progress import progress
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import WavWriter
from deeptalk_edge.training.answering import Answerer, open_reader
from deeptalk_edge.training.data.codes import CodeWriter, open_code_writer
from deeptalk_edge.training.data.conversations import read_conversation
from deeptalk_edge.training.stages.recipe import Source
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.units import MARGIN_MS, UNIT_VOICE, share_frames
from deeptalk_edge.training.tiny.voices import (
    Voice,
    held_out_voice,
    need_synthesisers,
    phones_of,
    speak,
    training_voice,
)

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
_COLUMNS = {"question", "answer", "question_wav", "answer_wav"}
_WORKERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One line of the table."""

    question: str
    answer: str
    """"" asks the checkpoint."""
    question_wavs: tuple[Path, ...]
    answer_wav: Path | None
    line: int


@dataclass(frozen=True, slots=True)
class Made:
    """What was written."""

    num_train: int
    num_held_out: int


def speak_table(
    table: Path, checkpoint: Path, out: Path, *, num_takes: int, num_held_out: int, seed: int
) -> Made:
    """Write `train.jsonl`, `held_out.jsonl` and their recordings to a new directory.

    Raises SettingsError if the table or a synthesiser is missing or a line is no pair,
    ArtifactError if the checkpoint is damaged, AudioError if a recording cannot be read.
    """
    pairs = read_table(table)
    if any(not pair.question_wavs for pair in pairs):
        need_synthesisers()
    answers = _Answers(checkpoint, pairs)
    with staged_directory(out) as staging:
        (staging / "wav").mkdir()
        train: list[str] = []
        kept: list[str] = []
        with ThreadPoolExecutor(_WORKERS) as pool:
            jobs = [
                pool.submit(_speak_question, staging, number, pair, (num_takes, num_held_out), seed)
                for number, pair in enumerate(pairs)
            ]
            for pair, job in zip(
                progress(pairs, name="speak", unit="pair"),
                jobs,
                strict=True,
            ):
                answer = answers.of(pair)
                takes, held_out = job.result()
                train += [_line(pair, wav, answer) for wav in takes]
                kept += [_line(pair, wav, answer) for wav in held_out]
        for name, lines in ((TRAIN, train), (HELD_OUT, kept)):
            (staging / name).write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    return Made(len(train), len(kept))


def read_table(path: Path) -> list[Pair]:
    """Read a CSV. Raises SettingsError, naming the line, if something in it is no pair."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            rows = list(enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"{path}: not readable as CSV ({error})") from error
    if "question" not in columns or not columns <= _COLUMNS:
        raise SettingsError(
            f"{path}: the columns are {', '.join(sorted(map(str, columns)))}; expected question "
            f"and any of {', '.join(sorted(_COLUMNS - {'question'}))}"
        )
    pairs = [_pair(path, line, row) for line, row in rows]
    if not pairs:
        raise SettingsError(f"{path}: holds no line below the header")
    return pairs


def _pair(path: Path, line: int, row: Mapping[str | None, Any]) -> Pair:
    values = {key: (row.get(key) or "").strip() for key in _COLUMNS}
    question = folded(values["question"])
    if not question or None in row:
        raise SettingsError(f"{path}:{line}: no question, or more values than columns")
    wavs = tuple(path.parent / wav for wav in values["question_wav"].split(";") if wav)
    answer_wav = path.parent / values["answer_wav"] if values["answer_wav"] else None
    for wav in (*wavs, *([answer_wav] if answer_wav else [])):
        if not wav.is_file():
            raise SettingsError(f"{path}:{line}: {wav} does not exist")
    return Pair(
        question=question,
        answer=folded(values["answer"]),
        question_wavs=wavs,
        answer_wav=answer_wav,
        line=line,
    )


class _Answers:
    """The answers' turns."""

    def __init__(self, checkpoint: Path, pairs: Sequence[Pair]) -> None:
        self._writer: CodeWriter | None = None
        if any(pair.answer for pair in pairs):
            self._writer = open_code_writer(checkpoint)
        self._own = _own_answers(checkpoint, [pair for pair in pairs if not pair.answer])
        self._rate_hz = read_codec_spec(checkpoint / "snac").sampling_rate

    def of(self, pair: Pair) -> dict[str, Any]:
        """The answer's turn."""
        if not pair.answer:
            return self._own[pair.line]
        assert self._writer is not None
        if pair.answer_wav is not None:
            sound = read_sound(pair.answer_wav)
            samples = np.asarray(soxr.resample(sound.pcm, sound.rate_hz, self._rate_hz), np.float32)
        else:
            pcm = speak(pair.answer, UNIT_VOICE, rate_hz=self._rate_hz, margin_ms=MARGIN_MS)
            samples = as_samples(pcm)
        codes = self._writer.codes(samples)
        phones = [max(1, len(phones_of(word))) for word in pair.answer.split()]
        return {
            "role": "assistant",
            "content": pair.answer,
            "codec": codes.flatten().tolist(),
            "word_frames": list(share_frames(phones, len(codes))),
        }


def _own_answers(checkpoint: Path, pairs: Sequence[Pair]) -> dict[int, dict[str, Any]]:
    """What the checkpoint answers to typed questions, by their lines."""
    if not pairs:
        return {}
    config = read_config(checkpoint)
    writer = open_reader(config, [Source(path="", task="TQAA")]).writers[0]
    questions = []
    for pair in pairs:
        turns = [{"role": "user", "content": pair.question}, {"role": "assistant", "codec": [0]}]
        conversation = read_conversation(turns, f"line {pair.line}", Path())
        questions.append(writer.question(conversation, "TQAA"))
    found = {}
    for pair, said in zip(pairs, Answerer(config).answers(questions), strict=True):
        if not said.text or not len(said.frames):
            raise SettingsError(
                f"line {pair.line}: the checkpoint has no answer to {pair.question!r}; give one"
            )
        found[pair.line] = {
            "role": "assistant",
            "content": said.text,
            "codec": said.frames.flatten().tolist(),
            "word_frames": list(said.word_frames),
        }
    return found


def _speak_question(
    staging: Path, number: int, pair: Pair, num_takes: tuple[int, int], seed: int
) -> tuple[list[str], list[str]]:
    """Recordings to train on, and those that are held out."""
    if pair.question_wavs:
        own = [str(wav.resolve()) for wav in pair.question_wavs]
        return (own[:-1], own[-1:]) if len(own) > 1 else (own, [])
    takes: list[str] = []
    held_out: list[str] = []
    for name, voice in _voices(f"{seed}|{pair.question}", *num_takes):
        wav = f"wav/{number}-{name}.wav"
        pcm = speak(pair.question, voice, rate_hz=RATE_HZ)
        writer = WavWriter(staging / wav, RATE_HZ)
        writer.write(as_samples(pcm))
        writer.close()
        (held_out if name.startswith("new") else takes).append(wav)
    return takes, held_out


def _voices(seed: str, num_takes: int, num_held_out: int) -> Iterator[tuple[str, Voice]]:
    draw = random.Random(seed)
    yield from ((f"take{i}", training_voice(draw)) for i in range(num_takes))
    yield from ((f"new{i}", held_out_voice(draw)) for i in range(num_held_out))


def _line(pair: Pair, wav: str, answer: Mapping[str, Any]) -> str:
    user = {"role": "user", "content": pair.question, "wavpath": wav}
    return json.dumps({"conversations": [user, answer]})
