"""`manifest.json`: the one definition of the bundle's format, for its writer and its readers.

types     the fields' annotations are the format: types, ranges and names are checked by schema.py
checks    what must hold between fields is checked here, for a manifest read and one to be written
checksum  SHA-256 of the content; it finds damage and edits that are plausible field by field.
          Bundles of deeptalk-edge 0.1.0 up to 2026-11 have none, and load

Source of the format: docs/bundle.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from deeptalk_edge.bundle.calibration import Calibration
from deeptalk_edge.bundle.expert_record import (
    PAGE_BYTES,
    ExpertDtype,
    ExpertForm,
    ExpertRecord,
    RecordFormat,
)
from deeptalk_edge.bundle.routing import ROUTING
from deeptalk_edge.bundle.target import MoeForm, TargetBackend, current_name
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.model.spec import CodecSpec, Factor, ModelSpec, Positions
from deeptalk_edge.schema import Between, Items, Text, checked, from_json, read_json

FORMAT = 1
MANIFEST = "manifest.json"

NATIVE_WEIGHTS, NATIVE_INDEX = "native.bin", "native.json"
"""The decoder as the backend `cpu` reads it, beside the graphs."""

NATIVE_CODEC = "native_codec.bin"
"""The codec's weights for the same; the first bundles lack them."""

TOKENIZER, GOLDEN, GATES = "tokenizer.json", "golden.npz", "gates.npz"

EngineName = Literal["encoder", "embed", "step", "head", "codec"]
ENGINES: tuple[str, ...] = get_args(EngineName)

Mode = Literal["batch-parallel", "single"]

