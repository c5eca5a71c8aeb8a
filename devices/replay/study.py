"""What a recording would be like on a device: the simulator's tables.

Every time in here is simulated. The devices' figures are estimates from their memory bandwidth, see
docs/paging.md; the hits, misses and bytes are what the pager itself would count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.devices.replay.locality import profile_of
from deeptalk_edge.devices.replay.simulator import (
    Device,
    ReplaySettings,
    Timing,
    replay,
    simulate,
)
from deeptalk_edge.devices.replay.synthetic import PRESETS, DialogueShape, synthetic_routes
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.policy import POLICIES, Policy, Profile
from deeptalk_edge.runtime.experts.residency import Cause
from deeptalk_edge.runtime.experts.routes import Routes
from deeptalk_edge.runtime.experts.sizing import num_slots_of

_STEP_BUDGET_MS = 2048 / 24  # one SNAC frame of 24 kHz sound
_PAGE_CACHE_LINK = (
    0.35  # of a disk's rate through the page cache. Source: llama.cpp#29130 and others
)

_INT4, _INT8 = 4_595_712, 8_700_000

_NANO = Device(
    pool_bytes=3_200_000_000,
    record_bytes=_INT4,
    link_gbps=3.0,
    attention_ms=0.40,
    experts_ms=0.65,
    fixed_ms=6.5,
    prefill_row_ms=0.031,
    prefill_expert_ms=0.070,
)
_NX = replace(
    _NANO,
    pool_bytes=10_000_000_000,
    record_bytes=_INT8,
    experts_ms=1.14,
    prefill_row_ms=0.023,
    prefill_expert_ms=0.130,
)
_LAPTOP = replace(
    _NANO,
    pool_bytes=3_000_000_000,
    experts_ms=1.15,
    fixed_ms=10.0,
    prefill_row_ms=0.370,
    prefill_expert_ms=0.130,
)
_RTX_4060 = Device(
    pool_bytes=5_000_000_000,
    record_bytes=_INT4,
    link_gbps=12.0,
    attention_ms=0.17,
    experts_ms=0.25,
    fixed_ms=2.5,
    prefill_row_ms=0.0075,
    prefill_expert_ms=0.024,
    is_disk=False,
)

DEVICES = {
    "orin-nano-8gb-int4-nvme-1": replace(_NANO, link_gbps=1.0),
    "orin-nano-8gb-int4-nvme-2": replace(_NANO, link_gbps=2.0),
    "orin-nano-8gb-int4-nvme-3": _NANO,
    "orin-nx-16gb-int8-nvme-3": _NX,
    "laptop-8gb-int4-nvme-3": _LAPTOP,
    "rtx-4060-8gb-int4-pcie-12": _RTX_4060,
    "rtx-4060-8gb-int8-pcie-12": replace(
        _RTX_4060, record_bytes=_INT8, experts_ms=0.43, prefill_expert_ms=0.046
    ),
}
"""Name, with GB/s of the link to the experts at its end, to estimates for 26 routing layers."""


def open_routes(name: str) -> Routes:
    """A recording, or `synthetic:PRESET[:WALL]` at DeepSeek-V2-Lite's size.

    Raises ArtifactError if the file is no recording, SettingsError if there is no such preset.
    """
    if not name.startswith("synthetic"):
        return Routes.load(Path(name))
    _, preset, wall = (*name.split(":"), "", "")[:3]
    if preset not in PRESETS:
        raise SettingsError(f"{name}: expected synthetic:PRESET, one of {', '.join(PRESETS)}")
    shape = DialogueShape()
    if wall:
        try:
            shape = replace(shape, wall=float(wall))
        except ValueError:
            raise SettingsError(f"{name}: the wall {wall!r} is no number") from None
    return synthetic_routes(preset, shape)


def replays(
    routes: Routes,
    pools: Sequence[str] | None,
    policies: Sequence[str],
    *,
    profile: Routes | None = None,
    device: str | None = None,
    guesses: bool = True,
) -> list[dict[str, Any]]:
    """One row per pool and policy; with a device, its times, and the page cache beside them.

    Raises SettingsError if a pool, policy or device is unknown.
    """
    if unknown := [name for name in policies if name not in POLICIES]:
        raise SettingsError(f"policy {unknown[0]!r}: expected one of {', '.join(POLICIES)}")
    if device is not None and device not in DEVICES:
        raise SettingsError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    num_records = len(routes.layers) * routes.num_experts
    if pools is None and device is not None:
        room = DEVICES[device].pool_bytes // DEVICES[device].record_bytes
        pools = [str(min(room, num_records))]
    counts = None if profile is None else profile_of(profile)
    rows = []
    for pool in pools or ("25%", "42%", "65%", "100%"):
        plain = ReplaySettings(
            num_slots=num_slots_of(pool, num_records), look_ahead=False, sweep_share=0.0
        )
        if device is not None and DEVICES[device].is_disk:
            estimate = DEVICES[device]
            cached = replace(estimate, link_gbps=estimate.link_gbps * _PAGE_CACHE_LINK)
            rows.append(_row(routes, "lru", plain, None, cached) | {"policy": "page cache"})
        for policy in policies:
            if guesses:
                kinds = [plain, replace(plain, look_ahead=True, sweep_share=0.7)]
            else:
                kinds = [plain]
            for settings in kinds:
                estimated = DEVICES[device] if device is not None else None
                rows.append(_row(routes, policy, settings, counts, estimated))
    return rows


def _row(
    routes: Routes,
    policy: str,
    settings: ReplaySettings,
    profile: Profile | None,
    device: Device | None,
) -> dict[str, Any]:
    def make(num_keys: int, num_experts: int) -> Policy:
        return POLICIES[policy](num_keys, num_experts, profile)

    timing: Timing | None = None
    if device is None:
        residency = replay(routes, make, settings)
    else:
        residency, timing = simulate(routes, make, settings, device)
    record_bytes = routes.record_bytes if device is None else device.record_bytes
    hits, misses = int(residency.hits.sum()), int(residency.misses.sum())
    row: dict[str, Any] = {
        "slots": settings.num_slots,
        "policy": policy + (" + guesses" if settings.look_ahead else ""),
        "hits": hits,
        "misses": misses,
        "hit_share": hits / (hits + misses) if hits + misses else None,
        "demand_bytes": residency.num_loads[Cause.DEMAND] * record_bytes,
        "hint_bytes": residency.num_loads[Cause.HINT] * record_bytes,
        "sweep_bytes": residency.num_loads[Cause.SWEEP] * record_bytes,
        "guesses_used": residency.num_used,
    }
    if timing is not None and timing.step_ms:
        steps = np.array(timing.step_ms)
        row["simulated"] = {
            "step_ms": float(steps.mean()),
            "step_ms_p95": float(np.percentile(steps, 95)),
            "stall_ms_per_step": float(np.mean(timing.stall_ms)),
            "over_budget_share": float((steps > _STEP_BUDGET_MS).mean()),
            "first_audio_ms": float(np.median(timing.first_audio_ms[1:] or np.nan)),
            "cold_first_audio_ms": timing.first_audio_ms[0] if timing.first_audio_ms else None,
            "link_use": timing.link_busy_ms / timing.total_ms,
        }
    return row
