"""Checkpoint in, bundle out: the order of the steps. The format is docs/bundle.md's.

Every file is written in a directory under a hidden name, the manifest last, then the directory is
renamed: whatever stops an export on the way, no half bundle stands where a bundle should.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import deeptalk_edge
from deeptalk_edge.artifact import sha256_of, staged_directory
from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.codec import CodecGraph, CodecNoise, CodecWeights, export_codec
from deeptalk_edge.export.decoder import export_embed_and_head, export_expert, export_segments
from deeptalk_edge.export.encoder import export_encoder
from deeptalk_edge.export.experts import EXPERTS_FILE, read_audio_experts, write_experts
from deeptalk_edge.export.golden import GOLDEN_FILE, golden_inputs, golden_outputs
from deeptalk_edge.export.torch_file import TorchFile
from deeptalk_edge.runtime.bundle import (
    FORMAT,
    MANIFEST,
    CodecEntry,
    FileEntry,
    Generation,
    Graphs,
    Manifest,
    Origin,
    Target,
)
from deeptalk_edge.runtime.experts.store import ExpertRecord
from deeptalk_edge.spec import CodecSpec, ModelSpec, read_codec_spec, read_json

TOKENIZER_FILE = "tokenizer.json"
_DEFAULT_CONTEXT_ROWS = 4096

Progress = Callable[[str, int, int], None]
"""Called when a step begins: its name, the steps done, and all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What may be chosen at export."""

    encoder: Path | None = None
    """A Whisper directory instead of the one that the checkpoint names."""

    snac: Path | None = None
    """A SNAC directory instead of the checkpoint's own."""

    codec_noise: CodecNoise = "off"
    """`tape` makes the noise of SNAC's decoder an input; off, it decodes without."""

    replace: bool = False
    """Replace a bundle that stands there already."""


def export_bundle(
    checkpoint_directory: Path,
    place: Path,
    settings: ExportSettings,
    progress: Progress = lambda step, done, total: None,
) -> Manifest:
    """Write the bundle of a checkpoint at `place`.

    Raises ArtifactError if the checkpoint is not whole or `place` exists, DoesNotFit if the disk
    fills.
    """
    checkpoint = Checkpoint.open(checkpoint_directory, encoder=settings.encoder, snac=settings.snac)
    codec = _open_codec(settings.snac or checkpoint_directory / "snac", checkpoint)
    _check_codes_fit(checkpoint.spec, codec.spec)
    generation = read_generation(checkpoint_directory, checkpoint.spec)
    audio_experts = read_audio_experts(checkpoint_directory, checkpoint.spec.decoder)
    steps = _Steps(progress, total=7 + len(checkpoint.spec.decoder.moe_layers))
    with staged_directory(place, replace=settings.replace) as staging:
        steps.begin("encoder")
        export_encoder(checkpoint, staging)
        steps.begin("embedding and head")
        export_embed_and_head(checkpoint, staging)
        steps.begin("decoder")
        segments = export_segments(checkpoint, staging)
        export_expert(checkpoint.spec.decoder, staging)
        steps.begin("experts")
        records = write_experts(
            checkpoint, audio_experts, staging, lambda layer: steps.begin("experts")
        )
        steps.begin("codec")
        codec_graph = export_codec(codec, settings.codec_noise, staging)
        _copy_tokenizer(checkpoint_directory, staging)
        manifest = _manifest(
            _origin(checkpoint_directory),
            checkpoint.spec,
            _codec_entry(codec.spec, codec_graph, settings.codec_noise),
            generation,
            segments,
            records,
        )
        steps.begin("golden")
        inputs = golden_inputs(checkpoint.spec)
        outputs = golden_outputs(staging, manifest, inputs)
        golden: dict[str, Any] = {**dataclasses.asdict(inputs), **outputs}
        np.savez(staging / GOLDEN_FILE, **golden)
        steps.begin("hashes")
        manifest = dataclasses.replace(manifest, files=_file_entries(staging))
        _write_manifest(manifest, staging / MANIFEST)
    return manifest


