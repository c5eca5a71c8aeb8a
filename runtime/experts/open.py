"""Opens the paging of a bundle: file, pool, policy and look-ahead.

Call it after everything else is loaded, because the pool's size depends on the free memory.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import read_arrays
from deeptalk_edge.bundle.manifest import GATES
from deeptalk_edge.bundle.memory import pool_slots, slot_bytes
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.routing import ROUTING, read_routing
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.degrade import Degrade, DegradeSettings
from deeptalk_edge.runtime.experts.look_ahead import LookAhead, folded_gates
from deeptalk_edge.runtime.experts.paged import PagedExperts, float32_record
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES, UseCounts
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.experts.routes import RouteRecorder, Routes
from deeptalk_edge.runtime.experts.sizing import num_slots_of, read_memory

Array = NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingSettings:
    """Settings of paging; only `degrade` changes answers."""

    pool: str | None = None
    """Size of the pool as a number or a share of the experts; None: as many as fit."""
    policy: str = "phased"
    look_ahead: bool = True
    """Predict the next layer's experts, if the bundle has the routers for that."""
    degrade: DegradeSettings | None = None
    """None: exact. Otherwise every trade is counted."""
    pager: PagerSettings = field(default_factory=partial(PagerSettings, fills=True))


def open_pager(bundle: Bundle, settings: PagingSettings) -> ExpertPager:
    """Open a pager over the bundle's experts, for any number of sessions.

    Raises ArtifactError if a record has a wrong place, DoesNotFit if there is no memory for the
    smallest pool, SettingsError if the pool is not a size.
    """
    manifest, decoder = bundle.manifest, bundle.manifest.model.decoder
    records = manifest.experts.records
    num_bytes = max(slot_bytes(record.bytes) for record in records)
    if settings.pool is None:
        num_slots = pool_slots(
            num_records=len(records),
            slot_bytes=num_bytes,
            num_layers=len(decoder.moe_layers),
            top_k=decoder.top_k,
            available_bytes=read_memory().available_bytes,
        )
    else:
        num_slots = num_slots_of(settings.pool, len(records))
    source = RecordFile(bundle.file(manifest.experts.file))
    if source.why_buffered is not None:
        log.warning(
            "%s: read through the page cache, %s; a local disk pages faster",
            source.name,
            source.why_buffered,
        )
    log.info("%s: %d of %d experts fit the pool", source.name, num_slots, len(records))
    try:
        pool = CpuPool(num_slots=num_slots, slot_bytes=num_bytes)
    except BaseException:
        source.close()
        raise
    pager = ExpertPager(
        records,
        source,
        pool,
        POLICIES[settings.policy](len(records), decoder.num_experts, _measured(bundle)),
        settings.pager,
    )
    pager.idle()
    return pager


def paged_experts(
    bundle: Bundle, settings: PagingSettings, pager: ExpertPager | None = None
) -> PagedExperts:
    """Open one session's experts, from a shared pager or a new one.

    Raises SettingsError if the settings need the routers and the bundle lacks them.
    """
    decoder = bundle.manifest.model.decoder
    layers = decoder.moe_layers
    look_ahead = degrade = None
    gates, norms = _routers(bundle) if GATES in bundle.manifest.files else ({}, {})
    if settings.look_ahead and gates:
        look_ahead = LookAhead(folded_gates(gates, norms), decoder.top_k)
    if settings.degrade is not None:
        if settings.degrade.bonus and not gates:
            raise SettingsError(
                f"{bundle.path}: a bonus for resident experts needs {GATES}; export it again"
            )
        degrade = Degrade(settings.degrade, gates)
    return PagedExperts(
        pager or open_pager(bundle, settings),
        {layer: float32_record(bundle.manifest.record_format_of(layer)) for layer in layers},
        look_ahead=look_ahead,
        degrade=degrade,
        is_shared=pager is not None,
    )


def recorded_routes(bundle: Bundle, recorder: RouteRecorder) -> Routes:
    """Return a recorder's routes of a bundle's model, to be saved."""
    decoder, num_turns = bundle.manifest.model.decoder, len({p.turn for p in recorder.passes})
    return Routes(
        layers=tuple(decoder.moe_layers),
        num_experts=decoder.num_experts,
        top_k=decoder.top_k,
        record_bytes=bundle.manifest.experts.records[0].bytes,
        passes=recorder.passes,
        source=f"checkpoint {bundle.manifest.checkpoint.name}, {num_turns} turns",
    )


def _measured(bundle: Bundle) -> UseCounts | None:
    """Return the use counts of a calibration, if they saved reads on held-out turns.

    Raises ArtifactError if the file does not fit the model.
    """
    calibration = bundle.manifest.calibration
    if calibration is None or calibration.paging is None or not calibration.paging.used:
        return None
    routing = read_routing(bundle.file(ROUTING), bundle.manifest.model.decoder)
    listen, speak = (share.astype(np.float64) for share in (routing.listen, routing.speak))
    return UseCounts(listen, speak, routing.succession)


def _routers(bundle: Bundle) -> tuple[dict[int, Array], dict[int, Array]]:
    """The routers (E, C) and the norms before them (C,), by layer."""
    decoder, path = bundle.manifest.model.decoder, bundle.file(GATES)
    layers = decoder.moe_layers
    arrays = read_arrays(
        path,
        {
            "gates": (np.float32, (len(layers), decoder.num_experts, decoder.width)),
            "norms": (np.float32, (len(layers), decoder.width)),
        },
    )
    gates, norms = (dict(zip(layers, arrays[name], strict=True)) for name in ("gates", "norms"))
    return gates, norms
