"""Reads a checkpoint in the official layout, one tensor at a time, without torch.

    checkpoint/
      config.json                     DeepSeek-V2's fields and DeepTalk's
      model.safetensors               or shards, with model.safetensors.index.json
      tokenizer.json
      audio_encoder/config.json       Whisper's sizes; its weights are in the checkpoint
      snac/config.json, model.safetensors

Names, shapes and dtypes are checked from the shards' headers when a checkpoint is opened; the bytes
of a tensor are read, through a memory map, when it is needed. Weights come as float32 and are
stored as float16, bfloat16 or float32.

What released checkpoints add is left out (`ref_model.*` of DPO runs), and what they split is
joined: an embedding with frozen rows, and moextend's experts, text first, then audio.

A stored head that equals the embedding is tied, whatever config.json says. One that differs is the
model's own if config.json says `tie_word_embeddings: false`, and refused if it does not: DeepTalk
ties its heads, so either the field or the tensor is a mistake.

Source: DeepTalk `src/model/vita_arch.py`, `language_model/moextend.py`; the safetensors format.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from deeptalk_edge.checkpoint.config import CheckpointConfig, read_codec_spec, read_config
from deeptalk_edge.checkpoint.shards import Array, Shape, Weights
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import CodecSpec, DecoderSpec, EncoderSpec, ModelSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_DTYPES = ("BF16", "F16", "F32")
_ROWS_AT_ONCE = 4096  # of two tables that are compared
_NAMED_IN_ERRORS = 4  # the first problems say what is wrong; thousands say nothing

_log = logging.getLogger(__name__)


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, a tied head left out."""
    decoder, encoder = spec.decoder, spec.encoder
    shapes: dict[str, Shape] = {
        EMBEDDING: (spec.vocabulary.size, decoder.width),
        "model.norm.weight": (decoder.width,),
    }
    if not spec.tied_head:
        shapes[HEAD] = shapes[EMBEDDING]
    for i in range(decoder.num_layers):
        shapes |= {f"model.layers.{i}.{name}": s for name, s in _decoder_layer(decoder, i)}
    shapes |= {f"model.audio_encoder.{name}": s for name, s in _encoder(encoder)}
    projector = "model.audio_mm_projector"
    for name in ("fc_1", "fc_2"):
        shapes[f"{projector}.{name}.weight"] = (spec.projector_width, encoder.width)
    shapes[f"{projector}.proj.weight"] = (decoder.width, spec.projector_width)
    return shapes


