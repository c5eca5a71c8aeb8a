"""Quiet speech is amplified; a quiet room is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.level import QUIET_DBFS, loud_dbfs, raise_quiet
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.loop.utterances import read_utterances
from deeptalk_edge.sound.wav import WavWriter, read_wav
from tests.places import ROOT
from tests.runtime.sounds import silence

Array = NDArray[np.float32]

SPOKEN = sorted((ROOT / "checkpoints" / "tiny" / "questions").glob("*.wav"))[0]
WINDOW = 160_000


def at(dbfs: float, pcm: Array) -> Array:
    """The recording with its speech at this level."""
    return pcm * np.float32(10 ** ((dbfs - loud_dbfs(pcm)) / 20))


@pytest.mark.parametrize("dbfs", [-40, -50, -60])
def test_quiet_speech_in_a_file_is_cut_and_encoded_like_loud_speech(
    dbfs: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoken = np.concatenate([silence(1), read_wav(SPOKEN).pcm, silence(1)])
    lengths = []
    for level in (-20, dbfs):
        with WavWriter(tmp_path / "q.wav", 16000) as writer:
            writer.write(at(level, spoken))
        (utterance,) = read_utterances(tmp_path / "q.wav", WINDOW)
        assert loud_dbfs(utterance) == pytest.approx(-20, abs=0.5)
        lengths.append(len(utterance))
    assert abs(lengths[1] - lengths[0]) <= 2 * 320
    assert f"q.wav: the speech is at {dbfs} dBFS" in caplog.text


def test_a_click_in_quiet_speech_is_raised_to_full_scale_at_most() -> None:
    spoken = at(-50, read_wav(SPOKEN).pcm)
    spoken[8000:8002] = 0.5, -0.5
    raised = raise_quiet(spoken, "q.wav")
    assert raised[8000:8002].tolist() == [1.0, -1.0]
    np.testing.assert_allclose(loud_dbfs(raised), -20, atol=0.5)


def test_speech_of_an_ordinary_level_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    for dbfs in (-37, -20, -3):
        spoken = at(dbfs, read_wav(SPOKEN).pcm)
        assert raise_quiet(spoken, "q.wav") is spoken
    assert not caplog.records


@pytest.mark.parametrize("dbfs", [-65, -55, -45])
def test_the_noise_of_a_room_is_not_amplified(dbfs: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(5 * 16000)
    room = np.concatenate([silence(1), (noise * 10 ** (dbfs / 20)).astype(np.float32)])
    assert raise_quiet(room, "q.wav") is room
    with WavWriter(tmp_path / "q.wav", 16000) as writer:
        writer.write(room)
    with pytest.raises(
        AudioError, match=rf"no speech .* 6\.0 s of sound, .* {dbfs + 1} dBFS; speak up"
    ):
        read_utterances(tmp_path / "q.wav", WINDOW)


@pytest.mark.parametrize("read", [read_utterance, lambda path: read_utterances(path, WINDOW)])
def test_digital_silence_has_the_lowest_level(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with WavWriter(tmp_path / "q.wav", 16000) as writer:
        writer.write(silence(0.5))
    with pytest.raises(AudioError, match=f"the loudest of it at {QUIET_DBFS:.0f} dBFS"):
        read(tmp_path / "q.wav")
    assert loud_dbfs(np.zeros(0, np.float32)) == QUIET_DBFS
