"""Any file that holds sound. WAV and its relatives are read here (`wav.py`); FLAC, OGG, MP3 and
what else libsndfile knows by the package `soundfile`, the extra `audio-files`."""

from __future__ import annotations

import io
from pathlib import Path

from deeptalk_edge.errors import AudioError
from deeptalk_edge.files import open_input
from deeptalk_edge.sound.pcm import Downmix, within_scale
from deeptalk_edge.sound.wav import Sound, WavEncodingUnknown, is_wav, parse_wav, read_head

_SIGNATURES = {  # how files begin that `soundfile` may know
    b"fLaC": "a FLAC file",
    b"OggS": "an OGG file",
    b"ID3": "an MP3 file",
    b"\xff\xfb": "an MP3 file",
    b"\xff\xf3": "an MP3 file",
    b"\xff\xf2": "an MP3 file",
    b"FORM": "an AIFF file",
    b".snd": "an AU file",
    b"caff": "a CAF file",
    b"riff": "a W64 file",
}


def read_sound(path: Path | str) -> Sound:
    """Read a file as mono.

    Raises AudioError if it holds no sound, none that can be used, or no reader here knows it.
    """
    path = Path(path)
    kind = None
    try:
        with open_input(path) as file:
            content = read_head(file)
            kind = next((k for begin, k in _SIGNATURES.items() if content.startswith(begin)), None)
            if not is_wav(content) and kind is None:
                raise AudioError(
                    f"{path}: not a WAV file, nor another kind that is known; convert it, for "
                    "example with `ffmpeg -i`"
                )
            content += file.read()
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error})") from error
    if kind is not None:
        return _read_by_library(path, content, kind)
    try:
        return parse_wav(path, content)
    except WavEncodingUnknown as error:
        return _read_by_library(path, content, f"a WAV file in {error.encoding}")


def _read_by_library(path: Path, content: bytes, kind: str) -> Sound:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile is absent
        raise AudioError(
            f"{path}: {kind} needs soundfile ({error}); pip install 'deeptalk-edge[audio-files]', "
            "or convert it with `ffmpeg -i`"
        ) from error
    try:
        wide, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(
            f"{path}: {kind}, and libsndfile cannot read it ({error}); convert it with `ffmpeg -i`"
        ) from error
    if not wide.size:
        raise AudioError(f"{path}: the file holds no samples; record again")
    return Sound(Downmix(str(path)).push(within_scale(wide, str(path))), int(rate_hz))
