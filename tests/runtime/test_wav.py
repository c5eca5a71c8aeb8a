"""Whatever people record is read alike; what is broken is named; what was said is kept."""

from __future__ import annotations

import resource
import wave
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError, DoesNotFit
from deeptalk_edge.runtime.audio.wav import Sound, WavWriter, read_wav, resample
from tests.disks import device_node, small_disk
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


def test_a_file_in_the_making_is_a_valid_wav_after_every_chunk(path: Path) -> None:
    with WavWriter(path, 24000) as writer:
        for count in range(1, 4):
            writer.write(voice(0.1))
            (staging,) = path.parent.iterdir()
            with wave.open(str(staging)) as file:
                assert file.getnframes() == count * 1600


def _write_without_end(writer: WavWriter) -> None:
    for _ in range(100):
        writer.write(voice(0.1))


def test_a_disk_that_fills_keeps_every_whole_chunk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        writer = WavWriter(disk / "a.wav", 16000)
        with pytest.raises(DoesNotFit, match="No space left on device"):
            _write_without_end(writer)
        writer.close()
        writer.close()  # harmless
        found = read_wav(disk / "a.wav").pcm
        np.testing.assert_allclose(found, np.tile(voice(0.1), len(found) // 1600), atol=1e-4)
        assert (disk / "a.wav").stat().st_size == 44 + 2 * len(found)


def test_a_writer_goes_on_where_it_was_when_there_is_room_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "ballast").write_bytes(bytes(40_000))
        with WavWriter(disk / "a.wav", 16000) as writer:
            writer.write(voice(0.1))
            with pytest.raises(DoesNotFit):
                writer.write(-voice(2.0))
            (disk / "ballast").unlink()
            writer.write(voice(0.1))
        np.testing.assert_allclose(read_wav(disk / "a.wav").pcm, np.tile(voice(0.1), 2), atol=1e-4)


def test_a_limit_on_file_sizes_is_told_as_what_it_is(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(DoesNotFit, match=r"File too large.*ulimit -f"),
            WavWriter(path, 16000) as writer,
        ):
            _write_without_end(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_wav(path).pcm) == 3 * 1600


def test_what_is_no_sound_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="not a WAV file"):
        read_wav(device_node(tmp_path / "zero", 5))  # it never ends
