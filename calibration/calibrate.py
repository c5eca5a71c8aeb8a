"""Checkpoint and utterances to a table: observe, check coverage, quantise layer by layer, write.

Memory: the float bundle as the runtime holds it, its experts paged; then one layer's tokens and one
expert at a time. Nothing of the official size is ever in memory at once.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import deeptalk_edge
from deeptalk_edge.bundle.calibration import Calibration, Gate, RouterAgreement
from deeptalk_edge.bundle.expert_record import ExpertForm, ExpertRecord
from deeptalk_edge.bundle.manifest import Origin
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.routing import ROUTING, Routing
from deeptalk_edge.calibration.corpus import Corpus, as_summary
from deeptalk_edge.calibration.coverage import (
    FLOOR,
    THRESHOLD,
    Coverage,
    ExpertCoverage,
    own_modality,
    routed_counts,
)
from deeptalk_edge.calibration.folds import Folds
from deeptalk_edge.calibration.layer import LayerTask, Method
from deeptalk_edge.calibration.observe import Observation, observe
from deeptalk_edge.calibration.paging import measured_use_counts, paging_gain
from deeptalk_edge.calibration.ranges.channels import normalised
from deeptalk_edge.calibration.routers import FittedRouter, fit_routers
from deeptalk_edge.calibration.table import (
    RECORDS,
    OpenTable,
    Table,
    record_form,
    save_folds,
    write_table,
)
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import refusing
from deeptalk_edge.host import peak_resident_mb
from deeptalk_edge.model.spec import ModelSpec

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateSettings:
    """How to calibrate."""

    method: Method = "awq"
    threshold: int = THRESHOLD
    floor: int = FLOOR
    seed: int = 0
    threads: int = 1
    most_tokens: int = 16384
    """Kept of each layer."""
    max_rows: int | None = None
    """Of an answer; None: as the checkpoint says."""
    budget_bytes: int | None = None
    pool: str | None = None
    """Of the observed float model, as for `run --pool`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """What quantising found, beside what it wrote."""

    records: tuple[ExpertRecord, ...]
    folds: Folds
    errors: dict[int, list[float]]
    """By layer, of each expert."""
    input_most: dict[int, list[float]]
    forced: dict[tuple[int, int], int]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that the report tells, and the table that it describes."""

    table: Table
    corpus: Corpus
    coverage: Coverage
    observation: Observation
    quantised: Quantised
    routers: Mapping[int, FittedRouter] = field(default_factory=dict)
    """By MoE layer, if they were fitted."""
    seconds: dict[str, float] = field(default_factory=dict)


def calibrate(
    checkpoint: Checkpoint,
    origin: Origin,
    audio_experts: Sequence[Sequence[int]],
    reference: Bundle,
    corpus: Corpus,
    profile: DeviceProfile,
    forms: Mapping[int, ExpertForm] | Callable[[Observation], Mapping[int, ExpertForm]],
    directory: Path,
    settings: CalibrateSettings,
    progress: Progress = lambda step, done, total: None,
    *,
    seen: Observation | None = None,
) -> Findings:
    """Write a table without gate and report into `directory`.

    `reference` is the checkpoint's float bundle; `forms` the precision by MoE layer, or what
    chooses it; `seen` spares the observation where it was made before.

    Raises SettingsError if an expert stays below the floor, ArtifactError if a weight cannot be
    held or the bundle is another checkpoint's, DoesNotFit if the disk fills.
    """
    if reference.manifest.checkpoint.sha256 != origin.sha256:
        raise ArtifactError(
            f"{reference.path}: exported from {reference.manifest.checkpoint.name}, another "
            "checkpoint or another state of it; export it again"
        )
    spec = checkpoint.spec
    with tempfile.TemporaryDirectory(dir=directory) as scratch, refusing(directory):
        began = time.monotonic()
        seen = seen or observe(
            reference,
            corpus.measured,
            Path(scratch),
            most_tokens=settings.most_tokens,
            max_rows=settings.max_rows,
            threads=settings.threads,
            seed=settings.seed,
            pool=settings.pool,
            progress=lambda done, total: progress("observe", done, total),
        )
        observed_s = time.monotonic() - began
        coverage = covered(spec, audio_experts, seen, settings)
        coverage.check()
        chosen = forms(seen) if callable(forms) else forms
        quantised = quantise_all(
            checkpoint, audio_experts, seen, chosen, directory, settings, progress
        )
    folds = quantised.folds
    if profile.precision.kv_cache == "int8":
        folds = replace(folds, latents=latent_scales(seen))
    experts = tuple(
        replace(e, forced=quantised.forced[e.layer, e.expert]) for e in coverage.experts
    )
    coverage = replace(coverage, experts=experts)
    used = measured_use_counts(seen.routes)
    assert used.succession is not None
    shares = (used.listen, used.speak, used.succession)
    Routing(*(share.astype(np.float32) for share in shares)).save(directory / ROUTING)
    table = Table(
        producer=f"deeptalk-edge {deeptalk_edge.__version__}",
        checkpoint=origin,
        device=profile.name,
        layers={str(layer): form for layer, form in chosen.items()},
        folded=save_folds(folds, directory),
        records=quantised.records,
        calibration=Calibration(
            method=settings.method,
            corpus=corpus.source,
            utterances=len(corpus.measured),
            seed=settings.seed,
            experts=len(coverage.experts),
            forced=len(coverage.forced),
            below_floor=sum(e.routed < FLOOR for e in coverage.experts),
            floor=settings.floor,
            error=float(np.mean([e for layer in quantised.errors.values() for e in layer])),
            budget_bytes=settings.budget_bytes,
            paging=paging_gain(seen.routes),
        ),
    )
    return Findings(
        table=write_table(table, directory),
        corpus=corpus,
        coverage=coverage,
        observation=seen,
        quantised=quantised,
        seconds={"observe": observed_s, "quantise": quantised.seconds},
    )


def with_fitted_routers(
    found: Findings,
    checkpoint: Checkpoint,
    reference: Bundle,
    candidate: Bundle,
    directory: Path,
    settings: CalibrateSettings,
    progress: Progress = lambda step, done, total: None,
) -> Findings:
    """Fit the routers to the quantised experts and write them into the table in `directory`.

    `candidate` is the bundle exported from that table. Raises SettingsError if there are fewer than
    two measured utterances.
    """
    folds = OpenTable.open(directory, checkpoint.spec, found.table.checkpoint.sha256).folds
    layers = checkpoint.spec.decoder.moe_layers
    fitted = fit_routers(
        {layer: checkpoint.tensor(f"model.layers.{layer}.mlp.gate.weight") for layer in layers},
        folds.inputs,
        reference,
        candidate,
        found.corpus.measured,
        threads=settings.threads,
        seed=settings.seed,
        progress=lambda done, total: progress("fit routers", done, total),
    )
    routers = {layer: each.weight for layer, each in fitted.items() if each.weight is not None}
    agreement = RouterAgreement(
        layers=tuple(routers),
        trained=float(np.mean([each.agreement for each in fitted.values()])),
        fitted=float(np.mean([each.fitted_agreement for each in fitted.values()])),
    )
    table = replace(
        found.table,
        folded=save_folds(replace(folds, routers=routers), directory),
        calibration=replace(found.table.calibration, routers=agreement),
    )
    return replace(found, table=write_table(table, directory), routers=fitted)


def covered(
    spec: ModelSpec,
    audio_experts: Sequence[Sequence[int]],
    seen: Observation,
    settings: CalibrateSettings,
) -> Coverage:
    """How far the router's own choices reached each expert; nothing is forced yet."""
    decoder = spec.decoder
    experts = []
    for row, layer in enumerate(decoder.moe_layers):
        for expert in range(decoder.num_experts):
            own, counts = own_modality(audio_experts, row, expert), seen.counts[row, expert]
            experts.append(
                ExpertCoverage(
                    layer=layer,
                    expert=expert,
                    own=own,
                    routed=int(routed_counts(counts, own)),
                    routed_all=int(counts.sum()),
                    forced=0,
                )
            )
    return Coverage(experts=tuple(experts), floor=settings.floor, threshold=settings.threshold)


