"""WAV files: read whatever people record, write what the model says.

read    RIFF, RIFX (its big-endian twin), RF64 and BW64 (for more than 4 GiB); integers of 8, 16, 24
        or 32 bits, floats of 32 or 64, mu-law, A-law; any rate and number of channels
length  what a program writes that cannot know the length (0, or just below a round limit) means: to
        the end of the file. Any other length that the file does not reach is an error: it was cut
write   16-bit mono under a temporary name, which closing renames; valid at every moment, so what
        was said before an interruption, a full disk or a SIGKILL is kept
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soxr
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError, DoesNotFit
from deeptalk_edge.files import OutputFile, open_input, refusing
from deeptalk_edge.sound.pcm import Downmix, as_int16, within_scale
from deeptalk_edge.sound.wav_encodings import EXTENSIBLE, PCM, ByteOrder, decode

Array = NDArray[np.float32]

# What a program that writes to a pipe puts for the size, in RIFF and in RF64.
_UNKNOWN_BYTES, _UNKNOWN_BYTES_64 = 2**32 - 1, 2**64 - 1
_HEAD_BYTES = 12  # what tells a WAV file
_HEADER_BYTES = 44  # of what is written here
# Lengths that mean an unknown one are below these: ffmpeg 2**32 - 1; arecord 2**31; sox and
# espeak-ng 2**31 - 4096, rounded to whole frames; servers 2,000,000,000.
_ROUND_LIMITS = (2_000_000_000, 2**31, 2**32)
_BELOW_A_LIMIT = 8192
_KINDS: dict[bytes, ByteOrder] = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<", b"BW64": "<"}

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


class WavEncodingUnknown(AudioError):
    """A whole WAV file whose samples have an encoding that is not known here."""

    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(f"{path}: {encoding}; convert the file to 16-bit PCM")
        self.encoding = encoding


def read_wav(path: Path | str) -> Sound:
    """Read a WAV file as mono; `read_sound` reads other files, too.

    Raises AudioError if it is not one, is truncated or empty, holds NaN or samples far beyond full
    scale, or is compressed.
    """
    path = Path(path)
    try:
        with open_input(path) as file:
            content = read_head(file)
            if not is_wav(content):
                raise AudioError(
                    f"{path}: not a WAV file; convert it, for example with `ffmpeg -i`"
                )
            content += file.read()
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_wav(path, content)


def read_head(file: BinaryIO) -> bytes:
    """As much as tells what a file is."""
    return file.read(_HEAD_BYTES)


def is_wav(head: bytes) -> bool:
    """Whether a file that begins like this is a WAV file."""
    return head[:4] in _KINDS and head[8:12] == b"WAVE"


def parse_wav(path: Path, content: bytes) -> Sound:
    """The sound in a WAV file's bytes; `path` is for messages.

    Raises AudioError as `read_wav` does, WavEncodingUnknown if only the encoding is unknown.
    """
    order = _KINDS[content[:4]]
    fmt, samples = _Chunks(path, content, order).find()
    frame_bytes = fmt.num_channels * fmt.bits // 8
    if frame_bytes:  # an incomplete last frame is dropped
        samples = samples[: len(samples) - len(samples) % frame_bytes]
    wide = decode(samples, fmt.tag, fmt.bits, order)
    if wide is None:
        raise WavEncodingUnknown(path, f"encoding {fmt.tag} with {fmt.bits} bits")
    if wide.size == 0:
        raise AudioError(f"{path}: the file holds no samples; record again")
    wide = within_scale(wide.reshape(-1, fmt.num_channels), str(path))
    return Sound(Downmix(str(path)).push(wide), fmt.rate_hz)


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
        content = as_int16(pcm).tobytes()
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


class _Chunks:
    """Walks through the chunks of a WAV file."""

    def __init__(self, path: Path, content: bytes, order: ByteOrder) -> None:
        self._path, self._content, self._order = path, content, order
        self._data_bytes = 0  # of an RF64 file, which has it in a separate chunk

    def find(self) -> tuple[_Format, bytes]:
        """The format and the bytes of the samples.

        Raises AudioError if either is missing or damaged.
        """
        content, fmt, place = self._content, None, _HEAD_BYTES
        while place + 8 <= len(content):
            name, num_bytes = content[place : place + 4], self._u32(place + 4)
            if name == b"data":
                if fmt is None:
                    raise AudioError(f"{self._path}: samples before their format; convert the file")
                return fmt, self._samples(place + 8, num_bytes)
            body = self._body(name, place + 8, num_bytes)
            if name == b"fmt ":
                fmt = self._parse_format(body)
            elif name == b"ds64" and len(body) >= 16:
                (self._data_bytes,) = struct.unpack_from("<Q", body, 8)
            place = self._next_chunk(place + 8 + num_bytes, num_bytes)
        raise AudioError(
            f"{self._path}: truncated: no samples follow the header; copy the file again"
        )

    def _samples(self, start: int, num_bytes: int) -> bytes:
        if num_bytes == _UNKNOWN_BYTES and self._data_bytes not in (0, _UNKNOWN_BYTES_64):
            num_bytes = self._data_bytes
        if self._is_unknown(num_bytes):
            num_bytes = len(self._content) - start
        return self._body(b"data", start, num_bytes)

    def _is_unknown(self, num_bytes: int) -> bool:
        if num_bytes == 0:  # unless the file's own length says that there are none
            return self._u32(4) + 8 != len(self._content)
        below = [limit - num_bytes for limit in _ROUND_LIMITS]
        return any(0 <= gap <= _BELOW_A_LIMIT for gap in below) and num_bytes > len(self._content)

    def _body(self, name: bytes, start: int, num_bytes: int) -> bytes:
        body = self._content[start : start + num_bytes]
        if len(body) < num_bytes:
            raise AudioError(
                f"{self._path}: truncated: {name.decode('latin-1')!r} has {len(body)} of "
                f"{num_bytes} bytes; copy the file again"
            )
        return body

    def _next_chunk(self, end: int, num_bytes: int) -> int:
        """Chunks are padded to even sizes; some programs forget it."""
        if num_bytes % 2 == 0:
            return end
        is_padded = self._content[end : end + 1] == b"\0"
        is_padded = is_padded or self._content[end + 1 : end + 5] in (b"fmt ", b"data")
        return end + is_padded

    def _parse_format(self, body: bytes) -> _Format:
        path = self._path
        if len(body) < 16:
            raise AudioError(f"{path}: truncated: the format has {len(body)} of 16 bytes")
        tag, num_channels, rate_hz, _, _, bits = struct.unpack_from(f"{self._order}HHIIHH", body)
        if tag == EXTENSIBLE and len(body) >= 26:
            # The sub-format's GUID begins with the tag.
            (tag,) = struct.unpack_from(f"{self._order}H", body, 24)
        if not num_channels or not rate_hz:
            raise AudioError(
                f"{path}: {num_channels} channels at {rate_hz} Hz; the header is damaged"
            )
        return _Format(tag, num_channels, rate_hz, bits)

    def _u32(self, place: int) -> int:
        (number,) = struct.unpack_from(f"{self._order}I", self._content, place)
        return int(number)


def _header(rate_hz: int, num_samples: int | None) -> bytes:
    """Of 16-bit mono; None: the number of samples is not known."""
    data_bytes = _UNKNOWN_BYTES if num_samples is None else 2 * num_samples
    riff_bytes = min(_HEADER_BYTES - 8 + data_bytes, _UNKNOWN_BYTES)
    return (
        struct.pack("<4sI4s", b"RIFF", riff_bytes, b"WAVE")
        + struct.pack("<4sIHHIIHH", b"fmt ", 16, PCM, 1, rate_hz, 2 * rate_hz, 2, 16)
        + struct.pack("<4sI", b"data", data_bytes)
    )
