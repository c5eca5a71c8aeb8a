"""All usual recordings are read, broken files are named, and written sound is never lost."""

from __future__ import annotations

import resource
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError, DoesNotFit
from deeptalk_edge.sound.wav import MAX_BYTES, Sound, WavWriter, read_wav, resample
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
    middle = slice(1000, 7000)  # the filter rings at both ends
    np.testing.assert_allclose(found.pcm[middle], voice(0.5)[middle] / 2, atol=2e-3)


def test_a_sound_at_the_wanted_rate_is_not_changed() -> None:
    sound = Sound(voice(0.1), 16000)
    assert resample(sound, 16000) is sound


def test_chunks_before_the_samples_are_skipped_padding_included(path: Path) -> None:
    odd = b"LIST\x03\0\0\0abc\0"
    path.write_bytes(wav_bytes(encode(voice(0.1), PCM, 16), before=odd))
    assert len(read_wav(path).pcm) == 1600


SAMPLES = encode(voice(0.1), PCM, 16)


def with_riff_size(content: bytes, num_bytes: int) -> bytes:
    return content[:4] + struct.pack("<I", num_bytes) + content[8:]


@pytest.mark.parametrize(
    ("riff_bytes", "data_bytes"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg to a pipe
        (0x80000024, 0x80000000),  # arecord
        (0x7FFFF024, 0x7FFFF000),  # espeak-ng, sox
        (0x7FFFF020, 0x7FFFEFFC),  # sox, whole frames of 6 bytes
        (0x7FFFFFFF, 0x7FFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF - 44),
        (2_000_000_036, 2_000_000_000),
        (0, 0),  # a killed recorder
        (36, 0),
    ],
)
@pytest.mark.parametrize("tail", [b"", b"\0"])
def test_a_placeholder_length_means_to_the_end_of_the_file(
    path: Path, riff_bytes: int, data_bytes: int, tail: bytes
) -> None:
    content = wav_bytes(SAMPLES + tail, claimed_bytes=data_bytes)
    path.write_bytes(with_riff_size(content, riff_bytes))
    assert len(read_wav(path).pcm) == 1600


@pytest.mark.parametrize("data_bytes", [3201, 4000, 1_000_000_000, 0x60000000, 0x90000000])
def test_a_file_shorter_than_its_plausible_length_is_refused(path: Path, data_bytes: int) -> None:
    path.write_bytes(wav_bytes(SAMPLES, claimed_bytes=data_bytes))
    with pytest.raises(AudioError, match=f"'data' has 3200 of {data_bytes} bytes"):
        read_wav(path)


def test_an_empty_data_chunk_before_another_chunk_is_empty(path: Path) -> None:
    content = wav_bytes(b"LIST\x04\0\0\0abcd", claimed_bytes=0)
    path.write_bytes(with_riff_size(content, len(content) - 8))
    with pytest.raises(AudioError, match="holds no samples"):
        read_wav(path)


@pytest.mark.parametrize("odd", [b"LIST\x03\0\0\0abc", b"LIST\x03\0\0\0abcx"])
def test_an_odd_chunk_without_its_padding_is_read(path: Path, odd: bytes) -> None:
    path.write_bytes(wav_bytes(SAMPLES, before=odd))
    assert len(read_wav(path).pcm) == 1600


@pytest.mark.parametrize("data_bytes", [3200, 0, 0xFFFFFFFFFFFFFFFF])
@pytest.mark.parametrize("kind", [b"RF64", b"BW64"])
def test_a_file_made_for_more_than_4_gib_is_read(path: Path, kind: bytes, data_bytes: int) -> None:
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 0, data_bytes, 1600, 0)
    form = wav_bytes(SAMPLES, claimed_bytes=0xFFFFFFFF)[12:]
    path.write_bytes(kind + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + sizes + form)
    assert len(read_wav(path).pcm) == 1600


def test_a_cut_file_made_for_more_than_4_gib_is_refused(path: Path) -> None:
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 0, 5_000_000_000, 1600, 0)
    form = wav_bytes(SAMPLES, claimed_bytes=0xFFFFFFFF)[12:]
    path.write_bytes(b"RF64" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + sizes + form)
    with pytest.raises(AudioError, match="'data' has 3200 of 5000000000 bytes"):
        read_wav(path)


def test_a_big_endian_file_is_read(path: Path) -> None:
    form = struct.pack(">HHIIHH", 1, 1, 16000, 32000, 2, 16)
    body = b"WAVEfmt " + struct.pack(">I", 16) + form + b"data" + struct.pack(">I", len(SAMPLES))
    body += np.frombuffer(SAMPLES, "<i2").astype(">i2").tobytes()
    path.write_bytes(b"RIFX" + struct.pack(">I", len(body)) + body)
    np.testing.assert_allclose(read_wav(path).pcm, voice(0.1), atol=1e-4)


