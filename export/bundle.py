"""Checkpoint in, bundle out: the order of the steps. The format is docs/bundle.md's.

Every file is written in a directory under a hidden name, the manifest last, then the directory is
renamed: an export that is stopped leaves no incomplete bundle in its place. A killed
export is continued by the next one of the same inputs (export/staging.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import deeptalk_edge
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.bundle.golden import CPU_PREFIX, write_golden
from deeptalk_edge.bundle.manifest import (
    ENGINES,
    GATES,
    GOLDEN,
    MANIFEST,
    NATIVE_CODEC,
    TOKENIZER,
    CodecEntry,
    Experts,
    Graphs,
    Manifest,
    Origin,
    Target,
    write_manifest,
)
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.routing import ROUTING
from deeptalk_edge.bundle.understanding import FILES as UNDERSTANDING_FILES
from deeptalk_edge.bundle.understanding import read_understanding
from deeptalk_edge.calibration.folds import FoldedCheckpoint
from deeptalk_edge.calibration.table import OpenTable, record_form
from deeptalk_edge.checkpoint.codec import open_codec
from deeptalk_edge.checkpoint.config import CheckpointConfig, read_config
from deeptalk_edge.checkpoint.expert_split import read_audio_experts
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.plan.memory import fitted_profile, record_format
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.export.calibrated import check_exportable, common_form, other_forms
from deeptalk_edge.export.engines.bundle import (
    GRAPHS,
    GraphPrecision,
    checked_precision,
    engine_entries,
    finish_bundle,
    graphs_folder,
    step_settings,
    write_engines,
    write_step,
)
from deeptalk_edge.export.generation import read_generation
from deeptalk_edge.export.graphs.codec import CodecGraph, CodecNoise, export_codec
from deeptalk_edge.export.graphs.decoder import (
    export_embed_and_head,
    export_engine_embed_and_head,
    export_expert,
    export_segments,
)
from deeptalk_edge.export.graphs.encoder import export_encoder
from deeptalk_edge.export.inputs import InputHashes
from deeptalk_edge.export.packed.cpu_codec import write_native_codec
from deeptalk_edge.export.packed.cpu_weights import CpuPrecision, write_native_weights
from deeptalk_edge.export.packed.experts import (
    EXPERTS_FILE,
    ExpertSource,
    RoundedExperts,
    write_experts,
)
from deeptalk_edge.export.packed.gates import write_gates
from deeptalk_edge.export.staging import Staging, check_place, resumable_directory
from deeptalk_edge.export.verify.cpu_reference import CpuReference
from deeptalk_edge.export.verify.golden import (
    GoldenInputs,
    golden_inputs,
    golden_outputs,
)
from deeptalk_edge.export.verify.parity import parity_report, reference_hidden
from deeptalk_edge.export.verify.reference import Floats
from deeptalk_edge.export.verify.run_step import engine_outputs
from deeptalk_edge.model.spec import CodecSpec

PARITY_FILE = "parity.json"

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

    profile: DeviceProfile = field(default_factory=lambda: load_profile("cpu"))
    """What the bundle is made for."""

    table: Path | None = None
    """A calibration table: its records and folded scales instead of round-to-nearest."""

    plugin: Path | None = None
    """libdt_moe_plugin.so for the device, where the profile's experts run in the plugin."""

    replace: bool = False
    """Replace an existing bundle."""

    if_changed: bool = False
    """Leave a bundle that was made of the same checkpoint and settings by the same exporter;
    replace any other one."""


