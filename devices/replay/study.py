"""What a recording would be like on a device: the simulator's tables.

Every time in here is simulated. The devices' figures are the `[paging]` estimates of their
profiles; the hits, misses and bytes are what the pager itself would count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.devices.profile import DeviceProfile, load_profile, profile_names
from deeptalk_edge.devices.replay.locality import use_counts_of
from deeptalk_edge.devices.replay.simulator import (
    ReplaySettings,
    SimulatedDevice,
    Timing,
    replay,
    simulate,
)
from deeptalk_edge.devices.replay.synthetic import PRESETS, DialogueShape, synthetic_routes
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.policy import POLICIES, Policy, UseCounts
from deeptalk_edge.runtime.experts.residency import Cause
from deeptalk_edge.runtime.experts.routes import Routes
from deeptalk_edge.runtime.experts.sizing import num_slots_of

_STEP_BUDGET_MS = 2048 / 24  # one SNAC frame of 24 kHz sound
_PAGE_CACHE_LINK = (
    0.35  # of a disk's rate through the page cache. Source: llama.cpp#29130 and others
)


def device_of(
    profile: DeviceProfile, *, experts: str | None = None, link_gb_per_s: float | None = None
) -> SimulatedDevice:
    """What the simulator needs of a profile: its usual link and the precision that it is exported
    with, or the first that it has estimates for, unless others are named.

    Raises SettingsError if the profile has no such estimates.
    """
    if profile.paging is None:
        known = ", ".join(name for name in profile_names() if load_profile(name).paging)
        raise SettingsError(
            f"device {profile.name} has no [paging] estimates; those that do: {known}"
        )
    paging, own = profile.paging, profile.precision.experts
    chosen = experts or (own if own in paging.experts else next(iter(paging.experts)))
    if chosen not in paging.experts:
        raise SettingsError(
            f"device {profile.name}: no [paging] estimates for experts in {chosen}, only in "
            f"{', '.join(paging.experts)}"
        )
    costs = paging.experts[chosen]
    return SimulatedDevice(
        pool_bytes=paging.pool_bytes,
        record_bytes=costs.record_bytes,
        link_gbps=paging.link_gb_per_s[-1] if link_gb_per_s is None else link_gb_per_s,
        attention_ms=paging.attention_ms,
        experts_ms=costs.decode_ms,
        fixed_ms=paging.fixed_ms,
        prefill_row_ms=paging.prefill_row_ms,
        prefill_expert_ms=costs.prefill_ms,
        is_disk=paging.link == "disk",
    )


def simulated_devices() -> dict[str, SimulatedDevice]:
    """Every profile with estimates, in each precision and over each link that it names."""
    profiles = [load_profile(name) for name in profile_names()]
    return {
        f"{profile.name} {experts} {rate:g} GB/s": device_of(
            profile, experts=experts, link_gb_per_s=rate
        )
        for profile in profiles
        if profile.paging
        for experts in profile.paging.experts
        for rate in profile.paging.link_gb_per_s
    }


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
    device: SimulatedDevice | None = None,
    guesses: bool = True,
) -> list[dict[str, Any]]:
    """One row per pool and policy; with a device, its times, and the page cache beside them.

    Raises SettingsError if a pool or policy is unknown.
    """
    if unknown := [name for name in policies if name not in POLICIES]:
        raise SettingsError(f"policy {unknown[0]!r}: expected one of {', '.join(POLICIES)}")
    num_records = len(routes.layers) * routes.num_experts
    if pools is None and device is not None:
        pools = [str(min(device.pool_bytes // device.record_bytes, num_records))]
    counts = None if profile is None else use_counts_of(profile)
    rows = []
    for pool in pools or ("25%", "42%", "65%", "100%"):
        plain = ReplaySettings(
            num_slots=num_slots_of(pool, num_records), look_ahead=False, sweep_share=0.0
        )
        if device is not None and device.is_disk:
            cached = replace(device, link_gbps=device.link_gbps * _PAGE_CACHE_LINK)
            rows.append(_row(routes, "lru", plain, None, cached) | {"policy": "page cache"})
        for policy in policies:
            if guesses:
                kinds = [plain, replace(plain, look_ahead=True, sweep_share=0.7)]
            else:
                kinds = [plain]
            for settings in kinds:
                rows.append(_row(routes, policy, settings, counts, device))
    return rows


def _row(
    routes: Routes,
    policy: str,
    settings: ReplaySettings,
    counts: UseCounts | None,
    device: SimulatedDevice | None,
) -> dict[str, Any]:
    def make(num_keys: int, num_experts: int) -> Policy:
        return POLICIES[policy](num_keys, num_experts, counts)

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
