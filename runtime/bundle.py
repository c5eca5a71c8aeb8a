"""The bundle on disk: opened, checked and described before any graph is parsed.

A bundle is what `deeptalk-edge export` writes: see docs/bundle.md. `Bundle.open` checks the format,
and the size and SHA-256 of every file that the manifest names. `experts.bin` may be larger than
memory: its size is checked here, its records when they are first read, or all at once by `verify`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeptalk_edge.devices.profile import Backend, MoeForm
from deeptalk_edge.errors import ArtifactError, BackendError, ExpertUnavailable
from deeptalk_edge.expert_record import ExpertDtype, RecordFormat
from deeptalk_edge.files import check_file
from deeptalk_edge.runtime.experts.record import ExpertRecord
from deeptalk_edge.signature import PublicKey, signature_place, verify_file
from deeptalk_edge.spec import CodecSpec, ModelSpec, read_json, spec_from_json

FORMAT = 1
MANIFEST = "manifest.json"

NATIVE_WEIGHTS, NATIVE_INDEX = "native.bin", "native.json"
"""The decoder as the native backend reads it, beside the graphs."""

NATIVE_CODEC = "native_codec.bin"
"""The codec's weights for the same; bundles of before it lack them."""

ENGINES = ("encoder", "embed", "step", "head", "codec")