def export_bundle(
    checkpoint_directory: Path,
    place: Path,
    settings: ExportSettings,
    progress: Progress = lambda step, done, total: None,
    *,
    checkpoint: Checkpoint | None = None,
) -> Manifest:
    """Write the bundle of a checkpoint at `place`, or go on with an export that was killed there.

    A bundle for TensorRT in place of a checkpoint gets its engines built here, on the device.
    `checkpoint` gives the weights instead of the files in the directory.

    Raises ArtifactError if the checkpoint is incomplete or `place` may not be replaced,
    SettingsError if the profile lacks something or `place` cannot be written, BackendError if an
    engine cannot be built, DoesNotFit if the disk fills.
    """
    replace = settings.replace or settings.if_changed
    place = check_place(place, replace=replace)
    _check_inputs(checkpoint_directory, place, settings)
    if (checkpoint_directory / MANIFEST).is_file():
        return finish_bundle(
            checkpoint_directory,
            place,
            settings.profile,
            settings.plugin,
            replace=replace,
            progress=progress,
        )
    config = read_config(checkpoint_directory, settings.encoder)
    if checkpoint is None:
        checkpoint = Checkpoint.of(config, snac=settings.snac)
    profile = fitted_profile(settings.profile, checkpoint.spec)
    settings = dataclasses.replace(settings, profile=profile)
    graphs_for = profile if profile.has_engines else profile.on_backend("ort")
    precision = checked_precision(graphs_for, settings.plugin)
    if profile.backend == "cpu":
        precision["encoder"] = profile.precision.encoder
    num_others = len(ENGINES) if profile.has_engines else 1 + (profile.backend == "cpu")
    total = 10 + len(checkpoint.spec.decoder.moe_layers) + num_others
    steps = _Steps(progress, total=total)
    steps.begin("checkpoint")
    hashes = InputHashes()
    given = (checkpoint_directory, settings.encoder, settings.snac, settings.table)
    inputs = hashes.of_all(
        [folder for folder in given if folder],
        [settings.plugin] if settings.plugin else [],
        dataclasses.replace(settings, replace=False, if_changed=False),
    )
    if settings.if_changed and (made := _made_of(place, inputs)):
        return made
    export = _Export(config, checkpoint, settings, precision, hashes, inputs)
    with resumable_directory(place, inputs, replace=replace) as staging:
        return export.write(staging, steps)


def _made_of(place: Path, inputs: str) -> Manifest | None:
    """The manifest of a whole bundle that was made of these inputs, else None."""
    if not (place / MANIFEST).is_file():
        return None
    try:
        manifest = Bundle.open(place).manifest
    except ArtifactError:
        return None  # damaged: it is made again
    return manifest if manifest.inputs == inputs else None


def _check_inputs(checkpoint: Path, place: Path, settings: ExportSettings) -> None:
    """Raises SettingsError if there is no such plugin, or if an input would go with what is
    replaced."""
    if settings.plugin is not None and not settings.plugin.is_file():
        raise SettingsError(f"{settings.plugin}: no such file; build the plugin with `make plugin`")
    replaced = Path(os.path.realpath(place))
    for path in (checkpoint, settings.encoder, settings.snac, settings.table):
        if path is not None and replaced in Path(os.path.realpath(path)).parents:
            raise SettingsError(
                f"{place}: holds {path}, which the export reads; choose another place"
            )


