"""Whatever people record is read alike; what is broken is named; what was said is kept."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.wav import Sound, WavWriter, read_wav, resample
from tests.runtime.sounds import EXTENSIBLE, FLOAT, PCM, encode, voice, wav_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "question.wav"


@pytest.mark.parametrize(
    ("tag", "bits", "error"),
    [
        (PCM, 8, 1e-2),
        (PCM, 16, 1e-4),
        (PCM, 24, 1e-6),
        (PCM, 32, 1e-7),
        (FLOAT, 32, 0),
        (FLOAT, 64, 0),
        (EXTENSIBLE, 24, 1e-6),
        (EXTENSIBLE, 64, 0),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_common_encoding_reads_alike(
    path: Path, tag: int, bits: int, error: float, channels: int
) -> None:
    sound = voice(0.05)
    wide = np.stack([sound * (1 + c) / channels for c in range(channels)], axis=1)
    path.write_bytes(wav_bytes(encode(wide, tag, bits), tag=tag, bits=bits, channels=channels))
    found = read_wav(path)
    assert found.rate_hz == 16000
    assert found.pcm.dtype == np.float32
    np.testing.assert_allclose(found.pcm, wide.mean(axis=1), atol=error + 1e-7)


def test_48_khz_stereo_becomes_16_khz_mono(path: Path) -> None:
    left = voice(0.5, rate_hz=48000)
    wide = np.stack([left, 0 * left], axis=1)
    path.write_bytes(wav_bytes(encode(wide, PCM, 16), rate_hz=48000, channels=2))
    found = resample(read_wav(path), 16000)
    assert found.rate_hz == 16000
    assert len(found.pcm) == 8000
    middle = slice(1000, 7000)  # the ends ring
    np.testing.assert_allclose(found.pcm[middle], voice(0.5)[middle] / 2, atol=2e-3)


def test_a_sound_at_the_wanted_rate_is_left_alone() -> None:
    sound = Sound(voice(0.1), 16000)
    assert resample(sound, 16000) is sound


def test_chunks_before_the_samples_are_skipped_padding_included(path: Path) -> None:
    odd = b"LIST\x03\0\0\0abc\0"
    path.write_bytes(wav_bytes(encode(voice(0.1), PCM, 16), before=odd))
    assert len(read_wav(path).pcm) == 1600


def test_a_piped_file_of_unknown_length_reads_to_its_end(path: Path) -> None:
    path.write_bytes(wav_bytes(encode(voice(0.1), PCM, 16) + b"\0", claimed_bytes=0xFFFFFFFF))
    assert len(read_wav(path).pcm) == 1600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a WAV file"),
        (b"ID3\x04 no wave at all", "not a WAV file"),
        (wav_bytes(b""), "holds no samples"),
        (wav_bytes(b"\1"), "holds no samples"),
        (wav_bytes(bytes(1000))[:-1], "truncated: 'data' has 999 of 1000 bytes"),
        (wav_bytes(bytes(1000))[:40], "truncated: no samples follow"),
        (wav_bytes(bytes(1000))[:30], "truncated: 'fmt '"),
        (
            wav_bytes(np.array([0, np.nan], np.float32).tobytes(), tag=FLOAT, bits=32),
            "NaN or infinite",
        ),
        (wav_bytes(np.array([np.inf, 0]).tobytes(), tag=FLOAT, bits=64), "NaN or infinite"),
        (wav_bytes(bytes(100), tag=7, bits=8), "encoding 7 with 8 bits; convert"),
        (wav_bytes(bytes(100), bits=12), "encoding 1 with 12 bits"),
        (wav_bytes(bytes(100), channels=0), "0 channels at 16000 Hz"),
        (wav_bytes(bytes(100), rate_hz=0), "1 channels at 0 Hz"),
        (b"RIFF\0\0\0\0WAVEdata\x04\0\0\0abcd", "samples before their format"),
    ],
)
def test_a_file_that_is_no_sound_says_why(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read_wav(path)
    assert str(path) in str(caught.value)


def test_an_absent_file_says_so(path: Path) -> None:
    with pytest.raises(AudioError, match="No such file"):
        read_wav(path)


def test_what_is_written_reads_back_and_full_scale_is_clipped(path: Path) -> None:
    sound = 5 * voice(0.2)
    assert np.abs(sound).max() > 1
    with WavWriter(path, 24000) as writer:
        for chunk in np.array_split(sound, 3):
            writer.write(chunk)
    with wave.open(str(path)) as file:  # the standard library agrees with our header
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        assert file.getnframes() == len(sound)
    np.testing.assert_allclose(read_wav(path).pcm, sound.clip(-1, 1), atol=1e-4)


def test_an_interruption_keeps_what_was_said(path: Path) -> None:
    def interrupted() -> None:
        with WavWriter(path, 24000) as writer:
            writer.write(voice(0.1))
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_wav(path).pcm) == 1600
    assert list(path.parent.iterdir()) == [path]


def test_nothing_said_leaves_no_file(path: Path) -> None:
    WavWriter(path, 24000).close()
    assert list(path.parent.iterdir()) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cannot be written"):
        WavWriter(tmp_path / "absent" / "answer.wav", 24000)
