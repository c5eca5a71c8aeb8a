"""Sound files of other kinds are read by soundfile, or the message names the extra."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError
from deeptalk_edge.sound.sound_file import read_sound
from tests.disks import device_node
from tests.runtime.sounds import PCM, encode, voice, wav_bytes

needs_soundfile = pytest.mark.skipif(
    importlib.util.find_spec("soundfile") is None, reason="soundfile is absent"
)


def write(path: Path, **how: str) -> None:
    import soundfile

    wide = np.stack([voice(0.5, 24000), 0.5 * voice(0.5, 24000)], axis=1)
    soundfile.write(path, wide, 24000, **how)


@needs_soundfile
@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.1),
        ("AIFF", "PCM_16", 1e-4),
        ("AU", "ULAW", 0.02),
        ("CAF", "PCM_16", 1e-4),
        ("W64", "PCM_16", 1e-4),
        ("WAV", "IMA_ADPCM", 0.1),
        ("WAV", "MS_ADPCM", 0.1),
    ],
)
def test_kinds_of_file_that_our_reader_lacks_are_read_by_the_library(
    kind: str, subtype: str, error: float, tmp_path: Path
) -> None:
    write(tmp_path / "q", format=kind, subtype=subtype)
    sound = read_sound(tmp_path / "q")
    assert sound.rate_hz == 24000
    expected = 0.75 * voice(0.5, 24000)
    assert len(sound.pcm) == pytest.approx(len(expected), abs=1200)
    assert sound.pcm.dtype == np.float32
    lag = 0 if error < 0.1 else _lag(expected, sound.pcm)
    found = sound.pcm[lag : lag + 10000]
    np.testing.assert_allclose(found, expected[: len(found)], atol=error)


def _lag(expected: np.ndarray[tuple[int], np.dtype[np.float32]], found: object) -> int:
    """By how many samples a lossy codec is late."""
    likeness = np.correlate(np.asarray(found), expected[:8000], "valid")
    return int(likeness.argmax())


@needs_soundfile
@pytest.mark.parametrize("kind", ["RF64", "RIFX"])
@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "PCM_16", "PCM_24", "FLOAT"])
def test_our_reader_agrees_with_the_library(kind: str, subtype: str, tmp_path: Path) -> None:
    import soundfile

    how = {"format": "WAV", "endian": "BIG"} if kind == "RIFX" else {"format": "RF64"}
    write(tmp_path / "q", subtype=subtype, **how)
    assert (tmp_path / "q").read_bytes()[:4] == kind.encode()
    theirs, rate_hz = soundfile.read(tmp_path / "q", dtype="float32")
    ours = read_sound(tmp_path / "q")
    assert ours.rate_hz == rate_hz
    np.testing.assert_allclose(ours.pcm, theirs.mean(axis=1), atol=1e-7)


@needs_soundfile
def test_the_error_for_a_damaged_file_quotes_the_library(tmp_path: Path) -> None:
    (tmp_path / "q.flac").write_bytes(b"fLaC" + bytes(100))
    with pytest.raises(AudioError, match=r"q\.flac: a FLAC file, and libsndfile cannot read it \("):
        read_sound(tmp_path / "q.flac")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"fLaC" + bytes(100), "a FLAC file"),
        (b"OggS" + bytes(100), "an OGG file"),
        (b"ID3\x04" + bytes(100), "an MP3 file"),
        (wav_bytes(bytes(512), tag=0x11, bits=4), "a WAV file in encoding 17 with 4 bits"),
    ],
)
def test_without_the_library_the_message_names_the_extra(
    content: bytes, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "q").write_bytes(content)
    with pytest.raises(AudioError, match=rf"{kind} needs soundfile .*deeptalk-edge\[audio-files\]"):
        read_sound(tmp_path / "q")


def test_wav_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "q").write_bytes(wav_bytes(encode(voice(0.1), PCM, 16)))
    np.testing.assert_allclose(read_sound(tmp_path / "q").pcm, voice(0.1), atol=1e-4)


def test_a_file_without_sound_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="not a WAV file, nor another kind"):
        read_sound(device_node(tmp_path / "zero", 5))  # it never ends
