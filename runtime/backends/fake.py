"""A backend that computes nothing: it answers every question with known words and known tones.

For integrators who test their own side of a conversation: it reads a bundle's manifest and
tokenizer, and no weights. Equal questions in equal conversations get equal answers; another
question gets another number in its answer and other tones. No model computes its answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.lifetime import while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from deeptalk_edge.runtime.backends.base import Backend, BackendSettings
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.lm.cached_engine import CachedEngine
from deeptalk_edge.runtime.lm.encoder import Encoder
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.runtime.lm.kv_cache import KvCache
from deeptalk_edge.runtime.lm.text import TextTokenizer

Array = NDArray[np.float32]

_FRAMES_PER_ID = 3  # speech has three frames, 0.26 s, for each text id
_CERTAIN = 60.0  # a logit among zeros: probability 1 at any usable temperature
_AMPLITUDE = 0.1


def open_backend(bundle: Bundle, settings: BackendSettings) -> Backend:
    """Raises ArtifactError if the bundle's tokenizer cannot be read."""
    manifest = bundle.manifest
    tokenizer = TextTokenizer(bundle.file("tokenizer.json"), manifest.model.vocabulary)
    return Backend(
        name="fake",
        kernel_path=None,
        encoder=Encoder(
            FakeEncoder(manifest.model.decoder.width),
            manifest.model.encoder,
            window=settings.encoder_window,
        ),
        engine=FakeEngine(manifest.model, tokenizer, context_rows=settings.context_rows),
        codec=FakeCodec(manifest.codec.spec),
        experts=NoExperts(),
        self_check=None,
    )


class FakeEncoder:
    """See `EncoderGraph`. A feature repeats the frame's mean log-mel C times."""

    def __init__(self, width: int) -> None:
        self._width = width

    def encode(self, log_mel: Array, num_frames: int) -> Array:
        loudness = log_mel[0].mean(axis=0)[: 2 * num_frames].reshape(num_frames, 2).mean(axis=1)
        return np.repeat(loudness[:, None], self._width, axis=1)

    def close(self) -> None:
        pass


class FakeEngine(CachedEngine[KvCache]):
    """See `Engine`. Each prompt is answered by one sentence with a number made from the prompt."""

    def __init__(self, model: ModelSpec, tokenizer: TextTokenizer, *, context_rows: int) -> None:
        super().__init__(
            KvCache(num_layers=1, capacity=context_rows, width=1), nullcontext().__enter__
        )
        self._vocabulary, self._tokenizer = model.vocabulary, tokenizer
        self._prompt_rows = 0  # rows fed before the last row of the prompt
        self._number = 0
        self._text_ids: list[int] = []

    @while_open
    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        self._check_prompt(features, audio_mask)
        self._cache.ahead(0, len(rows))
        self._cache.advance(len(rows))
        self._fed_items = 1
        self._prompt_rows = self.num_rows
        asked = np.ascontiguousarray(rows).tobytes() + np.ascontiguousarray(features).tobytes()
        self._number = zlib.crc32(asked) % 1000
        sentence = f"This is answer {self._number} of the fake backend."
        self._text_ids = [*self._tokenizer.encode(sentence), self._vocabulary.eos]

    @while_open
    def decode_step(self, rows: Ids) -> Logits:
        self._check_step(rows)
        self._cache.ahead(0, 1)
        self._cache.advance(1)
        self._fed_items = len(rows)
        return self._logits()

    @while_open
    def _last_logits(self) -> Logits:
        self._check_fed()
        return self._logits()

    def _logits(self) -> Logits:
        vocabulary, items = self._vocabulary, self._fed_items
        row = max(self.num_rows - self._prompt_rows - 1, 0)
        text = np.zeros((items, vocabulary.text_size), np.float32)
        codes = np.zeros((items, vocabulary.num_codebooks, vocabulary.codebook_block), np.float32)
        text[:, self._text_ids[min(row, len(self._text_ids) - 1)]] = _CERTAIN
        num_frames = _FRAMES_PER_ID * len(self._text_ids)
        for codebook in range(vocabulary.num_codebooks):
            frame = row - 1 - codebook
            code = (self._number + frame // _FRAMES_PER_ID) % vocabulary.codebook_size
            codes[:, codebook, code if frame < num_frames else vocabulary.end_audio] = _CERTAIN
        return Logits(text, codes)


class FakeCodec:
    """See `Codec`. A frame's first code chooses its tone of the scale; there is no look-ahead."""

    def __init__(self, spec: CodecSpec) -> None:
        self._spec = spec

    def decode(
        self, codes: Ids, *, position: int, length: int, state: Array, noise: Sequence[Array]
    ) -> tuple[Array, Array]:
        samples = np.arange(self._spec.frame_samples) / self._spec.sampling_rate
        hertz = 220.0 * 2.0 ** ((codes[:, :1] % 24) / 12)
        return np.float32(_AMPLITUDE * np.sin(2 * np.pi * hertz * samples)).reshape(-1), state

    def close(self) -> None:
        pass


class NoExperts:
    """See `Experts`."""

    recorder: RouteRecorder | None = None

    def user_started_speaking(self) -> None:
        pass

    def idle(self) -> None:
        pass

    def end_turn(self) -> dict[str, Any]:
        return {
            "all_resident_passes": 0,
            "hits": 0,
            "misses": 0,
            "moved_bytes": {},
            "stall_ms": {},
        }
