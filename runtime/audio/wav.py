"""WAV files: read whatever people record, write what the model says.

read    RIFF with 8, 16, 24 or 32-bit integers or 32 or 64-bit floats, plain or extensible header,
        any rate, any number of channels (averaged to mono)
write   16-bit mono under a temporary name, which closing renames; valid at every moment, so what
        was said before an interruption, a full disk or a SIGKILL is kept
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import soxr
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError, DoesNotFit
from deeptalk_edge.files import OutputFile, open_input, refusing

Array = NDArray[np.float32]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_BYTES = 0xFFFFFFFF  # what a program that writes to a pipe puts for the size
_HEADER_BYTES = 44

MAX_BYTES = _UNKNOWN_BYTES - _HEADER_BYTES
"""Of samples in one file."""


@dataclass(frozen=True, slots=True)
class Sound:
    """Mono PCM, full scale at 1."""

    pcm: Array
    """(N,)"""
    rate_hz: int

    @property
    def seconds(self) -> float:
        return len(self.pcm) / self.rate_hz


@dataclass(frozen=True, slots=True)
class _Format:
    tag: int
    num_channels: int
    rate_hz: int
    bits: int


def read_wav(path: Path | str) -> Sound:
    """Read a WAV file as mono.

    Raises AudioError if it is not one, is truncated or empty, holds NaN, or is compressed.
    """
    path = Path(path)
    try:
        with open_input(path) as file:
            content = file.read(12)
            if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
                raise AudioError(
                    f"{path}: not a WAV file; convert it, for example with `ffmpeg -i`"
                )
            content += file.read()
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error})") from error
    fmt, samples = _chunks(path, content)
    pcm = _decode(path, fmt, samples)
    if pcm.size == 0:
        raise AudioError(f"{path}: the file holds no samples; record again")
    if not np.isfinite(pcm).all():
        raise AudioError(f"{path}: the file holds NaN or infinite samples; repair the recording")
    return Sound(pcm, fmt.rate_hz)


def resample(sound: Sound, rate_hz: int) -> Sound:
    """The same sound at another rate."""
    if sound.rate_hz == rate_hz:
        return sound
    return Sound(soxr.resample(sound.pcm, sound.rate_hz, rate_hz), rate_hz)


class WavWriter:
    """Writes mono chunks as they come; `close` names the file. Nothing written, no file.

    Samples are written first, then the header that counts them, so the file is a valid WAV at
    every moment. A pipe has no way back: its header says that the length is not known.
    """

    def __init__(self, path: Path | str, rate_hz: int, *, is_new: bool = False) -> None:
        """Open a temporary file beside `path`, or with `is_new` the file itself, which must not
        exist; a device or a pipe is written into.

        Raises AudioError if that is not possible, DoesNotFit if the disk is full.
        """
        self.path = Path(path)
        self.num_samples = 0
        self._rate_hz = rate_hz
        with refusing(self.path, AudioError):
            self._file = OutputFile(self.path, is_new=is_new)
            try:
                self._file.write(_header(rate_hz, 0 if self._file.is_seekable else None))
            except BaseException:
                self._file.discard()
                raise

    def write(self, pcm: Array) -> None:
        """Append samples; what exceeds full scale is clipped.

        Raises DoesNotFit if the disk is full or the file would pass what a WAV can hold, AudioError
        if it cannot be written else; what was written before stays.
        """
        content = np.rint(np.clip(pcm, -1.0, 1.0) * 32767).astype("<i2").tobytes()
        if 2 * self.num_samples + len(content) > MAX_BYTES:
            raise DoesNotFit(f"{self.path}: a WAV file holds 4 GiB; begin another one")
        with refusing(self.path, AudioError):
            if not self._file.is_seekable:
                self._file.write(content)
            else:
                self._file.write_at(_HEADER_BYTES + 2 * self.num_samples, content)
                self._file.write_at(0, _header(self._rate_hz, self.num_samples + len(pcm)))
        self.num_samples += len(pcm)

    def cut(self, num_samples: int) -> None:
        """Keep the first samples alone; for a file, not for a pipe."""
        self.num_samples = min(num_samples, self.num_samples)
        with refusing(self.path, AudioError):
            self._file.write_at(0, _header(self._rate_hz, self.num_samples))

    def close(self) -> None:
        """Give the file its name; harmless when it is closed already.

        Raises AudioError, naming where the sound is, if the name cannot be given.
        """
        if self._file.is_closed:
            return
        if not self.num_samples:
            self._file.discard()
            return
        with refusing(self.path, AudioError):
            if self._file.is_seekable:  # a write that failed may have left a part of it
                self._file.truncate(_HEADER_BYTES + 2 * self.num_samples)
            self._file.commit()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _chunks(path: Path, content: bytes) -> tuple[_Format, bytes]:
    """The format and the bytes of the samples."""
    fmt, place = None, 12
    while place + 8 <= len(content):
        name, num_bytes = content[place : place + 4], _u32(content, place + 4)
        body = content[place + 8 : place + 8 + num_bytes]
        if name == b"data" and num_bytes == _UNKNOWN_BYTES:
            num_bytes = len(body)
        if len(body) < num_bytes:
            raise AudioError(
                f"{path}: truncated: {name.decode('latin-1')!r} has {len(body)} of {num_bytes} "
                "bytes; copy the file again"
            )
        if name == b"fmt ":
            fmt = _parse_format(path, body)
        elif name == b"data":
            if fmt is None:
                raise AudioError(f"{path}: samples before their format; convert the file")
            return fmt, body
        place += 8 + num_bytes + num_bytes % 2  # chunks are padded to even sizes
    raise AudioError(f"{path}: truncated: no samples follow the header; copy the file again")


def _parse_format(path: Path, body: bytes) -> _Format:
    if len(body) < 16:
        raise AudioError(f"{path}: truncated: the format has {len(body)} of 16 bytes")
    tag, num_channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack_from("<H", body, 24)  # the sub-format's GUID begins with the tag
    if not num_channels or not rate_hz:
        raise AudioError(f"{path}: {num_channels} channels at {rate_hz} Hz; the header is damaged")
    return _Format(tag, num_channels, rate_hz, bits)


def _decode(path: Path, fmt: _Format, samples: bytes) -> Array:
    """Bytes to mono (N,); an incomplete last frame is dropped."""
    frame_bytes = fmt.num_channels * fmt.bits // 8
    if frame_bytes:
        samples = samples[: len(samples) - len(samples) % frame_bytes]
    match fmt.tag, fmt.bits:
        case 1, 8:
            wide = np.frombuffer(samples, np.uint8).astype(np.float32) / 128 - 1
        case 1, 16:
            wide = np.frombuffer(samples, "<i2").astype(np.float32) / 2**15
        case 1, 24:
            triples = np.frombuffer(samples, np.uint8).reshape(-1, 3)
            padded = np.pad(triples, ((0, 0), (1, 0)))  # the low byte of an int32
            wide = padded.reshape(-1).view("<i4").astype(np.float32) / 2**31
        case 1, 32:
            wide = (np.frombuffer(samples, "<i4") / 2**31).astype(np.float32)
        case 3, 32:
            wide = np.frombuffer(samples, "<f4").astype(np.float32)
        case 3, 64:
            wide = np.frombuffer(samples, "<f8").astype(np.float32)
        case tag, bits:
            raise AudioError(
                f"{path}: encoding {tag} with {bits} bits; convert the file to 16-bit PCM"
            )
    mono: Array = wide.reshape(-1, fmt.num_channels).mean(axis=1, dtype=np.float32)
    return mono


def _header(rate_hz: int, num_samples: int | None) -> bytes:
    """Of 16-bit mono; None: nobody knows how many samples follow."""
    data_bytes = _UNKNOWN_BYTES if num_samples is None else 2 * num_samples
    riff_bytes = min(_HEADER_BYTES - 8 + data_bytes, _UNKNOWN_BYTES)
    return (
        struct.pack("<4sI4s", b"RIFF", riff_bytes, b"WAVE")
        + struct.pack("<4sIHHIIHH", b"fmt ", 16, _PCM, 1, rate_hz, 2 * rate_hz, 2, 16)
        + struct.pack("<4sI", b"data", data_bytes)
    )


def _u32(content: bytes, place: int) -> int:
    return int.from_bytes(content[place : place + 4], "little")