def quantise_all(
    checkpoint: Checkpoint,
    audio_experts: Sequence[Sequence[int]],
    seen: Observation,
    forms: Mapping[int, ExpertForm],
    directory: Path,
    settings: CalibrateSettings,
    progress: Progress,
) -> Quantised:
    """Write experts.bin layer by layer.

    Raises ArtifactError if a weight cannot be held.
    """
    began = time.monotonic()
    records: list[ExpertRecord] = []
    folds = Folds()
    errors: dict[int, list[float]] = {}
    input_most: dict[int, list[float]] = {}
    forced: dict[tuple[int, int], int] = {}
    layers = list(seen.tokens)
    with (directory / RECORDS).open("wb") as file:
        for number, layer in enumerate(layers):
            progress("quantise", number, len(layers))
            task = LayerTask(
                checkpoint, layer, seen.tokens[layer], audio_experts, threshold=settings.threshold
            )
            form = record_form(checkpoint.spec, forms[layer])
            own = task.folds(settings.method, form)
            folds = Folds(
                inputs={**folds.inputs, **own.inputs}, hidden={**folds.hidden, **own.hidden}
            )
            errors[layer], input_most[layer] = [], []
            try:
                for each in task.quantise(settings.method, form, own, settings.threads):
                    content = form.pack(each.weights)
                    records.append(_append(file, layer, each.expert, content, form.content_bytes))
                    errors[layer].append(each.error)
                    input_most[layer].append(each.input_most)
                    forced[layer, each.expert] = each.forced
            except ValueError as error:
                raise ArtifactError(f"layer {layer}: {error}") from error
    return Quantised(
        records=tuple(records),
        folds=folds,
        errors=errors,
        input_most=input_most,
        forced=forced,
        seconds=time.monotonic() - began,
    )


