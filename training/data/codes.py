"""Codes for answers that come as sound: by the codec's own encoder, once, then from a cache.

encoder   SNAC's, where the checkpoint's codec has one; else the mel encoder of
          `codec_encoder.safetensors` (the tiny checkpoint's)
cache     one small file a recording, named by the recording's and the encoder's bytes
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.files import sha256_of, write_file
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import load_snac
from deeptalk_edge.training.tiny.tokens import Tokeniser

CODEC_ENCODER = "codec_encoder.safetensors"
"""Beside a checkpoint's weights, where its SNAC directory holds a decoder alone."""

Samples = NDArray[np.float32]


class CodeWriter(Protocol):
    """Turns sound into codes."""

    def codes(self, samples: Samples) -> Ids:
        """(N,) samples at the codec's rate to frames (A, 7)."""


class CodeCache:
    """Codes of recordings, computed at the first need."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        """`directory` is where the cache lies; it need not exist."""
        self._checkpoint, self._directory = checkpoint, directory

    def codes_of(self, recording: Path) -> Ids:
        """Frames (A, 7) of a recording.

        Raises AudioError if it cannot be read, SettingsError if this codec has no encoder.
        """
        name = hashlib.sha256(f"{sha256_of(recording)} {self._identity}".encode()).hexdigest()
        path = self._directory / f"{name[:32]}.snac"
        if path.is_file():
            numbers = np.array(path.read_text(encoding="ascii").split(), np.int64)
            return numbers.reshape(-1, 7)
        sound = read_sound(recording)
        samples = soxr.resample(sound.pcm, sound.rate_hz, self._rate_hz)
        frames = self._writer.codes(np.asarray(samples, np.float32))
        self._directory.mkdir(parents=True, exist_ok=True)
        write_file(path, " ".join(map(str, frames.flatten().tolist())).encode())
        return frames

    @cached_property
    def _identity(self) -> str:
        mel = self._checkpoint / CODEC_ENCODER
        weights = self._checkpoint / "snac" / "model.safetensors"
        return sha256_of(mel if mel.is_file() else weights)

    @cached_property
    def _writer(self) -> CodeWriter:
        return open_code_writer(self._checkpoint)

    @cached_property
    def _rate_hz(self) -> int:
        return load_snac(self._checkpoint / "snac").spec.sampling_rate


class _SnacWriter:
    """SNAC's own encoder."""

    def __init__(self, codec: Snac) -> None:
        self._codec = codec

    @torch.inference_mode()
    def codes(self, samples: Samples) -> Ids:
        padded = np.pad(samples, (0, -len(samples) % self._codec.spec.frame_samples))
        frames: Ids = self._codec.encode(torch.from_numpy(padded)[None])[0].numpy()
        return frames


class _MelWriter:
    """The tiny codec's mel encoder."""

    def __init__(self, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser

    def codes(self, samples: Samples) -> Ids:
        # A frame of silence on both sides: the codes of an answer's ends are then its own.
        silence = np.zeros(self._tokeniser.spec.frame_samples, np.float32)
        missing = -len(samples) % len(silence)
        padded = np.concatenate([silence, np.pad(samples, (0, missing)), silence])
        frames: Ids = self._tokeniser.codes(padded).numpy()[1:-1]
        return frames


def open_code_writer(checkpoint: Path) -> CodeWriter:
    """The encoder that belongs to a checkpoint's codec.

    Raises SettingsError if it has none, ArtifactError if the codec is damaged.
    """
    codec = load_snac(checkpoint / "snac")
    if codec.encoder is not None:
        return _SnacWriter(codec)
    path = checkpoint / CODEC_ENCODER
    if path.is_file():
        tokeniser = Tokeniser.load(path)
        found = tokeniser.quantizer.state_dict()
        for name, wanted in codec.quantizer.state_dict().items():
            if not torch.allclose(found[name], wanted, atol=1e-3):
                raise ArtifactError(
                    f"{path}: belongs to another codec ({name} differs); fit one to this codec "
                    "with `python -m deeptalk_edge.training.tiny.invert`"
                )
        return _MelWriter(tokeniser)
    raise SettingsError(
        f"{checkpoint}: its codec can only decode, so codes cannot be made here; give `codec` "
        "with every answer, or a SNAC directory with the encoder"
    )