@pytest.mark.parametrize(
    ("tag", "codes", "values"),
    [
        (6, [0xD5, 0x55, 0xAA, 0x2A, 0xD4, 0xC5], [8, -8, 32256, -32256, 24, 264]),
        (7, [0xFF, 0x7F, 0x80, 0x00, 0xFE, 0xEF], [0, 0, 32124, -32124, 8, 132]),
    ],
)
def test_the_telephone_s_encodings_are_read(
    path: Path, tag: int, codes: list[int], values: list[int]
) -> None:
    """The values are those of ITU-T G.711 on a scale of 16 bits."""
    path.write_bytes(wav_bytes(bytes(codes), tag=tag, bits=8))
    np.testing.assert_array_equal(read_wav(path).pcm * 2**15, values)


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_far_beyond_full_scale_are_refused_with_their_value(path: Path, bits: int) -> None:
    sound = voice(0.1) / np.abs(voice(0.1)).max() * 32767
    path.write_bytes(wav_bytes(encode(sound, FLOAT, bits), tag=FLOAT, bits=bits))
    with pytest.raises(AudioError, match=r"question\.wav: float samples reach 32767"):
        read_wav(path)


def test_floats_a_little_beyond_full_scale_are_clipped_with_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = voice(0.1) / np.abs(voice(0.1)).max() * 1.5
    path.write_bytes(wav_bytes(encode(sound, FLOAT, 32), tag=FLOAT, bits=32))
    np.testing.assert_array_equal(read_wav(path).pcm, sound.clip(-1, 1))
    assert "question.wav: samples reach 1.50" in caplog.text


def test_stereo_in_antiphase_does_not_vanish(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = np.stack([voice(0.1), -voice(0.1)], axis=1)
    path.write_bytes(wav_bytes(encode(wide, PCM, 16), channels=2))
    np.testing.assert_allclose(read_wav(path).pcm, voice(0.1), atol=1e-4)
    assert "question.wav: the channels cancel each other; channel 1 of 2" in caplog.text


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
        (wav_bytes(bytes(100), tag=2, bits=4), "encoding 2 with 4 bits; convert"),
        (wav_bytes(bytes(100), bits=12), "encoding 1 with 12 bits"),
        (wav_bytes(bytes(100), channels=0), "0 channels at 16000 Hz"),
        (wav_bytes(bytes(100), rate_hz=0), "1 channels at 0 Hz"),
        (b"RIFF\0\0\0\0WAVEdata\x04\0\0\0abcd", "samples before their format"),
    ],
)
def test_the_error_for_a_file_without_sound_says_why(
    path: Path, content: bytes, message: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read_wav(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(path: Path) -> None:
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


def test_a_file_never_exceeds_the_size_that_its_header_can_hold(path: Path) -> None:
    with WavWriter(path, 24000) as writer:
        writer.num_samples = MAX_BYTES // 2 - 3  # a hole in the file
        with pytest.raises(DoesNotFit, match="a WAV file holds 4 GiB; begin another one"):
            writer.write(np.zeros(4, np.float32))
        writer.write(np.zeros(3, np.float32))
    with wave.open(str(path)) as file:
        assert file.getnframes() == MAX_BYTES // 2
    path.unlink()


def test_an_interruption_keeps_the_written_sound(path: Path) -> None:
    def interrupted() -> None:
        with WavWriter(path, 24000) as writer:
            writer.write(voice(0.1))
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_wav(path).pcm) == 1600
    assert list(path.parent.iterdir()) == [path]


def test_no_sound_leaves_no_file(path: Path) -> None:
    WavWriter(path, 24000).close()
    assert list(path.parent.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cannot be written"):
        WavWriter(tmp_path / "absent" / "answer.wav", 24000)


def test_an_unfinished_file_is_a_valid_wav_after_every_chunk(path: Path) -> None:
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


def test_a_writer_continues_when_the_disk_has_room_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "ballast").write_bytes(bytes(40_000))
        with WavWriter(disk / "a.wav", 16000) as writer:
            writer.write(voice(0.1))
            with pytest.raises(DoesNotFit):
                writer.write(-voice(2.0))
            (disk / "ballast").unlink()
            writer.write(voice(0.1))
        np.testing.assert_allclose(read_wav(disk / "a.wav").pcm, np.tile(voice(0.1), 2), atol=1e-4)


def test_a_limit_on_file_sizes_is_named_in_the_error(path: Path) -> None:
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


def test_a_file_without_sound_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="not a WAV file"):
        read_wav(device_node(tmp_path / "zero", 5))  # it never ends
