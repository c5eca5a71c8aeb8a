"""Engines for a bundle: built at export, or on the device from the graphs that the bundle carries.

TensorRT-RTX's engines are built wherever the exporter runs and travel alone. TensorRT's serve one
device and one version, so that bundle carries its graphs: exported elsewhere, its engines are
missing until `deeptalk-edge export BUNDLE -o FINISHED` on the device builds them, and again after
an update of the device's software.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.bundle.manifest import (
    ENGINES,
    MANIFEST,
    EngineEntry,
    Generation,
    Manifest,
    Target,
    write_manifest,
)
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.target import MoeForm
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.export.dry_run.files import step_dense
from deeptalk_edge.export.engines.build import (
    EngineSettings,
    build_engine,
    is_installed,
    require_installed,
)
from deeptalk_edge.export.engines.shapes import (
    ShapeRange,
    codec_shape_ranges,
    embed_shape_ranges,
    head_shape_ranges,
    step_shape_ranges,
)
from deeptalk_edge.export.graphs.decoder import EMBEDDING_FILE, head_file
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.staging import Staging, resumable_directory
from deeptalk_edge.files import sha256_of

GRAPHS = "graphs"
"""Folder of graphs that are gone when their engines are built."""

_STEP, _OPERATORS_STEP = "step.onnx", "step_native.onnx"
_STEP_WEIGHTS, _STEP_PLACES = "step.bin", "step.weights.json"

GraphPrecision = dict[str, Any]
"""By tensor class: encoder, decoder, head, codec and kv_cache."""

_LICENCES = {
    "plugin": "Apache-2.0",
    "tensorrt": "not included; NVIDIA's own licence, installed on the device",
}


def checked_precision(profile: DeviceProfile, plugin: Path | None) -> GraphPrecision:
    """The profile's precision of what is in graphs.

    Raises SettingsError if graphs or engines cannot be made as the profile asks.
    """
    precision = dataclasses.asdict(profile.precision)
    known = {name: ("float16", "float32") for name in ("encoder", "head", "codec", "kv_cache")}
    known["decoder"] = (precision["kv_cache"], "int8")
    for name, forms in known.items():
        if precision[name] not in forms:
            raise SettingsError(
                f"device {profile.name}: {name} in {precision[name]}; graphs take "
                f"{' or '.join(forms)} there"
            )
    if profile.moe == "plugin":
        _check_plugin(profile, plugin)
    if profile.backend == "tensorrt" and profile.facts.tensorrt is None:
        raise SettingsError(f"device {profile.name} states no tensorrt version: add the fact")
    return {name: precision[name] for name in known}


def graphs_folder(place: Path, profile: DeviceProfile) -> Path:
    """Where graphs are written: TensorRT-RTX's are gone when the engines are built."""
    return place / GRAPHS if profile.backend == "tensorrt_rtx" else place


def step_settings(
    profile: DeviceProfile,
    precision: GraphPrecision,
    generation: Generation,
    records: RecordFormat,
    layer_records: Mapping[int, RecordFormat],
) -> StepSettings:
    return StepSettings(
        records=records,
        layer_records=layer_records,
        precision=precision["kv_cache"],
        dense=step_dense(profile),
        num_items=_num_items(generation),
        num_rows=None if profile.moe == "plugin" else 1,
        context_rows=generation.context_rows,
    )


def write_step(checkpoint: Checkpoint, settings: StepSettings, moe: MoeForm, folder: Path) -> str:
    """Write the whole decoder as one graph; returns the file to build.

    Its no-plugin form, which shares its weights, is in the same folder: checks run that.
    """
    export_step(checkpoint, folder, settings)
    rewrite_as_operators(folder / _STEP, folder / _OPERATORS_STEP)
    return _STEP if moe == "plugin" else _OPERATORS_STEP


