"""What a DeepTalk checkpoint is: sizes and ids, and what follows from them.

They come from the checkpoint's own config files (spec_files.py) or from a bundle's manifest. No
other file of this project holds a layer count, a width or a token id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from deeptalk_edge.errors import ArtifactError

LATENT_NORM_EPS = 1e-6
"""DeepSeek-V2's code builds the norm of the latent with this, whatever `rms_norm_eps` says."""

TextAlignment = Literal["ahead", "word"]

Spec = TypeVar("Spec")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnSpec:
    """YaRN's stretch of the rotary frequencies. Source: arXiv 2309.00071; DeepSeek-V2."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A Whisper-shaped encoder: log-mel in, one frame per two mel frames out."""

    num_mel_bins: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    max_frames: int
    """Encoder frames of the whole window (1500 in Whisper: 30 s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The DeepSeek-V2 decoder: latent attention, dense layers first, then routed experts."""

    width: int
    num_layers: int
    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    dense_ffn_width: int
    expert_ffn_width: int
    num_experts: int
    num_shared_experts: int
    top_k: int
    num_dense_layers: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    normalise_top_k: bool = False
    routed_scale: float = 1.0
    yarn: YarnSpec | None = None

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that route."""
        return range(self.num_dense_layers, self.num_layers)

    @property
    def cache_width(self) -> int:
        """What one layer keeps per row: the latent, then the rotary key that all heads share."""
        return self.latent_dim + self.rope_dim

    @property
    def shared_ffn_width(self) -> int:
        """The shared experts are one MLP of this width."""
        return self.expert_ffn_width * self.num_shared_experts

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores, YaRN's correction included."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        if self.yarn and self.yarn.mscale_all_dim:
            scale *= _yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return float(scale)

    @property
    def rope_amplitude(self) -> float:
        """Factor on cos and sin; 1 where both YaRN scales agree, as in DeepSeek-V2-Lite."""
        if not self.yarn:
            return 1.0
        return _yarn_mscale(self.yarn.factor, self.yarn.mscale) / _yarn_mscale(
            self.yarn.factor, self.yarn.mscale_all_dim
        )

    def eps_of(self, norm: str) -> float:
        """What a norm adds to the mean square, by the norm's name in the checkpoint."""
        return LATENT_NORM_EPS if norm.endswith("kv_a_layernorm") else self.norm_eps

    def rope_frequencies(self) -> list[float]:
        """Rotary frequencies in radians per position, (rope_dim / 2,).

        Source: DeepSeek-V2 `DeepseekV2YarnRotaryEmbedding`: a ramp from extrapolated (fast) to
        interpolated (slow) frequencies between the two `beta` rotations.
        """
        half = self.rope_dim // 2
        plain = [self.rope_theta ** (-i / half) for i in range(half)]
        yarn = self.yarn
        if yarn is None:
            return plain

        def dim_of(rotations: float) -> float:
            turn = yarn.original_positions / (rotations * 2 * math.pi)
            return self.rope_dim * math.log(turn) / (2 * math.log(self.rope_theta))

        low = max(math.floor(dim_of(yarn.beta_fast)), 0)
        high = min(math.ceil(dim_of(yarn.beta_slow)), self.rope_dim - 1)
        span = max(high - low, 0.001)
        stretched = [min(max((i - low) / span, 0.0), 1.0) for i in range(half)]
        return [f / yarn.factor * s + f * (1 - s) for f, s in zip(plain, stretched, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularySpec:
    """One table of ids: text, text specials, then one block per codebook, specials at its end."""

    text_size: int
    """Text ids with their specials: the width of the text logits."""

    num_codebooks: int
    codebook_size: int
    """Codes of one codebook, specials not counted."""

    codebook_block: int
    """Ids of one codebook with its specials: the width of its logits."""

    bos: int
    eos: int
    text_specials: Mapping[str, int] = field(hash=False)
    """Name to global id: `EOT`, `PAD_T`, ..."""

    audio_specials: Mapping[str, int] = field(hash=False)
    """Name to id within a codebook's block: `EOA`, `PAD_A`, `BOA`, speakers, ..."""

    @property
    def size(self) -> int:
        return self.text_size + self.num_codebooks * self.codebook_block

    @property
    def eot(self) -> int:
        return self.text_specials["EOT"]

    @property
    def pad_text(self) -> int:
        return self.text_specials["PAD_T"]

    @property
    def pad_audio(self) -> int:
        return self.audio_specials["PAD_A"]

    @property
    def begin_audio(self) -> int:
        return self.audio_specials["BOA"]

    @property
    def end_audio(self) -> int:
        return self.audio_specials["EOA"]

    def codebook_base(self, codebook: int) -> int:
        """First global id of a codebook's block."""
        return self.text_size + codebook * self.codebook_block

    def speaker(self, name: str) -> int:
        """The id within a block of a speaker token, by name.

        Raises ArtifactError if the checkpoint knows no such name.
        """
        if name not in self.audio_specials:
            known = ", ".join(self.audio_specials)
            raise ArtifactError(f"speaker {name!r}: this checkpoint knows {known}")
        return self.audio_specials[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that the graphs, the row grid and the prompt need to know of a checkpoint."""

    decoder: DecoderSpec
    encoder: EncoderSpec
    projector_width: int
    vocabulary: VocabularySpec
    text_alignment: TextAlignment = "ahead"
    """`ahead`: the answer's text runs ahead of its speech, as in the official grid. `word`: each
    word stands in the row in which its sound begins, with PAD_T between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """SNAC, in the field names of its own config.json. Source: hubertsiuzdak/snac."""

    sampling_rate: int
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    latent_dim: int
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    codebook_size: int
    codebook_dim: int
    vq_strides: tuple[int, ...]
    noise: bool
    depthwise: bool

    @property
    def hop_samples(self) -> int:
        """Samples of one frame of the fastest codebook."""
        return math.prod(self.decoder_rates)

    @property
    def frame_samples(self) -> int:
        """Samples of one codec frame: one code of the slowest codebook."""
        return self.hop_samples * self.vq_strides[0]

    @property
    def frame_codes(self) -> int:
        """Codes of one codec frame over all scales."""
        return sum(self.vq_strides[0] // stride for stride in self.vq_strides)


def spec_from_json(kind: type[Spec], content: Mapping[str, Any]) -> Spec:
    """Build a spec from the JSON form that `dataclasses.asdict` gives.

    Raises ArtifactError if a field is missing, unknown or not an object where it must be one.
    """
    hints = get_type_hints(kind)
    if unknown := content.keys() - hints.keys():
        raise ArtifactError(f"{kind.__name__}: unknown field {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        inner = next((t for t in (hints[name], *get_args(hints[name])) if is_dataclass(t)), None)
        if inner is not None and value is not None:
            value = spec_from_json(cast("type[Any]", inner), value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    try:
        return kind(**values)
    except TypeError as error:
        raise ArtifactError(f"{kind.__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises ArtifactError if the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
