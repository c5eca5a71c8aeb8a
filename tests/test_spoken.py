"""The shipped checkpoint is exported and run by the real runtime; a recogniser reads its speech."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deeptalk_edge.bench.tiny_scores import answer
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.lm.codec_stream import Codec, StreamingCodec
from deeptalk_edge.sound.wav import read_wav
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny.evaluate import decode_frames
from deeptalk_edge.training.tiny.scorer import KioskRecogniser, normalise
from tests.places import TINY

CHECKPOINT = TINY
CLIPS = sorted((CHECKPOINT / "questions").glob("*.wav"))


@dataclass(frozen=True, slots=True)
class Heard:
    """One clip's answer: the right one, the written one and the spoken one."""

    wanted: str
    text: str
    spoken: str
    frames: Ids


class ListeningCodec:
    """The bundle's codec, with a list of the frames that went through it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.frames: list[Ids] = []

    def decode(self, codes: Ids, *, position: int, length: int, **rest: Any) -> tuple[Any, Any]:
        if position < length:
            self.frames.append(codes)
        return self._codec.decode(codes, position=position, length=length, **rest)

    def close(self) -> None:
        self._codec.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("spoken") / "bundle"
    export_bundle(CHECKPOINT, place, ExportSettings())
    return Bundle.open(place)


@pytest.fixture(scope="module")
def closed() -> KioskRecogniser:
    return KioskRecogniser()


@pytest.fixture(scope="module")
def heard(bundle: Bundle, closed: KioskRecogniser) -> list[Heard]:
    """Answers to every clip, each in a new conversation."""
    results = []
    with Conversation(bundle) as talk:
        own = talk._backend
        for clip in CLIPS:
            codec = ListeningCodec(own.codec)
            talk._backend = replace(own, codec=codec)
            text, sound = answer(talk, read_wav(clip).pcm)
            wanted = clip.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[1]
            frames = np.concatenate(codec.frames)
            results.append(Heard(wanted, normalise(text), closed(sound), frames))
    return results


def test_there_are_enough_clips_of_held_out_questions() -> None:
    assert len(CLIPS) >= 20


def test_held_out_questions_are_answered_aloud(heard: list[Heard]) -> None:
    wrong = [(h.wanted, h.text, h.spoken) for h in heard if h.spoken != h.wanted]
    assert 1 - len(wrong) / len(heard) >= 0.85, wrong


def test_the_spoken_words_are_the_written_ones(heard: list[Heard]) -> None:
    apart = [(h.text, h.spoken) for h in heard if h.spoken != h.text]
    assert 1 - len(apart) / len(heard) >= 0.95, apart


def test_the_example_asks_and_writes_the_answer(bundle: Bundle, tmp_path: Path) -> None:
    example = CHECKPOINT.parent.parent / "examples" / "ask.py"
    answer_wav, place = tmp_path / "answer.wav", bundle.file("tokenizer.json").parent
    command = [sys.executable, str(example), str(place), str(CLIPS[0]), str(answer_wav)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(finished.stdout.split()) > 3
    assert read_wav(answer_wav).seconds > 1.0


def test_shuffled_codes_have_no_recognisable_words(
    heard: list[Heard], bundle: Bundle, closed: KioskRecogniser
) -> None:
    """The recogniser depends on the voice, not only on its grammar."""
    rng, entry = np.random.default_rng(0), bundle.manifest.codec
    trained = OrtCodec(bundle.file(bundle.manifest.ort_graphs.codec), threads=1)
    for h in heard[::3]:
        codec = StreamingCodec(trained, entry)
        sound = np.concatenate([codec.push(rng.permuted(h.frames, axis=0)), codec.finish()])
        assert closed(sound) != h.wanted


def test_an_untrained_decoder_has_no_recognisable_words(
    heard: list[Heard], bundle: Bundle, closed: KioskRecogniser
) -> None:
    torch.manual_seed(0)
    untrained = Snac(bundle.manifest.codec.spec, with_encoder=False).eval()
    for h in heard[::3]:
        assert closed(decode_frames(untrained, h.frames)) != h.wanted
