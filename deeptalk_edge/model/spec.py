"""What a DeepTalk checkpoint is: sizes and ids, and what follows from them.

They come from the checkpoint's own config files (spec_files.py) or from a bundle's manifest. No
other file of this project holds a layer count, a width or a token id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Annotated, Literal, TypeAlias

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import Between, Items

LATENT_NORM_EPS = 1e-6
"""DeepSeek-V2's code builds the norm of the latent with this, whatever `rms_norm_eps` says."""

TextAlignment = Literal["ahead", "word"]

# What a file may say. The bounds are far above every known model, and low enough that sizes made
# of them are exact in 64 bits and none takes a loop minutes.
Width: TypeAlias = Annotated[int, Between(1, 1 << 16)]
Layers: TypeAlias = Annotated[int, Between(1, 1024)]
Heads: TypeAlias = Annotated[int, Between(1, 1024)]
Positions: TypeAlias = Annotated[int, Between(1, 1 << 24)]
Id: TypeAlias = Annotated[int, Between(0, (1 << 20) - 1)]
VocabularySize: TypeAlias = Annotated[int, Between(1, 1 << 20)]
Factor: TypeAlias = Annotated[float, Between(1e-6, 1e6)]
Rates: TypeAlias = Annotated[tuple[Annotated[int, Between(1, 1024)], ...], Items(1, 8)]
"""Of the codec's blocks or scales; 8 is what the kernels hold (`DT_CODEC_MOST`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnSpec:
    """YaRN's stretch of the rotary frequencies. Source: arXiv 2309.00071; DeepSeek-V2."""

    factor: Factor
    original_positions: Positions
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    mscale: Annotated[float, Between(0, 100)] = 1.0
    mscale_all_dim: Annotated[float, Between(0, 100)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A Whisper-shaped encoder: log-mel in, one frame per two mel frames out."""

    num_mel_bins: Width
    width: Width
    num_layers: Layers
    num_heads: Heads
    ffn_width: Width
    max_frames: Annotated[int, Between(1, 30_000)]
    """Encoder frames of the whole window (1500 in Whisper: 30 s)."""

    def __post_init__(self) -> None:
        _check("num_heads", self.num_heads, self.width % self.num_heads == 0, "a divisor of width")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The DeepSeek-V2 decoder: latent attention, dense layers first, then routed experts."""

    width: Width
    num_layers: Layers
    num_heads: Heads
    nope_dim: Width
    rope_dim: Width
    value_dim: Width
    latent_dim: Width
    dense_ffn_width: Width
    expert_ffn_width: Width
    num_experts: Annotated[int, Between(1, 4096)]
    num_shared_experts: Annotated[int, Between(0, 64)]
    """0 where every expert is routed to."""

    top_k: Annotated[int, Between(1, 4096)]
    num_dense_layers: Annotated[int, Between(0, 1023)]
    norm_eps: Annotated[float, Between(0, 1)]
    rope_theta: Annotated[float, Between(2, 1e12)]
    max_positions: Positions
    normalise_top_k: bool = False
    routed_scale: Factor = 1.0
    yarn: YarnSpec | None = None

    def __post_init__(self) -> None:
        fits = self.top_k <= self.num_experts
        _check("top_k", self.top_k, fits, f"at most num_experts, {self.num_experts}")
        routes = self.num_dense_layers < self.num_layers
        _check("num_dense_layers", self.num_dense_layers, routes, "fewer than num_layers")
        _check("rope_dim", self.rope_dim, self.rope_dim % 2 == 0, "an even number")

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
    def normalises_weights(self) -> bool:
        """The weights of a token's experts are divided by their sum; else `routed_scale` applies.

        Source: DeepSeek-V2 `MoEGate`. It never does both (DeepSeek-V3 does), and leaves the weight
        of a single expert as it is, which would become 1 and train no router.
        """
        return self.normalise_top_k and self.top_k > 1

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

    text_size: VocabularySize
    """Text ids with their specials: the width of the text logits."""

    num_codebooks: Annotated[int, Between(1, 64)]
    codebook_size: VocabularySize
    """Codes of one codebook, specials not counted."""

    codebook_block: VocabularySize
    """Ids of one codebook with its specials: the width of its logits."""

    bos: Id
    eos: Id
    text_specials: Mapping[str, Id] = field(hash=False)
    """Name to global id: `EOT`, `PAD_T`, ..."""

    audio_specials: Mapping[str, Id] = field(hash=False)
    """Name to id within a codebook's block: `EOA`, `PAD_A`, `BOA`, speakers, ..."""

    def __post_init__(self) -> None:
        text = {"bos": self.bos, "eos": self.eos}
        text |= {f"text_specials.{name}": special for name, special in self.text_specials.items()}
        for name, special in text.items():
            _check(name, special, special < self.text_size, f"below text_size, {self.text_size}")
        block = self.codebook_block
        _check("codebook_size", self.codebook_size, self.codebook_size <= block, f"{block} at most")
        for name, special in self.audio_specials.items():
            fits = special < block
            _check(f"audio_specials.{name}", special, fits, f"below codebook_block, {block}")
        for kind, needed in (("text", ("EOT", "PAD_T")), ("audio", ("EOA", "PAD_A", "BOA"))):
            specials = getattr(self, f"{kind}_specials")
            if missing := [name for name in needed if name not in specials]:
                raise ValueError(f"{kind}_specials lacks {', '.join(missing)}")

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
            raise ArtifactError(f"speaker {name!r}: this checkpoint has {known}")
        return self.audio_specials[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that the graphs, the row grid and the prompt need to know of a checkpoint."""

    decoder: DecoderSpec
    encoder: EncoderSpec
    projector_width: Width
    vocabulary: VocabularySpec
    text_alignment: TextAlignment = "ahead"
    """`ahead`: the answer's text runs ahead of its speech, as in the official grid. `word`: each
    word is in the row in which its sound begins, with PAD_T between."""

    tied_head: bool = True
    """Logits come from the embedding; else from a separate head of the same shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """SNAC, in the field names of its config.json. Source: hubertsiuzdak/snac."""

    sampling_rate: Annotated[int, Between(8000, 192_000)]
    encoder_dim: Width
    encoder_rates: Rates
    latent_dim: Width
    decoder_dim: Width
    decoder_rates: Rates
    codebook_size: VocabularySize
    codebook_dim: Width
    vq_strides: Rates
    noise: bool
    depthwise: bool

    def __post_init__(self) -> None:
        slowest = self.vq_strides[0]
        for stride in self.vq_strides:
            _check("vq_strides", stride, slowest % stride == 0, f"divisors of the first, {slowest}")
        least = 1 << len(self.decoder_rates)  # each block halves the channels
        _check("decoder_dim", self.decoder_dim, self.decoder_dim >= least, f"at least {least}")
        fits = self.frame_samples <= 1 << 20
        _check("samples of a frame", self.frame_samples, fits, f"{1 << 20} at most")

    @property
    def delay_samples(self) -> int:
        """How late a streaming decoder runs: what its convolutions and upsamplings look ahead.

        Kernels of 7, and in each block three residual units of dilations 1, 3 and 9.
        """
        delay = 3
        for rate in self.decoder_rates:
            delay = delay * rate + (rate + 1) // 2 + 3 * (1 + 3 + 9)
        return delay + 3

    @property
    def block_rates(self) -> tuple[int, ...]:
        """Samples of a codec frame after each of the decoder's blocks."""
        return tuple(accumulate(self.decoder_rates, mul, initial=self.vq_strides[0]))[1:]

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


def _check(name: str, found: int, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {found}: expected {expected}")


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