def engine_entries(
    manifest: Manifest, graphs: Path, step: str, profile: DeviceProfile
) -> dict[str, EngineEntry]:
    """What each engine is built from."""
    decoder, generation = manifest.model.decoder, manifest.generation
    num_items = _num_items(generation)
    profiles: dict[str, list[ShapeRange]] = {
        "encoder.onnx": [],
        "embed.onnx": embed_shape_ranges(graphs / "embed.onnx", num_items),
        step: step_shape_ranges(
            graphs / step,
            moe=profile.moe,
            context_rows=generation.context_rows,
            num_experts=decoder.num_experts,
            all_experts=decoder.num_experts * len(decoder.moe_layers),
            num_items=num_items,
        ),
        "head.onnx": head_shape_ranges(graphs / "head.onnx", num_items),
        "codec.onnx": codec_shape_ranges(graphs / "codec.onnx", manifest.codec.noise_rates),
    }
    entries = {
        name: EngineEntry(engine=None, graph=graph, profiles=tuple(shapes))
        for name, (graph, shapes) in zip(ENGINES, profiles.items(), strict=True)
    }
    if step_dense(profile) == "given":
        entries["step"] = dataclasses.replace(
            entries["step"], weights=_STEP_WEIGHTS, weight_places=_STEP_PLACES
        )
    return entries


def write_engines(
    staging: Staging,
    manifest: Manifest,
    graphs: Path,
    profile: DeviceProfile,
    plugin: Path | None,
    begin: Callable[[str], None],
) -> Manifest:
    """Build the engines of a bundle in the making, and put beside them what they need."""
    place = staging.path
    if plugin is not None:
        staging.step("plugin", lambda: _link_all(plugin.parent, place, [plugin.name]))
    licences = {**manifest.licences, **_LICENCES}
    manifest = dataclasses.replace(manifest, licences=licences)
    manifest = build_engines(staging, manifest, graphs, profile, plugin, begin)
    if graphs == place:
        return manifest
    inputs = sorted({EMBEDDING_FILE, head_file(manifest.model)})
    if step_dense(profile) == "given":
        inputs += [_STEP_WEIGHTS, _STEP_PLACES]
    staging.step("weights", lambda: _link_all(graphs, place, inputs))
    built = manifest.engines.items()
    engines = {name: dataclasses.replace(entry, graph=None) for name, entry in built}
    return dataclasses.replace(manifest, engines=engines)


def build_engines(
    staging: Staging,
    manifest: Manifest,
    graphs: Path,
    profile: DeviceProfile,
    plugin: Path | None,
    begin: Callable[[str], None],
) -> Manifest:
    """Build every engine of a manifest from its graph, or none where TensorRT is not installed.

    `begin` is called with the name of each. Returns the manifest with what was built. Raises
    BackendError if a build fails.
    """
    facts = profile.facts
    wanted = facts.tensorrt.value if facts.tensorrt and profile.backend == "tensorrt" else None
    target = Target(
        backend=profile.backend,
        device=profile.name,
        compute_capabilities=profile.targets,
        tensorrt=wanted,
        cuda=facts.cuda.value if facts.cuda else None,
        moe=profile.moe,
        plugin=plugin.name if plugin else None,
    )
    # TensorRT itself comes with the device; TensorRT-RTX can be had anywhere, so its lack is an
    # error, which build_engine raises.
    if profile.backend == "tensorrt" and not is_installed("tensorrt"):
        return dataclasses.replace(manifest, target=target)
    settings = EngineSettings(
        backend="tensorrt" if profile.backend == "tensorrt" else "tensorrt_rtx",
        targets=profile.targets if profile.backend == "tensorrt_rtx" else (),
        version=wanted,
        plugins=(staging.path / plugin.name,) if plugin else (),
    )

    def build(entry: EngineEntry, engine: Path) -> str:
        if entry.graph is None:
            raise ArtifactError(
                f"{engine.stem}: the bundle carries no graph; export the checkpoint again"
            )
        return build_engine(graphs / entry.graph, engine, entry.profiles, settings).version

    engines, versions = {}, set()
    for name, entry in manifest.engines.items():
        begin(f"{name} engine")
        engine = staging.path / f"{name}.engine"
        versions.add(staging.step(f"{name} engine", partial(build, entry, engine)))
        engines[name] = dataclasses.replace(entry, engine=engine.name)
    if len(versions) > 1:
        raise ArtifactError(
            f"TensorRT changed ({' to '.join(sorted(versions))}) since this export was begun; what "
            "was done is removed, export again"
        )
    target = dataclasses.replace(target, tensorrt=versions.pop())
    return dataclasses.replace(manifest, target=target, engines=engines)