class Checkpoint:
    """A checkpoint that has been found whole. Not thread-safe."""

    def __init__(self, spec: ModelSpec, weights: Weights, snac: Path) -> None:
        self.spec = spec
        self._snac = snac
        self._weights = weights
        self._sources = {name: _sources(name, weights.shapes) for name in expected_tensors(spec)}

    @classmethod
    def open(
        cls, directory: Path, *, encoder: Path | None = None, snac: Path | None = None
    ) -> Checkpoint:
        """Open a checkpoint and check every tensor's name, shape and dtype.

        `encoder` is a Whisper directory instead of the one that config.json names, `snac` a codec
        directory instead of the checkpoint's own.

        Raises ArtifactError if a file is missing or damaged, a tensor is missing or misfits, or the
        head is not the embedding and config.json does not say so.
        """
        return cls.of(read_config(directory, encoder), snac=snac)

    @classmethod
    def of(cls, config: CheckpointConfig, *, snac: Path | None = None) -> Checkpoint:
        """Open the checkpoint whose config files are read; raises as `open`."""
        directory = config.directory
        weights = Weights.open(directory)
        spec = _with_head(config.model, weights, directory)
        checkpoint = cls(spec, weights, snac or directory / "snac")
        checkpoint._check(directory)
        return checkpoint

    @cached_property
    def codec(self) -> CodecCheckpoint:
        """The codec beside the model, opened at the first use; raises as `CodecCheckpoint.open`."""
        return CodecCheckpoint.open(self._snac)

    def tensor(self, name: str) -> Array:
        """A tensor by its official name, float32; the caller owns the array.

        Raises ArtifactError if its shard can no longer be read, KeyError if the name is not one of
        `expected_tensors`.
        """
        parts = [self._weights.tensor(part) for part in self._sources[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check(self, directory: Path) -> None:
        problems = list(self._problems())
        if problems:
            more = len(problems) - _NAMED_IN_ERRORS
            listed = problems[:_NAMED_IN_ERRORS] + ([f"{more} more"] if more > 0 else [])
            raise ArtifactError(
                f"{directory}: the weights do not fit config.json: {'; '.join(listed)}. "
                "Check that both come from one checkpoint and that no shard is missing"
            )
        used = {part for parts in self._sources.values() for part in parts}
        left_out = sorted(self._weights.shapes.keys() - used - {HEAD})
        if left_out:
            _log.info("%s: left out %d tensors: %s", directory, len(left_out), _few(left_out))

    def _problems(self) -> Iterator[str]:
        stored = self._weights
        for name, expected in expected_tensors(self.spec).items():
            parts = self._sources[name]
            if any(part not in stored.shapes for part in parts):
                yield f"{name} is missing, expected {_spell(expected)}"
                continue
            dtypes = {stored.dtypes[part] for part in parts}
            if not dtypes <= set(_DTYPES):
                yield f"{name} is stored as {_few(sorted(dtypes))}, not {' or '.join(_DTYPES)}"
            found = _joined_shape([stored.shapes[part] for part in parts])
            if found != expected:
                files = _few({stored.file_of(part) for part in parts})
                yield f"{name} is {_spell(found)} in {files}, expected {_spell(expected)}"


class CodecCheckpoint:
    """SNAC's sizes and weights, in its own layout with safetensors. Not thread-safe."""

    def __init__(self, spec: CodecSpec, weights: Weights) -> None:
        self.spec = spec
        self.shapes: Mapping[str, Shape] = weights.shapes
        self._weights = weights

    @classmethod
    def open(cls, directory: Path) -> CodecCheckpoint:
        """Open a SNAC directory.

        Raises ArtifactError if a file is missing or damaged.
        """
        if not (directory / "config.json").is_file():
            raise ArtifactError(f"{directory}: holds no SNAC config.json; name one with --snac")
        return cls(read_codec_spec(directory), Weights.open(directory))

    def tensor(self, name: str) -> Array:
        """A tensor by SNAC's name, float32; the caller owns the array.

        Raises ArtifactError if there is none of that name or its file can no longer be read.
        """
        if name not in self.shapes:
            raise ArtifactError(f"the SNAC checkpoint lacks {name}, it holds {_few(self.shapes)}")
        return self._weights.tensor(name)


def _with_head(spec: ModelSpec, weights: Weights, directory: Path) -> ModelSpec:
    """The spec with `tied_head` as the stored tensors have it."""
    parts = _sources(EMBEDDING, weights.shapes)
    if HEAD not in weights.shapes or any(part not in weights.shapes for part in parts):
        return spec
    if parts == (HEAD,):
        if spec.tied_head:
            return spec
        raise ArtifactError(
            f"{directory}: {EMBEDDING} is missing, and config.json says that {HEAD} is another "
            "table (tie_word_embeddings: false); check that no shard is missing"
        )
    if weights.shapes[HEAD] != _joined_shape([weights.shapes[part] for part in parts]):
        return replace(spec, tied_head=False)  # for the check of all shapes to name
    if _is_joined(weights, HEAD, parts):
        return replace(spec, tied_head=True)
    if spec.tied_head:
        raise ArtifactError(
            f"{directory}: {HEAD} differs from {EMBEDDING}, and config.json does not say that it "
            "may; set tie_word_embeddings to false there to keep this head, or remove the tensor"
        )
    return spec


def _is_joined(weights: Weights, name: str, parts: Iterable[str]) -> bool:
    """Whether a table holds the rows of others, one after the other."""
    first = 0
    for part in parts:
        for start in range(0, weights.shapes[part][0], _ROWS_AT_ONCE):
            rows = weights.rows(part, start, start + _ROWS_AT_ONCE)
            if not np.array_equal(rows, weights.rows(name, first, first + len(rows))):
                return False
            first += len(rows)
    return True


def _sources(name: str, stored: Mapping[str, Shape]) -> tuple[str, ...]:
    """The stored tensors that make up `name`, to be joined on their first axis."""
    if name == EMBEDDING and name not in stored:
        split = (f"{EMBEDDING}_frozen", f"{EMBEDDING}_unfrozen")
        return (HEAD,) if HEAD in stored and split[0] not in stored else split
    if name.endswith(".mlp.gate.weight"):
        audio_rows = name.replace("gate.weight", "gate.audio_router_weight")
        return (name, audio_rows) if audio_rows in stored else (name,)
    expert = re.fullmatch(r"(?P<mlp>.*\.mlp)\.experts\.(?P<id>\d+)\.(?P<rest>.*)", name)
    if expert and name not in stored:
        return (_moextend_name(expert["mlp"], int(expert["id"]), expert["rest"], stored),)
    return (name,)


def _moextend_name(mlp: str, expert: int, rest: str, stored: Mapping[str, Shape]) -> str:
    """Where moextend keeps an expert: the router's own rows are the text experts'."""
    router = stored.get(f"{mlp}.gate.weight")
    num_text = router[0] if router else 0
    if expert < num_text:
        return f"{mlp}.text_experts.{expert}.{rest}"
    return f"{mlp}.audio_experts.{expert - num_text}.{rest}"


def _decoder_layer(spec: DecoderSpec, index: int) -> Iterator[tuple[str, Shape]]:
    width, heads = spec.width, spec.num_heads
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    yield "self_attn.q_proj.weight", (heads * (spec.nope_dim + spec.rope_dim), width)
    yield "self_attn.kv_a_proj_with_mqa.weight", (spec.cache_width, width)
    yield "self_attn.kv_a_layernorm.weight", (spec.latent_dim,)
    yield "self_attn.kv_b_proj.weight", (heads * (spec.nope_dim + spec.value_dim), spec.latent_dim)
    yield "self_attn.o_proj.weight", (width, heads * spec.value_dim)
    if index not in spec.moe_layers:
        yield from _swiglu("mlp", width, spec.dense_ffn_width)
        return
    yield "mlp.gate.weight", (spec.num_experts, width)
    for i in range(spec.num_experts):
        yield from _swiglu(f"mlp.experts.{i}", width, spec.expert_ffn_width)
    if spec.num_shared_experts:
        yield from _swiglu("mlp.shared_experts", width, spec.shared_ffn_width)


def _swiglu(name: str, width: int, ffn_width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (ffn_width, width)
    yield f"{name}.up_proj.weight", (ffn_width, width)
    yield f"{name}.down_proj.weight", (width, ffn_width)


def _encoder(spec: EncoderSpec) -> Iterator[tuple[str, Shape]]:
    width = spec.width
    yield from _with_bias("conv1", (width, spec.num_mel_bins, 3))
    yield from _with_bias("conv2", (width, width, 3))
    yield "embed_positions.weight", (spec.max_frames, width)
    for i in range(spec.num_layers):
        for name in ("q_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"layers.{i}.self_attn.{name}", (width, width))
        yield f"layers.{i}.self_attn.k_proj.weight", (width, width)
        yield from _with_bias(f"layers.{i}.self_attn_layer_norm", (width,))
        yield from _with_bias(f"layers.{i}.final_layer_norm", (width,))
        yield from _with_bias(f"layers.{i}.fc1", (spec.ffn_width, width))
        yield from _with_bias(f"layers.{i}.fc2", (width, spec.ffn_width))
    yield from _with_bias("layer_norm", (width,))


def _with_bias(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _joined_shape(shapes: list[Shape]) -> Shape:
    """The shape after joining on the first axis; if the others differ, one that fits nothing."""
    if len(shapes) == 1:
        return shapes[0]
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return ()
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _spell(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    tail = ", ..." if len(listed) > _NAMED_IN_ERRORS else ""
    return ", ".join(listed[:_NAMED_IN_ERRORS]) + tail