def latent_scales(seen: Observation) -> dict[int, Any]:
    """Folded scales that give every channel of the cached latent the same range: an int8 row has
    one scale, and a loud channel would leave the others few of its steps."""
    return {layer: normalised(most) for layer, most in enumerate(seen.latent_most)}


def _append(
    file: BinaryIO, layer: int, expert: int, content: Any, content_bytes: int
) -> ExpertRecord:
    offset = file.tell()
    file.write(content.data)
    crc32 = zlib.crc32(content[:content_bytes].data)
    return ExpertRecord(layer=layer, expert=expert, offset=offset, bytes=content_bytes, crc32=crc32)


def as_report(found: Findings) -> dict[str, Any]:
    """Everything of the report, ready for JSON."""
    seen, table = found.observation, found.table
    gate = table.calibration.gate
    return {
        "checkpoint": {"name": table.checkpoint.name, "sha256": table.checkpoint.sha256},
        "device": table.device,
        "method": table.calibration.method,
        "corpus": as_summary(found.corpus) | {"not_asked": seen.unusable},
        "coverage": found.coverage.as_json(),
        "tokens": {
            f"layer {e.layer} expert {e.expert}": {
                "own": e.own,
                "routed": e.routed,
                "routed_all": e.routed_all,
                "forced": e.forced,
            }
            for e in found.coverage.experts
        },
        "layers": {
            str(layer): {
                "precision": str(table.layers[str(layer)]),
                "mean_error": float(np.mean(errors)),
                "worst_error": float(np.max(errors)),
                "input_most": float(np.max(found.quantised.input_most[layer])),
                "bytes": sum(r.bytes for r in table.records if r.layer == layer),
            }
            for layer, errors in found.quantised.errors.items()
        },
        "latent_most": [float(v.max()) for v in seen.latent_most],
        "expert_bytes": sum(record.bytes for record in table.records),
        "seconds": {name: round(s, 2) for name, s in found.seconds.items()},
        "peak_resident_mb": peak_resident_mb(),
        "routers": {
            str(layer): {
                "rows": each.rows,
                "agreement": each.agreement,
                "fitted_agreement": each.fitted_agreement,
                "fitted": each.weight is not None,
            }
            for layer, each in found.routers.items()
        },
        "paging": table.calibration.paging and asdict(table.calibration.paging),
        "gate": None if gate is None else _gate_json(gate),
    }


def _gate_json(gate: Gate) -> dict[str, Any]:
    return asdict(gate) | {"passed": gate.passed, "failed": gate.failed}