def finish_bundle(
    source: Path,
    place: Path,
    profile: DeviceProfile,
    plugin: Path | None,
    *,
    replace: bool,
    progress: Callable[[str, int, int], None],
) -> Manifest:
    """Build the engines of a bundle that carries its graphs, on the device that it is for.

    `plugin` takes the place of the bundle's own. Raises ArtifactError if the bundle is not whole or
    carries no graphs, SettingsError if the profile is for another backend, BackendError if
    TensorRT is not here or fails.
    """
    bundle = Bundle.open(source)
    bundle.verify()
    manifest = bundle.manifest
    if profile.backend != "tensorrt" or manifest.target.backend != "tensorrt":
        raise SettingsError(
            f"{source} is a bundle for {manifest.target.backend} and the device {profile.name} "
            f"takes {profile.backend}: engines are built later for tensorrt alone; name a "
            "checkpoint, or the Jetson by --device"
        )
    if plugin is None and manifest.target.plugin:
        plugin = bundle.file(manifest.target.plugin)
    profile = dataclasses.replace(profile, moe=manifest.target.moe)  # the graphs are as they are
    require_installed("tensorrt", "no engine was built")
    if profile.moe == "plugin":
        _check_plugin(profile, plugin)
    old = {entry.engine for entry in manifest.engines.values()} | {manifest.target.plugin}
    kept = [name for name in manifest.files if name not in old]
    inputs = f"{sha256_of(source / MANIFEST)} {profile} {plugin and sha256_of(plugin)}"
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    with resumable_directory(place, digest, replace=replace) as staging:
        staging.step("files", lambda: _link_all(source, staging.path, kept))
        if plugin is not None:
            new = plugin
            staging.step("plugin", lambda: _link_all(new.parent, staging.path, [new.name]))
        done = itertools.count()
        manifest = build_engines(
            staging,
            manifest,
            staging.path,
            profile,
            plugin,
            lambda name: progress(name, next(done), len(ENGINES)),
        )
        manifest = dataclasses.replace(manifest, files=staging.files())
        write_manifest(manifest, staging.path)
    return manifest


def _num_items(generation: Generation) -> int:
    """Both items of a batch-parallel answer go through one step."""
    return 2 if generation.mode == "batch-parallel" else 1


def _check_plugin(profile: DeviceProfile, plugin: Path | None) -> None:
    """Where engines will be built now, the plugin must be here."""
    is_later = profile.backend == "tensorrt" and not is_installed("tensorrt")
    if plugin is None and not is_later:
        raise SettingsError(
            f"device {profile.name} runs its experts in our plugin: build it with `make plugin` "
            'and name it by --plugin, or choose moe = "operators"'
        )
    if plugin is not None and not plugin.is_file():
        raise SettingsError(f"{plugin}: no such file; build the plugin with `make plugin`")


def _link_all(source: Path, place: Path, names: Iterable[str]) -> None:
    """Put files of one folder into another, without a copy where the disk allows it."""
    for name in names:
        (place / name).unlink(missing_ok=True)
        try:
            os.link(source / name, place / name)
        except OSError:
            shutil.copyfile(source / name, place / name)