def read_generation(checkpoint: Path, spec: ModelSpec) -> Generation:
    """How to decode by default: the object `deeptalk` of the checkpoint's generation_config.json.

    What is not said there is as in the official scripts. Other fields of that file (DeepSeek's own
    temperature, say) belong to text chat and are left alone.

    Source of the defaults: DeepTalk `eval_qa.py`; the system text is the first sentence of its own.

    Raises ArtifactError if a value has the wrong type or the speaker is unknown.
    """
    path = checkpoint / "generation_config.json"
    config = read_json(path).get("deeptalk", {}) if path.is_file() else {}
    defaults: dict[str, Any] = {
        "system": "You are an AI robot and your name is Lucy.",
        "speaker": "ANS_A",
        "mode": "batch-parallel",
        "text_top_k": 1,
        "audio_top_k": 10,
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "max_rows": 1000,
        "context_rows": min(_DEFAULT_CONTEXT_ROWS, spec.decoder.max_positions),
    }
    if unknown := config.keys() - defaults.keys():
        raise ArtifactError(f"{path}: deeptalk has no {', '.join(sorted(unknown))}")
    values = {key: config.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise ArtifactError(f"{path}: {key} = {values[key]!r}, expected {kinds[-1].__name__}")
    if values["mode"] not in ("batch-parallel", "single"):
        raise ArtifactError(f"{path}: mode {values['mode']!r}, known are batch-parallel and single")
    spec.vocabulary.speaker(values["speaker"])
    return Generation(**values)


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def begin(self, name: str) -> None:
        self._progress(name, self._done, self._total)
        self._done += 1


def _open_codec(directory: Path, checkpoint: Checkpoint) -> CodecWeights:
    """SNAC from safetensors, or from the torch file in which it is published."""
    published = directory / "pytorch_model.bin"
    if published.is_file() and not (directory / "model.safetensors").is_file():
        return TorchCodec(read_codec_spec(directory), TorchFile(published))
    return checkpoint.codec


def _check_codes_fit(model: ModelSpec, codec: CodecSpec) -> None:
    """The codes that the model says are those that the codec reads."""
    spoken = (model.vocabulary.num_codebooks, model.vocabulary.codebook_size)
    read = (codec.frame_codes, codec.codebook_size)
    if spoken != read:
        raise ArtifactError(
            f"the model says {spoken[0]} codes of {spoken[1]} per frame, this SNAC reads {read[0]} "
            f"of {read[1]}; name the SNAC that the model was trained with by --snac"
        )


class TorchCodec:
    """SNAC's tensors out of a torch file."""

    def __init__(self, spec: CodecSpec, file: TorchFile) -> None:
        self.spec = spec
        self.shapes = file.shapes
        self.tensor = file.tensor


def _codec_entry(spec: CodecSpec, graph: CodecGraph, noise: CodecNoise) -> CodecEntry:
    return CodecEntry(
        spec=spec,
        delay_samples=graph.delay_samples,
        state_size=graph.state_size,
        noise=noise if graph.noise_rates else "off",
        noise_rates=graph.noise_rates,
    )


def _manifest(
    origin: Origin,
    spec: ModelSpec,
    codec: CodecEntry,
    generation: Generation,
    segments: list[str],
    records: list[ExpertRecord],
) -> Manifest:
    """All but the files."""
    parts = ("encoder", "decoder", "experts", "head", "codec")
    return Manifest(
        producer=f"deeptalk-edge {deeptalk_edge.__version__}",
        checkpoint=origin,
        target=Target(backend="ort", device="cpu"),
        precision=dict.fromkeys(parts, "float32"),
        model=spec,
        codec=codec,
        generation=generation,
        graphs=Graphs(
            encoder="encoder.onnx",
            embed="embed.onnx",
            segments=tuple(segments),
            expert="expert.onnx",
            head="head.onnx",
            codec="codec.onnx",
        ),
        experts_file=EXPERTS_FILE,
        records=tuple(records),
        files={},
        licences={"weights": "those of the checkpoint"},
    )


def _write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the JSON form that `Bundle.open` reads."""
    content = dataclasses.asdict(manifest)
    content["experts"] = {"file": content.pop("experts_file"), "records": content.pop("records")}
    text = json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _file_entries(directory: Path) -> Mapping[str, FileEntry]:
    return {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(directory.iterdir())
    }


def _origin(checkpoint: Path) -> Origin:
    """Name and hash of a checkpoint: over its config and all shards, in order of their names."""
    digest = hashlib.sha256()
    for path in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return Origin(name=checkpoint.resolve().name, sha256=digest.hexdigest())


def _copy_tokenizer(checkpoint: Path, directory: Path) -> None:
    source = checkpoint / TOKENIZER_FILE
    if not source.is_file():
        raise ArtifactError(f"{source}: missing; the bundle needs the checkpoint's tokenizer")
    shutil.copyfile(source, directory / TOKENIZER_FILE)
