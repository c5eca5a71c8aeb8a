"""The bundle on disk: opened, checked and described before any graph is parsed.

A bundle is what `deeptalk-edge export` writes: see docs/bundle.md. `Bundle.open` checks the format,
and the size and SHA-256 of every file that the manifest names. `experts.bin` may be larger than
memory: its size is checked here, its records when they are first read, or all at once by `verify`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeptalk_edge.artifact import check_file
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.experts.store import ExpertRecord, ExpertStore
from deeptalk_edge.spec import CodecSpec, ModelSpec, read_json, spec_from_json

FORMAT = 1
MANIFEST = "manifest.json"

Mode = Literal["batch-parallel", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a bundle was made from."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a bundle was made for."""

    backend: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecEntry:
    """The streaming codec graph."""

    spec: CodecSpec
    delay_samples: int
    """The graph's output runs this much late."""
    state_size: int
    noise: Literal["off", "tape"]
    noise_rates: tuple[int, ...]
    """Noise samples per codec frame of each decoder block, where there is a tape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the checkpoint's authors decode it; settings may differ per conversation."""

    system: str
    speaker: str
    mode: Mode
    text_top_k: int
    audio_top_k: int
    temperature: float
    repetition_penalty: float
    max_rows: int
    """Rows of one answer at most; a row of speech is one codec frame."""
    context_rows: int
    """Rows that the cache holds, over all turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """File names of the graphs."""

    encoder: str
    embed: str
    segments: tuple[str, ...]
    expert: str
    head: str
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """What a file must measure."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`, typed. Source: docs/bundle.md."""

    producer: str
    checkpoint: Origin
    target: Target
    precision: Mapping[str, str]
    model: ModelSpec
    codec: CodecEntry
    generation: Generation
    graphs: Graphs
    experts_file: str
    records: tuple[ExpertRecord, ...]
    files: Mapping[str, FileEntry]
    licences: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its files are present and unaltered."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read the manifest and check every file against it.

        Raises ArtifactError, naming the file, if this is not a bundle, is one of a newer format, or
        a file is missing, truncated or altered.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, entry in manifest.files.items():
            paged = name == manifest.experts_file
            check_file(path / name, size_bytes=entry.bytes, sha256=None if paged else entry.sha256)
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        """The place of a file that the manifest names."""
        return self.path / name

    def expert_store(self) -> ExpertStore:
        """Map the routed experts."""
        decoder = self.manifest.model.decoder
        return ExpertStore(
            self.file(self.manifest.experts_file),
            self.manifest.records,
            width=decoder.width,
            ffn_width=decoder.expert_ffn_width,
        )

    def verify(self) -> int:
        """Read every byte of the bundle and check it; returns how many there were.

        Raises ArtifactError naming a damaged file, ExpertUnavailable naming a damaged record.
        """
        for name, entry in self.manifest.files.items():
            if name != self.manifest.experts_file:
                check_file(self.file(name), size_bytes=entry.bytes, sha256=entry.sha256)
        # The records first: they say which expert is damaged, where the hash says only that one is.
        with self.expert_store() as store:
            for record in self.manifest.records:
                store.weights(record.layer, record.expert)
        entry = self.manifest.files[self.manifest.experts_file]
        check_file(
            self.file(self.manifest.experts_file), size_bytes=entry.bytes, sha256=entry.sha256
        )
        return sum(entry.bytes for entry in self.manifest.files.values())

    def describe(self) -> dict[str, Any]:
        """What a person wants to know of a bundle, ready for JSON."""
        manifest = self.manifest
        return {
            "path": str(self.path),
            "format": FORMAT,
            "producer": manifest.producer,
            "checkpoint": dataclasses.asdict(manifest.checkpoint),
            "target": dataclasses.asdict(manifest.target),
            "precision": dict(manifest.precision),
            "model": dataclasses.asdict(manifest.model),
            "codec": dataclasses.asdict(manifest.codec),
            "generation": dataclasses.asdict(manifest.generation),
            "experts": {
                "records": len(manifest.records),
                "bytes": sum(record.bytes for record in manifest.records),
            },
            "files": {name: entry.bytes for name, entry in manifest.files.items()},
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "licences": dict(manifest.licences),
        }


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such bundle; a bundle is a directory, export makes one")
    place = path / MANIFEST
    if not place.is_file():
        hint = "this is a checkpoint: " if (path / "config.json").is_file() else ""
        raise ArtifactError(
            f"{path}: not a bundle, it holds no {MANIFEST}; {hint}make one with "
            "`deeptalk-edge export`"
        )
    content = read_json(place)
    found = content.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise ArtifactError(
            f"{place}: format {found}, this runtime reads {FORMAT}; update deeptalk-edge, or "
            "export the bundle again with this version"
        )
    if found != FORMAT:
        raise ArtifactError(
            f"{place}: format {found!r}, this runtime reads {FORMAT}; export the bundle again"
        )
    try:
        manifest = _parse(content)
    except KeyError as error:
        raise ArtifactError(f"{place}: {error} is missing; export the bundle again") from None
    except (ArtifactError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{place}: {error}; export the bundle again") from error
    _check_names(place, manifest)
    return manifest


def _parse(content: Mapping[str, Any]) -> Manifest:
    experts = content["experts"]
    return Manifest(
        producer=str(content["producer"]),
        checkpoint=spec_from_json(Origin, content["checkpoint"]),
        target=spec_from_json(Target, content["target"]),
        precision=dict(content["precision"]),
        model=spec_from_json(ModelSpec, content["model"]),
        codec=spec_from_json(CodecEntry, content["codec"]),
        generation=spec_from_json(Generation, content["generation"]),
        graphs=spec_from_json(Graphs, content["graphs"]),
        experts_file=str(experts["file"]),
        records=tuple(ExpertRecord(**record) for record in experts["records"]),
        files={name: spec_from_json(FileEntry, entry) for name, entry in content["files"].items()},
        licences=dict(content["licences"]),
    )


def _check_names(place: Path, manifest: Manifest) -> None:
    """Every file lies in the bundle itself, and every file that we open is hashed."""
    for name in manifest.files:
        if Path(name).name != name:
            raise ArtifactError(f"{place}: {name!r} is not a plain file name; refused")
    graphs = manifest.graphs
    needed = [graphs.encoder, graphs.embed, *graphs.segments, graphs.expert, graphs.head]
    for name in [*needed, graphs.codec, manifest.experts_file, "tokenizer.json", "golden.npz"]:
        if name not in manifest.files:
            raise ArtifactError(
                f"{place}: {name} has no size and hash under `files`; export the bundle again"
            )
    decoder = manifest.model.decoder
    expected = {(i, e) for i in decoder.moe_layers for e in range(decoder.num_experts)}
    if {(record.layer, record.expert) for record in manifest.records} != expected:
        raise ArtifactError(
            f"{place}: {len(manifest.records)} expert records, expected one for each of "
            f"{len(expected)} experts; export the bundle again"
        )
    if len(graphs.segments) != len(decoder.moe_layers) + 1:
        raise ArtifactError(
            f"{place}: {len(graphs.segments)} segments, expected {len(decoder.moe_layers) + 1}; "
            "export the bundle again"
        )
