"""What is planned for: the sizes of a checkpoint or of a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import MANIFEST, Manifest, read_manifest
from deeptalk_edge.bundle.precision import CPU_KERNELS, FLOAT32, Precision
from deeptalk_edge.checkpoint.config import (
    GENERATION_CONFIG,
    CheckpointConfig,
    read_codec_spec,
    read_config,
)
from deeptalk_edge.devices.plan.device import Model
from deeptalk_edge.devices.plan.memory import memory_plan, record_format
from deeptalk_edge.devices.plan.shapes import WeightShapes
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import Positions
from deeptalk_edge.schema import checked

_DEFAULT_CONTEXT_ROWS = 4096


def model_of_checkpoint(place: Path) -> Model:
    """Read from the config files; no weight is opened.

    Raises ArtifactError if one is missing or says what cannot be.
    """
    config = read_config(place)
    return Model(
        spec=config.model,
        codec=read_codec_spec(place / "snac"),
        context_rows=_context_rows(config),
    )


def _context_rows(config: CheckpointConfig) -> Any:
    """As an export of this checkpoint would have them by default."""
    rows = config.generation.get("context_rows") or _DEFAULT_CONTEXT_ROWS
    where = f"{config.directory / GENERATION_CONFIG}: deeptalk.context_rows"
    return checked(Positions, rows, where)


def model_of_bundle(place: Path) -> tuple[Model, Manifest]:
    """Read from its manifest. Raises ArtifactError if that is missing or damaged."""
    manifest = read_manifest(place / MANIFEST)
    model = Model(
        spec=manifest.model,
        codec=manifest.codec.spec,
        context_rows=manifest.generation.context_rows,
    )
    return model, manifest


def memory_parts(manifest: Manifest) -> dict[str, int]:
    """Bytes by source, computed: weights, cache, workspace, and all experts."""
    profile = of_bundle(load_profile("cpu-int8"), manifest)
    records = record_format(manifest.model, profile)
    shapes = WeightShapes.of(manifest.model, manifest.codec.spec, with_noise=False)
    rows = manifest.generation.context_rows
    plan = memory_plan(manifest.model, profile, shapes, records, rows)
    parts = {name: size for name, size in plan.parts.items() if name != "reserve"}
    return parts | {"experts": plan.num_experts * plan.expert_bytes}


def of_bundle(profile: DeviceProfile, manifest: Manifest) -> DeviceProfile:
    """The device, with the bundle's precision and backend instead of the profile's.

    Raises SettingsError if the device cannot run such a bundle.
    """
    target = manifest.target
    precision = _precision(manifest)
    form: Any = target.moe
    try:
        return dataclasses.replace(profile, backend=target.backend, moe=form, precision=precision)
    except ValueError as error:
        raise SettingsError(
            f"device {profile.name} cannot run this bundle, which is for {target.device}: {error}"
        ) from error


def _precision(manifest: Manifest) -> Precision:
    """A bundle for our kernels names the precisions of the graphs beside them; its kernels' are
    known."""
    experts: dict[str, Any] = {
        "experts": manifest.experts.dtype,
        "expert_group": manifest.experts.group,
    }
    said: Any = manifest.precision
    if manifest.target.backend == "ort":
        return FLOAT32
    if manifest.target.backend == "cpu":
        kept = {"encoder": said["encoder"], "kv_cache": said["kv_cache"]}
        return dataclasses.replace(CPU_KERNELS, **kept, **experts)
    parts = {part: said[part] for part in ("encoder", "decoder", "head", "codec", "kv_cache")}
    return Precision(**parts, **experts)
