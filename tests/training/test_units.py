"""The prompt voice: any answer is the concatenation of its words' units."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.training.tiny.domain import answers
from deeptalk_edge.training.tiny.tokens import Tokeniser
from deeptalk_edge.training.tiny.units import (
    CARRIERS,
    Unit,
    UnitVoice,
    build_units,
    share_frames,
    split_into_units,
    unit_names,
)

FRAME_SAMPLES = 2048


def _unit(name: str, num_frames: int, first_code: int) -> Unit:
    words = name.split()
    codes = np.arange(num_frames * 7).reshape(num_frames, 7) + first_code
    pcm = np.full(num_frames * FRAME_SAMPLES, first_code, np.int16)
    return Unit(codes, tuple(range(len(words))), pcm)


@pytest.fixture
def voice() -> UnitVoice:
    return UnitVoice(
        {
            "calling room": _unit("calling room", 6, 100),
            "four": _unit("four", 3, 200),
            "one": _unit("one", 2, 300),
        }
    )


def test_an_answers_codes_are_its_units_end_to_end(voice: UnitVoice) -> None:
    codes, word_frames = voice.answer_codes("calling room four one four")
    assert codes[:, 0].tolist() == [
        *range(100, 142, 7),
        *(200, 207, 214),
        *(300, 307),
        *(200, 207, 214),
    ]
    assert word_frames == [0, 1, 6, 9, 11]


def test_codes_and_recording_are_equally_long(voice: UnitVoice) -> None:
    text = "calling room one one four"
    assert len(voice.answer_pcm(text)) == FRAME_SAMPLES * len(voice.answer_codes(text)[0])


def test_an_unknown_word_is_an_error(voice: UnitVoice) -> None:
    with pytest.raises(KeyError, match="nine"):
        voice.answer_codes("calling room nine")


def test_splitting_keeps_every_word_in_its_place() -> None:
    for answer in answers():
        assert " ".join(split_into_units(answer)) == answer


def test_the_longest_carrier_wins() -> None:
    assert "to" not in CARRIERS
    assert split_into_units("the cafe is on the second floor")[-1] == "is on the second floor"
    assert split_into_units("two tickets to oslo") == ["two", "tickets to", "oslo"]
    assert split_into_units("the ticket office is near the main entrance") == [
        "the",
        "ticket office",
        "is near the main entrance",
    ]


def test_every_word_alone_is_a_unit_too() -> None:
    assert unit_names(["calling room one"]) == ["calling", "calling room", "one", "room"]


@pytest.mark.parametrize(
    ("num_phones", "num_frames", "starts"),
    [
        ([4], 3, (0,)),
        ([2, 2, 4], 8, (0, 2, 4)),
        ([1, 1, 6], 4, (0, 1, 2)),  # by their phones the first two words would share a frame
    ],
)
def test_words_divide_the_frames_by_their_phones_and_share_none(
    num_phones: list[int], num_frames: int, starts: tuple[int, ...]
) -> None:
    assert share_frames(num_phones, num_frames) == starts


def test_a_saved_voice_speaks_alike_after_loading(voice: UnitVoice, tmp_path: Path) -> None:
    voice.save(tmp_path / "units.npz")
    loaded = UnitVoice.load(tmp_path / "units.npz")
    assert loaded.names == voice.names
    text = "calling room four one four"
    codes, word_frames = loaded.answer_codes(text)
    assert np.array_equal(codes, voice.answer_codes(text)[0])
    assert word_frames == voice.answer_codes(text)[1]
    assert np.array_equal(loaded.answer_pcm(text), voice.answer_pcm(text))
    assert [path.name for path in tmp_path.iterdir()] == ["units.npz"]


@pytest.mark.parametrize("content", [None, b"not an archive", b"PK\x03\x04 cut short"])
def test_a_missing_or_damaged_voice_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "units.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match="build it again"):
        UnitVoice.load(path)


def test_a_missing_synthesiser_is_named_with_its_debian_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SettingsError, match="apt install espeak-ng flite"):
        build_units(Tokeniser())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_every_answer_can_be_spoken_with_each_word_in_another_frame() -> None:
    voice = build_units(Tokeniser().eval())
    for answer in answers():
        codes, word_frames = voice.answer_codes(answer)
        assert len(word_frames) == len(answer.split())
        assert word_frames == sorted(set(word_frames))
        assert word_frames[0] >= 0
        assert word_frames[-1] < len(codes)
        assert codes.shape == (len(voice.answer_pcm(answer)) // FRAME_SAMPLES, 7)
