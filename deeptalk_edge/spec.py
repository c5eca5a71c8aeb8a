"""What a DeepTalk checkpoint is: sizes and ids, read from its own config files and nowhere else.

`config.json` follows DeepSeek-V2 with the fields that DeepTalk adds; the encoder's sizes stand in
the `config.json` of a Whisper directory, the codec's in that of a SNAC directory. No other file of
this project holds a layer count, a width or a token id.

Source: the official checkpoint layout (`src/model/vita_arch.py`, `configuration_deepseek.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from deeptalk_edge.errors import ArtifactError

MODEL_TYPES = (
    "deepseek_v2",
    "vita-deepseek_v2",
    "lucy-deepseek_v2",
    "puremoe-deepseek_v2",
    "moextend-deepseek_v2",
)
"""Every spelling of `model_type` under which DeepTalk checkpoints have been saved."""

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


def read_model_spec(checkpoint: Path, encoder_directory: Path | None = None) -> ModelSpec:
    """Read the sizes and ids of a checkpoint in the official layout.

    `encoder_directory` replaces `mm_audio_encoder`, which in released checkpoints is a path on
    their authors' disk; only its config.json is read.

    Raises ArtifactError if a file or a field is missing or holds something that we do not support.
    """
    path = checkpoint / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ArtifactError(
            f"{path}: model_type {model_type!r} is not a DeepTalk checkpoint; known are "
            + ", ".join(MODEL_TYPES)
        )
    if encoder_directory is None:
        encoder_directory = checkpoint / str(_need(config, "mm_audio_encoder", path))
    encoder_path = encoder_directory / "config.json"
    if not encoder_path.is_file():
        raise ArtifactError(
            f"{path}: mm_audio_encoder names {encoder_directory}, which holds no config.json; "
            "name a Whisper directory with --encoder"
        )
    _refuse_unsupported(config, path)
    return ModelSpec(
        decoder=_decoder_spec(config, path),
        encoder=_encoder_spec(read_json(encoder_path), encoder_path),
        projector_width=_need(config, "mm_audio_projector_hidden_size", path),
        vocabulary=_vocabulary_spec(config, path),
        text_alignment=config.get("text_alignment", "ahead"),
    )


def read_codec_spec(directory: Path) -> CodecSpec:
    """Read SNAC's config.json.

    Raises ArtifactError if it is missing, lacks a field or asks for windowed attention.
    """
    path = directory / "config.json"
    config = read_json(path)
    if config.get("attn_window_size") is not None:
        raise ArtifactError(f"{path}: attn_window_size is set; only SNAC without it is known")
    rates = tuple(_need(config, "encoder_rates", path))
    encoder_dim = _need(config, "encoder_dim", path)
    latent_dim = config.get("latent_dim")
    return CodecSpec(
        sampling_rate=_need(config, "sampling_rate", path),
        encoder_dim=encoder_dim,
        encoder_rates=rates,
        latent_dim=encoder_dim * 2 ** len(rates) if latent_dim is None else latent_dim,
        decoder_dim=_need(config, "decoder_dim", path),
        decoder_rates=tuple(_need(config, "decoder_rates", path)),
        codebook_size=_need(config, "codebook_size", path),
        codebook_dim=_need(config, "codebook_dim", path),
        vq_strides=tuple(_need(config, "vq_strides", path)),
        noise=_need(config, "noise", path),
        depthwise=_need(config, "depthwise", path),
    )


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


def _need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise ArtifactError(f"{path}: the field {key!r} is missing")
    return config[key]


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    """Refuse every structural choice that the reference model does not build."""
    supported: dict[str, Sequence[Any]] = {
        "q_lora_rank": (None,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
        "moe_layer_freq": (1,),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "mm_audio_encoder_type": ("whisper",),
        "mm_audio_projector_type": ("linear",),
        "post_tts_adapter": (False,),
        "text_alignment": ("ahead", "word"),
    }
    for key, values in supported.items():
        if key in config and config[key] not in values:
            known = " or ".join(repr(value) for value in values)
            raise ArtifactError(f"{path}: {key} = {config[key]!r}, this project builds {known}")


def _decoder_spec(config: Mapping[str, Any], path: Path) -> DecoderSpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    scaling = config.get("rope_scaling")
    yarn = None
    if scaling:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind != "yarn":
            raise ArtifactError(f"{path}: rope_scaling type {kind!r}, this project builds 'yarn'")
        yarn = YarnSpec(
            factor=_need(scaling, "factor", path),
            original_positions=_need(scaling, "original_max_position_embeddings", path),
            beta_fast=scaling.get("beta_fast", 32),
            beta_slow=scaling.get("beta_slow", 1),
            mscale=scaling.get("mscale", 1),
            mscale_all_dim=scaling.get("mscale_all_dim", 0),
        )
    # moextend keeps the text experts and adds its own behind them.
    added_experts = need("audio_num_experts") if "moextend" in config["model_type"] else 0
    return DecoderSpec(
        width=need("hidden_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=need("num_attention_heads"),
        nope_dim=need("qk_nope_head_dim"),
        rope_dim=need("qk_rope_head_dim"),
        value_dim=need("v_head_dim"),
        latent_dim=need("kv_lora_rank"),
        dense_ffn_width=need("intermediate_size"),
        expert_ffn_width=need("moe_intermediate_size"),
        num_experts=need("n_routed_experts") + added_experts,
        num_shared_experts=need("n_shared_experts"),
        top_k=need("num_experts_per_tok"),
        num_dense_layers=need("first_k_dense_replace"),
        norm_eps=need("rms_norm_eps"),
        rope_theta=need("rope_theta"),
        max_positions=need("max_position_embeddings"),
        normalise_top_k=config.get("norm_topk_prob", False),
        routed_scale=config.get("routed_scaling_factor", 1.0),
        yarn=yarn,
    )


def _encoder_spec(config: Mapping[str, Any], path: Path) -> EncoderSpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    return EncoderSpec(
        num_mel_bins=need("num_mel_bins"),
        width=need("d_model"),
        num_layers=need("encoder_layers"),
        num_heads=need("encoder_attention_heads"),
        ffn_width=need("encoder_ffn_dim"),
        max_frames=need("max_source_positions"),
    )


def _vocabulary_spec(config: Mapping[str, Any], path: Path) -> VocabularySpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    vocabulary = VocabularySpec(
        text_size=need("text_vocab_size_padded"),
        num_codebooks=need("mm_audio_num_codebook"),
        codebook_size=need("audio_vocab_size"),
        codebook_block=need("audio_vocab_size_padded"),
        bos=need("bos_token_id"),
        eos=need("eos_token_id"),
        text_specials=dict(need("text_additional_tokens")),
        audio_specials=dict(need("audio_additional_tokens")),
    )
    if vocabulary.size != need("vocab_size"):
        raise ArtifactError(
            f"{path}: vocab_size = {config['vocab_size']}, but text and codebooks add up to "
            f"{vocabulary.size}"
        )
    for name, specials in (
        ("text_additional_tokens", ("EOT", "PAD_T")),
        ("audio_additional_tokens", ("EOA", "PAD_A", "BOA")),
    ):
        missing = [special for special in specials if special not in config[name]]
        if missing:
            raise ArtifactError(f"{path}: {name} lacks {', '.join(missing)}")
    return vocabulary


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