Mode = Literal["batch-parallel", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a bundle was made from."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a bundle was made for."""

    backend: Backend
    device: str
    """The profile's name."""
    compute_capabilities: tuple[str, ...] = ()
    """What its engines run on, as compilers spell it: `sm_89`."""
    tensorrt: str | None = None
    """The version that built its engines; what that version must begin with, if none is built."""
    cuda: str | None = None
    moe: MoeForm = "split"
    """How its graphs run the routed experts."""
    plugin: str | None = None
    """File of our TensorRT plugin, where the engines need it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a TensorRT backend finds where it runs."""

    backend: Backend
    compute_capability: str
    tensorrt: str


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
    """File names of ONNX Runtime's graphs."""

    encoder: str
    embed: str
    segments: tuple[str, ...]
    expert: str
    head: str
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One TensorRT engine, or what it is to be built from."""

    engine: str | None
    """None: not built yet; that is done on the device."""
    graph: str | None
    """The ONNX graph, if the bundle carries it."""
    profiles: tuple[Mapping[str, Any], ...]
    """For every input with a free dimension its least, usual and greatest shape."""
    weights: str | None = None
    """File of the weights that are inputs, where there are any."""
    weight_places: str | None = None
    """Where each lies in it: JSON, name to offset, shape and dtype."""


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
    ort_graphs: Graphs | None
    """None where engines take their place."""
    engines: Mapping[str, EngineEntry]
    """One for each of ENGINES; none for ONNX Runtime."""
    experts_file: str
    expert_dtype: ExpertDtype
    expert_group: int | None
    records: tuple[ExpertRecord, ...]
    files: Mapping[str, FileEntry]
    licences: Mapping[str, str]

    @property
    def graphs(self) -> Graphs:
        """ONNX Runtime's graphs.

        Raises BackendError if the bundle is for another backend.
        """
        if self.ort_graphs is None:
            raise BackendError(
                f"this bundle is for {self.target.backend} on {self.target.device}; ONNX Runtime "
                "cannot run it, export the checkpoint with --backend ort"
            )
        return self.ort_graphs

    @property
    def spare_files(self) -> frozenset[str]:
        """The decoder's graphs and their weights in a bundle for the CPU's kernels: nobody reads
        them but where ONNX Runtime stands in."""
        graphs = self.ort_graphs
        if graphs is None or self.target.backend != "native":
            return frozenset()
        names = {graphs.embed, graphs.head, graphs.expert, *graphs.segments, "embedding.bin"}
        names |= {Path(name).with_suffix(".bin").name for name in graphs.segments}
        return frozenset(names & self.files.keys())

    @property
    def record_format(self) -> RecordFormat:
        """How the routed experts lie in their file."""
        return RecordFormat(
            dtype=self.expert_dtype,
            group=self.expert_group,
            width=self.model.decoder.width,
            ffn_width=self.model.decoder.expert_ffn_width,
        )


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its files are present, and those that are read are unaltered."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        machine: Machine | None = None,
        public_key: PublicKey | None = None,
    ) -> Bundle:
        """Read the manifest and check every file against it; nothing is parsed but the manifest.

        Of experts.bin, and of `spare_files`, only the size is checked: who reads them checks them.
        With `public_key` the manifest must be signed with it, no file may lie there that it does
        not name, and these are hashed here and now as well: a record's CRC-32 stops no one who
        means harm.

        Raises ArtifactError, naming the file, if this is not a bundle, is one of a newer format,
        is not signed, does not fit `machine`, or a file is missing, truncated or altered.
        """
        path = Path(path)
        if public_key is not None and path.is_dir():
            verify_file(path / MANIFEST, public_key)
        manifest = _read_manifest(path)
        if public_key is not None:
            _check_nothing_else(path, manifest)
        if machine is not None:
            _check_machine(path, manifest, machine)
        later = {manifest.experts_file, *manifest.spare_files} if public_key is None else set()
        for name, entry in manifest.files.items():
            sha256 = None if name in later else entry.sha256
            check_file(path / name, size_bytes=entry.bytes, sha256=sha256)
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        """The place of a file that the manifest names."""
        return self.path / name

    def check(self, names: Iterable[str]) -> None:
        """Hash some files.

        Raises ArtifactError naming one that is missing, truncated or altered.
        """
        for name in sorted(names):
            entry = self.manifest.files[name]
            check_file(self.file(name), size_bytes=entry.bytes, sha256=entry.sha256)

    def verify(self) -> int:
        """Read every byte of the bundle and check it; returns how many there were.

        Raises ArtifactError naming a damaged file, ExpertUnavailable naming a damaged record.
        """
        self.check(self.manifest.files.keys() - {self.manifest.experts_file})
        # The records first: they say which expert is damaged, where the hash says only that one is.
        path = self.file(self.manifest.experts_file)
        with path.open("rb") as file:
            for record in self.manifest.records:
                file.seek(record.offset)
                if zlib.crc32(file.read(record.bytes)) != record.crc32:
                    raise ExpertUnavailable(
                        f"{path}: layer {record.layer}, expert {record.expert} is damaged; copy "
                        "the bundle again"
                    )
        self.check([self.manifest.experts_file])
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
            "engines": {name: dataclasses.asdict(e) for name, e in manifest.engines.items()},
            "experts": {
                "dtype": manifest.expert_dtype,
                "group": manifest.expert_group,
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
    experts, engines = content["experts"], content.get("engines", {})
    graphs = content["graphs"]
    return Manifest(
        producer=str(content["producer"]),
        checkpoint=spec_from_json(Origin, content["checkpoint"]),
        target=spec_from_json(Target, content["target"]),
        precision=dict(content["precision"]),
        model=spec_from_json(ModelSpec, content["model"]),
        codec=spec_from_json(CodecEntry, content["codec"]),
        generation=spec_from_json(Generation, content["generation"]),
        ort_graphs=None if graphs is None else spec_from_json(Graphs, graphs),
        engines={name: spec_from_json(EngineEntry, entry) for name, entry in engines.items()},
        experts_file=str(experts["file"]),
        expert_dtype=experts.get("dtype", "float32"),
        expert_group=experts.get("group"),
        records=tuple(ExpertRecord(**record) for record in experts["records"]),
        files={name: spec_from_json(FileEntry, entry) for name, entry in content["files"].items()},
        licences=dict(content["licences"]),
    )


def _check_nothing_else(path: Path, manifest: Manifest) -> None:
    signed = {MANIFEST, signature_place(path / MANIFEST).name, *manifest.files}
    if unsigned := sorted({entry.name for entry in path.iterdir()} - signed):
        raise ArtifactError(f"{path / unsigned[0]}: not part of what was signed; remove it")


def _check_machine(path: Path, manifest: Manifest, machine: Machine) -> None:
    """Engines serve the GPUs and the TensorRT that they were built for, and no other."""
    target = manifest.target
    if machine.backend != target.backend:
        raise ArtifactError(
            f"{path}: made for {target.backend}, this is {machine.backend}; export the checkpoint "
            f"with --backend {machine.backend}"
        )
    unbuilt = [name for name, entry in manifest.engines.items() if entry.engine is None]
    if unbuilt:
        raise ArtifactError(
            f"{path}: no engine yet for {', '.join(unbuilt)}; build them on this device with "
            f"`deeptalk-edge export {path} --device {target.device} -o FINISHED`"
        )
    if machine.compute_capability not in target.compute_capabilities:
        raise ArtifactError(
            f"{path}: its engines are for {', '.join(target.compute_capabilities)}, this GPU is "
            f"{machine.compute_capability}; export the checkpoint for this device"
        )
    if machine.tensorrt != target.tensorrt:
        raise ArtifactError(
            f"{path}: its engines were built by TensorRT {target.tensorrt}, this machine has "
            f"{machine.tensorrt}; build them again with this version"
        )


def _check_names(place: Path, manifest: Manifest) -> None:
    """Every file lies in the bundle itself, and every file that we open is hashed."""
    for name in manifest.files:
        if Path(name).name != name:
            raise ArtifactError(f"{place}: {name!r} is not a plain file name; refused")
    graphs, engines = manifest.ort_graphs, manifest.engines
    needed = [manifest.experts_file, "tokenizer.json", "golden.npz"]
    if graphs is not None:
        needed += [graphs.encoder, graphs.embed, *graphs.segments, graphs.expert, graphs.head]
        needed.append(graphs.codec)
    elif missing := set(ENGINES) - engines.keys():
        raise ArtifactError(
            f"{place}: neither graphs nor engines for {', '.join(sorted(missing))}; export the "
            "bundle again"
        )
    if manifest.target.backend == "native":
        needed += [NATIVE_WEIGHTS, NATIVE_INDEX]
    for e in engines.values():
        files = (e.engine, e.graph, e.weights, e.weight_places)
        needed += [file for file in files if file is not None]
    needed += [manifest.target.plugin] if manifest.target.plugin else []
    for name in needed:
        if name not in manifest.files:
            raise ArtifactError(
                f"{place}: {name} has no size and hash under `files`; export the bundle again"
            )
    record_bytes = manifest.record_format.content_bytes
    if wrong := [record for record in manifest.records if record.bytes != record_bytes]:
        raise ArtifactError(
            f"{place}: layer {wrong[0].layer}, expert {wrong[0].expert} has {wrong[0].bytes} "
            f"bytes, {manifest.expert_dtype} experts have {record_bytes}; export the bundle again"
        )
    decoder = manifest.model.decoder
    expected = {(i, e) for i in decoder.moe_layers for e in range(decoder.num_experts)}
    if {(record.layer, record.expert) for record in manifest.records} != expected:
        raise ArtifactError(
            f"{place}: {len(manifest.records)} expert records, expected one for each of "
            f"{len(expected)} experts; export the bundle again"
        )
    if graphs is not None and len(graphs.segments) != len(decoder.moe_layers) + 1:
        raise ArtifactError(
            f"{place}: {len(graphs.segments)} segments, expected {len(decoder.moe_layers) + 1}; "
            "export the bundle again"
        )
