"""The cost of a frame of sound besides the decoder: sampling its ids, and full-size SNAC."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeptalk_edge.bench.random_snac import RandomSnac
from deeptalk_edge.bundle.manifest import NATIVE_CODEC, CodecEntry
from deeptalk_edge.checkpoint.config import read_codec_spec
from deeptalk_edge.export.graphs.codec import export_codec
from deeptalk_edge.export.packed.cpu_codec import write_native_codec
from deeptalk_edge.model.spec import VocabularySpec
from deeptalk_edge.runtime.backends.cpu.codec import CpuCodec
from deeptalk_edge.runtime.lm.sampler import Sampler, SamplerSettings


class SoundEnd:
    """A sampler over random logits, and our kernels' streaming codec with random weights."""

    def __init__(
        self, codec: Path, vocabulary: VocabularySpec, threads: Sequence[int], path: str | None
    ) -> None:
        """`codec` is the directory of a codec's config.json, `path` one of the kernels'."""
        spec = read_codec_spec(codec)
        with tempfile.TemporaryDirectory() as folder:
            weights, place = RandomSnac(spec), Path(folder) / NATIVE_CODEC
            exported = export_codec(weights, "off", Path(folder))
            write_native_codec(weights, "off", place)
            entry = CodecEntry(spec=spec, noise="off", **dataclasses.asdict(exported))
            self._codecs = {
                count: CpuCodec(place, entry, threads=count, path=path) for count in threads
            }
        random = np.random.default_rng(4)
        self._frame = random.integers(0, spec.codebook_size, (1, spec.frame_codes))
        self._state = np.zeros(entry.state_size, np.float32)
        self._sampler = Sampler(vocabulary, SamplerSettings())
        self._text = random.standard_normal(vocabulary.text_size, np.float32)
        shape = (vocabulary.num_codebooks, vocabulary.codebook_block)
        self._codes = random.standard_normal(shape, np.float32)
        self.use(threads[0])

    def use(self, threads: int) -> None:
        self._codec = self._codecs[threads]

    def sample(self) -> None:
        """Sample the ids of a row."""
        self._sampler.sample(self._text, self._codes)

    def decode_frame(self) -> None:
        """Decode one frame with the state."""
        _, self._state = self._codec.decode(
            self._frame, position=0, length=1 << 40, state=self._state, noise=[]
        )