Bytes: TypeAlias = Annotated[int, Between(0, 1 << 48)]
Sha256: TypeAlias = Annotated[str, Text("[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
FileName: TypeAlias = Annotated[
    str, Text(r"(?!\.{1,2}$)[ -.0-~]{1,255}", "a plain file name of at most 255 characters")
]
Line: TypeAlias = Annotated[str, Text("[^\\ud800-\\udfff]{0,100000}", "text that can be encoded")]
Shape: TypeAlias = Annotated[tuple[Annotated[int, Between(0, 1 << 31)], ...], Items(0, 8)]
TopK: TypeAlias = Annotated[int, Between(1, 1 << 20)]
Turns: TypeAlias = Annotated[int, Between(1, 1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a bundle was made from."""

    name: Line
    sha256: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a bundle was made for."""

    backend: TargetBackend
    device: Line
    """The profile's name."""
    compute_capabilities: tuple[Line, ...] = ()
    """What its engines run on, as compilers spell it: `sm_89`."""
    tensorrt: Line | None = None
    """The version that built its engines; what that version must begin with, if none is built."""
    cuda: Line | None = None
    moe: MoeForm = "split"
    """How its graphs run the routed experts."""
    plugin: FileName | None = None
    """File of our TensorRT plugin, where the engines need it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecEntry:
    """The streaming codec graph."""

    spec: CodecSpec
    delay_samples: int
    """The graph's output runs this much late."""
    state_size: Annotated[int, Between(1, 1 << 28)]
    noise: Literal["off", "tape"]
    noise_rates: tuple[int, ...]
    """Noise samples per codec frame of each decoder block, where there is a tape."""

    def __post_init__(self) -> None:
        rates = self.spec.block_rates if self.noise == "tape" and self.spec.noise else ()
        if self.noise_rates != rates:
            raise ValueError(
                f"noise_rates = {list(self.noise_rates)}: noise {self.noise!r} has {list(rates)}"
            )
        if self.delay_samples != self.spec.delay_samples:
            raise ValueError(
                f"delay_samples = {self.delay_samples}: this codec's is {self.spec.delay_samples}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the checkpoint's authors decode it; settings may differ per conversation."""

    system: Line
    speaker: Line
    mode: Mode
    text_top_k: TopK
    audio_top_k: TopK
    temperature: Factor
    repetition_penalty: Factor
    max_rows: Positions
    """Rows of one answer at most; a row of speech is one codec frame."""
    context_rows: Positions
    """Rows that the cache holds, over all turns."""
    max_turns: Turns | None = None
    """Turns that the model sees at once, the question at hand included; None: as many as fit."""
    fold_typed: bool = False
    """Typed questions reach the model in lower case and without punctuation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """File names of ONNX Runtime's graphs."""

    encoder: FileName
    embed: FileName
    segments: tuple[FileName, ...]
    expert: FileName
    head: FileName
    codec: FileName

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.encoder, self.embed, *self.segments, self.expert, self.head, self.codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """One TensorRT engine, or what it is to be built from."""

    engine: FileName | None
    """None: not built yet; that is done on the device."""
    graph: FileName | None
    """The ONNX graph, if the bundle carries it."""
    profiles: tuple[Mapping[str, Annotated[tuple[Shape, ...], Items(3, 3)]], ...]
    """For every input with a free dimension its least, usual and greatest shape."""
    weights: FileName | None = None
    """File of the weights that are inputs, where there are any."""
    weight_places: FileName | None = None
    """Where each lies in it: JSON, name to offset, shape and dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """What a file must measure."""

    bytes: Bytes
    sha256: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts' records, all in one file."""

    file: FileName
    dtype: ExpertDtype = "float32"
    group: Annotated[int, Between(1, 1 << 16)] | None = None
    """Weights that share a scale; only for int4."""
    layers: Mapping[str, ExpertForm] = field(default_factory=dict)
    """By layer, where its experts are in another form than `dtype` and `group`."""
    records: tuple[ExpertRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`, but for its format and its checksum."""

    producer: Line
    checkpoint: Origin
    target: Target
    precision: Mapping[str, Line]
    model: ModelSpec
    codec: CodecEntry
    generation: Generation
    graphs: Graphs | None
    """None where engines take their place."""
    engines: Mapping[str, EngineEntry] = field(default_factory=dict)
    """One for each of ENGINES; none for ONNX Runtime."""
    experts: Experts
    calibration: Calibration | None = None
    """How the experts were quantised, where a calibration table said it."""
    files: Mapping[str, FileEntry]
    licences: Mapping[str, Line]
    inputs: Sha256 | None = None
    """Of the checkpoint, the settings and the exporter that made it; None in early bundles."""

    @property
    def ort_graphs(self) -> Graphs:
        """ONNX Runtime's graphs.

        Raises BackendError if the bundle is for another backend.
        """
        if self.graphs is None:
            raise BackendError(
                f"this bundle is for {self.target.backend} on {self.target.device}; ONNX Runtime "
                "cannot run it. Leave out --backend to run its engines on that device, or export "
                "the checkpoint with --device cpu-int8 for this CPU"
            )
        return self.graphs

    @property
    def spare_files(self) -> frozenset[str]:
        """The decoder's graphs and their weights in a bundle for the CPU's kernels: they are read
        only where ONNX Runtime runs it instead."""
        graphs = self.graphs
        if graphs is None or self.target.backend != "cpu":
            return frozenset()
        names = {graphs.embed, graphs.head, graphs.expert, *graphs.segments, "embedding.bin"}
        with_weights = (graphs.head, *graphs.segments)  # a tied head has no file
        names |= {Path(name).with_suffix(".bin").name for name in with_weights}
        return frozenset(names & self.files.keys())

    @property
    def record_format(self) -> RecordFormat:
        """How the routed experts lie in their file, except layers with another form."""
        return self._form(ExpertForm(dtype=self.experts.dtype, group=self.experts.group))

    def record_format_of(self, layer: int) -> RecordFormat:
        """How a layer's routed experts lie in their file."""
        own = self.experts.layers.get(str(layer))
        return self.record_format if own is None else self._form(own)

    def _form(self, form: ExpertForm) -> RecordFormat:
        return RecordFormat(
            dtype=form.dtype,
            group=form.group,
            width=self.model.decoder.width,
            ffn_width=self.model.decoder.expert_ffn_width,
        )


def read_manifest(place: Path) -> Manifest:
    """Read and check a `manifest.json`.

    Raises ArtifactError naming the file and the field if it is missing, of another format, damaged
    or says something that cannot be.
    """
    content = read_json(place)
    _check_format(content.pop("format", None), place)
    has_checksum, checksum = "checksum" in content, content.pop("checksum", None)
    try:
        manifest = from_json(Manifest, _with_current_names(content))
        _check(manifest)
        if has_checksum:
            checked(Sha256, checksum, "checksum")
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{place}: {error}; export the bundle again") from error
    if has_checksum and checksum != checksum_of(content):
        raise ArtifactError(
            f"{place}: checksum = {checksum[:12]}..., the content has "
            f"{checksum_of(content)[:12]}...: damaged or edited; export the bundle again, or "
            "remove the line `checksum` if you edited it yourself"
        )
    return manifest


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the form that `read_manifest` reads; last of all, for it makes a bundle.

    Raises ArtifactError if that would refuse it.
    """
    content = json.loads(json.dumps(dataclasses.asdict(manifest)))
    try:
        _check(from_json(Manifest, content))
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{directory / MANIFEST} cannot be written: {error}") from error
    content = {"format": FORMAT, "checksum": checksum_of(content), **content}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def checksum_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without `format` and `checksum`, however it is spelled."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _with_current_names(content: dict[str, Any]) -> dict[str, Any]:
    """Bundles of the first versions say `native`."""
    target = content.get("target")
    if not isinstance(target, dict):
        return content
    named = {
        field: current_name(field, target[field])
        for field in ("backend", "moe")
        if isinstance(target.get(field), str)
    }
    return content | {"target": target | named}


def _check_format(found: object, place: Path) -> None:
    if isinstance(found, int) and found > FORMAT:
        raise ArtifactError(
            f"{place}: format {found}, this runtime reads {FORMAT}; update deeptalk-edge, or "
            "export the bundle again with this version"
        )
    if type(found) is not int or found != FORMAT:
        raise ArtifactError(
            f"{place}: format = {str(found)[:60]!r}, this runtime reads {FORMAT}; export the "
            "bundle again"
        )


def _check(manifest: Manifest) -> None:
    """What must hold between fields. Raises ValueError naming one of them."""
    model, codec = manifest.model, manifest.codec.spec
    vocabulary = model.vocabulary
    if vocabulary.num_codebooks != codec.frame_codes:
        raise ValueError(
            f"model.vocabulary.num_codebooks = {vocabulary.num_codebooks}: a codec of strides "
            f"{list(codec.vq_strides)} has {codec.frame_codes} codes a frame"
        )
    if vocabulary.codebook_size > codec.codebook_size:
        raise ValueError(
            f"model.vocabulary.codebook_size = {vocabulary.codebook_size}: the codec has "
            f"{codec.codebook_size} codes"
        )
    if manifest.generation.speaker not in vocabulary.audio_specials:
        raise ValueError(
            f"generation.speaker = {manifest.generation.speaker!r}: the checkpoint has "
            + ", ".join(vocabulary.audio_specials)
        )
    for name in ("encoder", "kv_cache"):
        if name not in manifest.precision:
            raise ValueError(f"precision.{name} is missing")
    _check_files(manifest)
    _check_records(manifest)


def _check_files(manifest: Manifest) -> None:
    """Every file that we open has a size and a hash, and those that hold arrays the right size."""
    if misnamed := [name for name in manifest.files if not _is_plain(name)]:
        raise ValueError(f"files: {misnamed[0][:60]!r} is not a plain file name; refused")
    for field_name, name in _needed_files(manifest):
        if name not in manifest.files:
            raise ValueError(f"{field_name}: {name} has no size and hash under `files`")
    graphs, layers = manifest.graphs, manifest.model.decoder.moe_layers
    if graphs is not None and len(graphs.segments) != len(layers) + 1:
        raise ValueError(
            f"graphs.segments: {len(graphs.segments)} segments, expected {len(layers) + 1}"
        )


def _is_plain(name: str) -> bool:
    rule: Text = get_args(FileName)[1]
    return rule.holds(name)


def _needed_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Each file that must be listed, after the field that names it."""
    yield "experts.file", manifest.experts.file
    yield from (("files", name) for name in (TOKENIZER, GOLDEN))
    if manifest.graphs is not None:
        yield from (("graphs", name) for name in manifest.graphs.names)
    elif missing := [name for name in ENGINES if name not in manifest.engines]:
        raise ValueError(f"neither graphs nor engines for {', '.join(missing)}")
    calibration = manifest.calibration
    if calibration is not None and calibration.paging is not None and calibration.paging.used:
        yield "calibration.paging", ROUTING
    if manifest.target.backend == "cpu":
        yield from (("target.backend", name) for name in (NATIVE_WEIGHTS, NATIVE_INDEX))
    if manifest.target.plugin is not None:
        yield "target.plugin", manifest.target.plugin
    for name, entry in manifest.engines.items():
        for file in (entry.engine, entry.graph, entry.weights, entry.weight_places):
            if file is not None:
                yield f"engines.{name}", file


def _check_records(manifest: Manifest) -> None:
    """Each expert has one record, on its own pages, that ends within the file."""
    decoder, records = manifest.model.decoder, manifest.experts.records
    sizes = {layer: manifest.record_format_of(layer) for layer in decoder.moe_layers}
    if unknown := [name for name in manifest.experts.layers if name not in map(str, sizes)]:
        raise ValueError(f"experts.layers.{unknown[0][:20]}: no such layer of experts")
    plain = manifest.record_format
    file_bytes = manifest.files[manifest.experts.file].bytes
    for record in records:
        name = f"experts.records: layer {record.layer}, expert {record.expert}"
        form = sizes.get(record.layer, plain)
        if record.bytes != form.content_bytes:
            raise ValueError(
                f"{name} has {record.bytes} bytes, {form.dtype} experts have {form.content_bytes}"
            )
        if record.offset % PAGE_BYTES or record.offset + record.bytes > file_bytes:
            raise ValueError(
                f"{name} lies at {record.offset}, expected a multiple of {PAGE_BYTES} within "
                f"{file_bytes} bytes"
            )
    expected = len(decoder.moe_layers) * decoder.num_experts
    found = {(record.layer, record.expert) for record in records}
    is_known = all(
        r.layer in decoder.moe_layers and r.expert < decoder.num_experts for r in records
    )
    if not (is_known and len(found) == len(records) == expected):
        raise ValueError(
            f"{len(records)} expert records, expected one for each of {expected} experts"
        )
