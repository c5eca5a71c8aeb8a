"""A backend that computes nothing: known words and known tones, whatever is asked.

For integrators who test their own side of a conversation: it reads a bundle's manifest and
tokenizer, and no weight. Equal questions in equal conversations get equal answers; another question
gets another number in its answer, and other tones. Nothing that it says was said by a model.
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

_FRAMES_PER_ID = 3  # speech lasts three frames, 0.26 s, for every text id
_CERTAIN = 60.0  # a logit beside zeros: its probability is 1 at any temperature of use
_AMPLITUDE = 0.1


def open_backend(bundle: Bundle, settings: BackendSettings) -> Backend:
    """Raises ArtifactError if the bundle's tokenizer is none."""
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
    """See `EncoderGraph`. A feature is the frame's mean log-mel, C times."""

    def __init__(self, width: int) -> None:
        self._width = width

    def encode(self, log_mel: Array, num_frames: int) -> Array:
        loudness = log_mel[0].mean(axis=0)[: 2 * num_frames].reshape(num_frames, 2).mean(axis=1)
        return np.repeat(loudness[:, None], self._width, axis=1)

    def close(self) -> None:
        pass


class FakeEngine(CachedEngine[KvCache]):
    """See `Engine`. It says one sentence after each prompt; its number comes from the prompt."""

    def __init__(self, model: ModelSpec, tokenizer: TextTokenizer, *, context_rows: int) -> None:
        super().__init__(
            KvCache(num_layers=1, capacity=context_rows, width=1), nullcontext().__enter__
        )
        self._vocabulary, self._tokenizer = model.vocabulary, tokenizer
        self._prompt_rows = 0  # fed before the last row of the prompt
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
    """See `Codec`. A frame is a tone of the scale, the first code's, without a look-ahead."""

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