class _Export:
    """The steps of one export."""

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoint: Checkpoint,
        settings: ExportSettings,
        precision: GraphPrecision,
        hashes: InputHashes,
        inputs: str,
    ) -> None:
        self._directory = directory = config.directory
        self._settings = settings
        self._profile = settings.profile
        self._precision = precision
        self._spec = checkpoint.spec
        self._codec = open_codec(settings.snac or directory / "snac", checkpoint)
        self._generation = read_generation(config)
        self._audio_experts = read_audio_experts(config)
        read_understanding(directory, self._spec.decoder.width)  # refused before any work
        self._origin = Origin(name=directory.resolve().name, sha256=hashes.of_weights(directory))
        self._inputs = inputs
        self._table: OpenTable | None = None
        self._checkpoint = checkpoint
        self._records = record_format(self._spec, self._profile)
        self._experts: ExpertSource = RoundedExperts(checkpoint, self._records)
        if settings.table is not None:
            self._use(OpenTable.open(settings.table, self._spec, self._origin.sha256))

    def _use(self, table: OpenTable) -> None:
        """Export what a table holds.

        Raises ArtifactError if its gate failed, or the backend cannot hold its precisions.
        """
        check_exportable(table, self._profile)
        self._table, self._experts = table, table
        self._checkpoint = FoldedCheckpoint(self._checkpoint, table.folds)
        self._records = record_form(self._spec, common_form(table.table.layers.values()))

    def write(self, staging: Staging, steps: _Steps) -> Manifest:
        """Everything but the renaming."""
        graphs = graphs_folder(staging.path, self._profile)
        graphs.mkdir(exist_ok=True)
        manifest = self._write_graphs(staging, graphs, steps)
        steps.begin("golden")
        staging.step("golden", lambda: self._write_golden(staging.path, graphs, manifest))
        steps.begin("parity")
        staging.step("parity", lambda: self._check_parity(staging.path, manifest))
        if self._profile.has_engines:
            plugin = self._settings.plugin
            manifest = write_engines(staging, manifest, graphs, self._profile, plugin, steps.begin)
        steps.begin("manifest")
        staging.drop(GRAPHS)
        written = sorted(staging.files().items())
        files = {name: entry for name, entry in written if Path(name).parent == Path()}
        # Parity was that of float32 graphs; the kernels beside them may keep another cache.
        precision = {**manifest.precision, "kv_cache": self._profile.precision.kv_cache}
        manifest = dataclasses.replace(manifest, files=files, precision=precision)
        write_manifest(manifest, staging.path)
        return manifest

    def _write_graphs(self, staging: Staging, graphs: Path, steps: _Steps) -> Manifest:
        """Graphs, experts and tokenizer; the manifest without engines and files."""
        checkpoint, precision = self._checkpoint, self._precision
        steps.begin("encoder")
        staging.step("encoder", lambda: self._write_encoder(graphs))
        steps.begin("embedding and head")
        staging.step("embedding and head", lambda: self._write_embed_and_head(graphs))
        steps.begin("decoder")
        decoder = staging.step("decoder", lambda: self._write_decoder(graphs))
        steps.begin("experts")
        records = staging.step("experts", lambda: self._write_experts(staging, steps))
        if not self._profile.has_engines:
            steps.begin("gates")
            gates = staging.path / GATES
            staging.step("gates", lambda: write_gates(checkpoint, gates))
        if self._table is not None:
            shutil.copyfile(self._table.path / ROUTING, staging.path / ROUTING)
        if self._profile.backend == "cpu":
            steps.begin("native weights")
            staging.step("native weights", lambda: self._write_native(staging.path))
        steps.begin("codec")
        codec = staging.step("codec", lambda: self._write_codec(graphs))
        steps.begin("tokenizer")
        staging.step("tokenizer", lambda: _copy_tokenizer(self._directory, staging.path))
        for name in UNDERSTANDING_FILES:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, staging.path / name)
        manifest = Manifest(
            producer=f"deeptalk-edge {deeptalk_edge.__version__}",
            checkpoint=self._origin,
            target=Target(backend=self._profile.backend, device=self._profile.name),
            precision={**precision, "experts": self._records.dtype},
            model=self._spec,
            codec=_codec_entry(
                self._codec.spec,
                CodecGraph(**{**codec, "noise_rates": tuple(codec["noise_rates"])}),
                self._settings.codec_noise,
            ),
            generation=self._generation,
            inputs=self._inputs,
            graphs=None,
            engines={},
            experts=Experts(
                file=EXPERTS_FILE,
                dtype=self._records.dtype,
                group=self._records.group,
                layers={} if self._table is None else other_forms(self._table.table.layers),
                records=tuple(ExpertRecord(**record) for record in records),
            ),
            files={},
            calibration=None if self._table is None else self._table.table.calibration,
            licences={"weights": "those of the checkpoint", "graphs": "Apache-2.0"},
        )
        if not self._profile.has_engines:
            return dataclasses.replace(manifest, graphs=_ort_graphs(decoder))
        engines = engine_entries(manifest, graphs, decoder[0], self._profile)
        return dataclasses.replace(manifest, engines=engines)

    def _write_encoder(self, graphs: Path) -> None:
        checkpoint, precision = self._checkpoint, self._precision["encoder"]
        if precision == "int8":
            export_encoder(checkpoint, graphs, products="int8")
        else:
            is_fixed = self._profile.has_engines
            export_encoder(checkpoint, graphs, precision=precision, is_fixed=is_fixed)

    def _write_embed_and_head(self, graphs: Path) -> None:
        if self._profile.has_engines:
            precision = self._precision["head"]
            export_engine_embed_and_head(self._checkpoint, graphs, precision=precision)
        else:
            export_embed_and_head(self._checkpoint, graphs)

    def _write_decoder(self, graphs: Path) -> list[str]:
        """Segments and an expert for ONNX Runtime, the whole step for an engine: the file names."""
        if self._profile.has_engines:
            settings = step_settings(
                self._profile,
                self._precision,
                self._generation,
                self._records,
                {layer: self._experts.form(layer) for layer in self._spec.decoder.moe_layers},
            )
            return [write_step(self._checkpoint, settings, self._profile.moe, graphs)]
        export_expert(self._spec.decoder, graphs)
        return export_segments(self._checkpoint, graphs)

    def _write_experts(self, staging: Staging, steps: _Steps) -> list[dict[str, int]]:
        """All records; those of a layer are noted when it is written."""
        layers = self._spec.decoder.moe_layers
        noted = [staging.noted(f"experts of layer {layer}") or [] for layer in layers]

        def note(layer: int, records: list[ExpertRecord]) -> None:
            content = [dataclasses.asdict(record) for record in records]
            staging.note(f"experts of layer {layer}", content)
            steps.begin("experts")

        records = write_experts(
            self._spec.decoder,
            self._experts,
            self._audio_experts,
            staging.path / EXPERTS_FILE,
            note,
            done=[ExpertRecord(**record) for layer in noted for record in layer],
        )
        return [dataclasses.asdict(record) for record in records]

    def _write_native(self, place: Path) -> None:
        write_native_weights(self._checkpoint, self._records, CpuPrecision(), place)
        write_native_codec(self._codec, self._settings.codec_noise, place / NATIVE_CODEC)

    def _write_codec(self, graphs: Path) -> dict[str, Any]:
        noise, precision = self._settings.codec_noise, self._precision["codec"]
        return dataclasses.asdict(export_codec(self._codec, noise, graphs, precision=precision))

    def _write_golden(self, place: Path, graphs: Path, manifest: Manifest) -> None:
        """What ONNX Runtime makes of the graphs; those of engines in their no-plugin form."""
        inputs = golden_inputs(self._spec)
        if self._profile.has_engines:
            outputs = engine_outputs(graphs, place / EXPERTS_FILE, manifest, inputs)
        else:
            outputs = golden_outputs(place, manifest, inputs)
        if self._profile.backend == "cpu":
            outputs |= self._cpu_logits(inputs, outputs["features"])
        write_golden(place, manifest, {**dataclasses.asdict(inputs), **outputs})

    def _cpu_logits(self, inputs: GoldenInputs, features: Floats) -> dict[str, Floats]:
        """What the checkpoint makes of the golden rows with the weights of native.bin."""
        reference = CpuReference(self._checkpoint, self._experts, self._records, CpuPrecision())
        text, codes = reference.logits(reference_hidden(reference, inputs, features)[-2:])
        return {f"{CPU_PREFIX}text_logits": text, f"{CPU_PREFIX}code_logits": codes}

    def _check_parity(self, place: Path, manifest: Manifest) -> None:
        """Raises ParityError if the graphs do not do what the checkpoint says."""
        with np.load(place / GOLDEN) as golden:
            report = parity_report(
                dict(golden), self._checkpoint, self._codec, manifest, self._experts
            )
        report.check()
        text = json.dumps(report.as_json(), indent=1)
        (place / PARITY_FILE).write_text(text + "\n", encoding="utf-8")


def _ort_graphs(segments: list[str]) -> Graphs:
    return Graphs(
        encoder="encoder.onnx",
        embed="embed.onnx",
        segments=tuple(segments),
        expert="expert.onnx",
        head="head.onnx",
        codec="codec.onnx",
    )


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def begin(self, name: str) -> None:
        self._progress(name, self._done, self._total)
        self._done += 1


def _codec_entry(spec: CodecSpec, graph: CodecGraph, noise: CodecNoise) -> CodecEntry:
    return CodecEntry(
        spec=spec,
        delay_samples=graph.delay_samples,
        state_size=graph.state_size,
        noise=noise if graph.noise_rates else "off",
        noise_rates=graph.noise_rates,
    )


def _copy_tokenizer(checkpoint: Path, directory: Path) -> None:
    source = checkpoint / TOKENIZER
    if not source.is_file():
        raise ArtifactError(f"{source}: missing; the bundle needs the checkpoint's tokenizer")
    shutil.copyfile(source, directory / TOKENIZER)
