"""An export plan as text for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from deeptalk_edge.export.dry_run.files import PlannedFile
from deeptalk_edge.export.dry_run.forecast import ExportPlan
from deeptalk_edge.export.dry_run.steps import PlannedStep


def plan_page(plan: ExportPlan, checkpoint: Path) -> str:
    """A plan for a person."""
    memory = plan.memory
    lines = [
        f"{checkpoint} for {plan.device}, nothing written yet",
        "",
        f"backend       {plan.backend}{' for ' + ', '.join(plan.targets) if plan.targets else ''}",
        f"experts       {plan.moe}, {plan.residency}",
        f"precision     {', '.join(f'{part} {kind}' for part, kind in plan.precision.items())}",
        "",
        f"files in the bundle{'':19}(~ rounded up)",
    ]
    lines += _files(plan.files)
    lines += [f"  {'total':23}{plan.total_bytes / 1e6:10.1f} MB", "", "memory on the device"]
    lines += [f"  {part:23}{size / 1e6:10.1f} MB" for part, size in memory.parts.items()]
    lines += [
        f"  {'experts':23}{memory.min_slots * memory.expert_bytes / 1e6:10.1f} MB"
        f"   {memory.min_slots} of {memory.num_experts} at least, "
        f"{memory.expert_bytes / 1e6:.2f} MB each",
        f"  {'needed':23}{memory.needed_bytes / 1e6:10.1f} MB   for {plan.context_rows} rows of "
        "conversation, answers in batch-parallel mode",
        f"  {_verdict(plan)}",
        "",
        *_steps(plan.steps),
        "the export itself, estimated",
        f"  GB of memory {plan.build_memory_bytes.spelled(1e9)}: {plan.build_memory_bytes.basis}",
        f"  minutes {plan.build_minutes.spelled(1)}: {plan.build_minutes.basis}",
    ]
    return "\n".join(lines)


def _files(files: Iterable[PlannedFile]) -> list[str]:
    """One line for each file; segments of one size share theirs."""
    alike: dict[tuple[str, int, bool], list[str]] = {}
    for file in files:
        stem = re.sub(r"_\d\d", "", file.name)
        alike.setdefault((stem, file.bytes, file.is_exact), []).append(file.name)
    return [
        f"  {names[0]:20}{'' if is_exact else '~':>3}{size / 1e6:10.1f} MB"
        + (f" each, to {names[-1]}" if len(names) > 1 else "")
        for (_, size, is_exact), names in alike.items()
    ]


def _steps(steps: Iterable[PlannedStep]) -> list[str]:
    """One line for each profile of the step's engine."""
    lines = [
        f"  {step.profile:20}{step.num_items:3} item{'s' if step.num_items > 1 else ' '}"
        f"{step.bytes / 1e9:8.2f} GB"
        + ("" if step.kernels is None else f"{step.kernels:8} kernels")
        + ("" if step.floor_ms is None else f"{step.floor_ms:9.2f} ms at least")
        for step in steps
    ]
    title = "a pass of the language model's engine, computed from sizes; none was measured"
    return [title, *lines, ""] if lines else []


def _verdict(plan: ExportPlan) -> str:
    memory = plan.memory
    if memory.usable is None or memory.slots is None:
        return f"fit: not known, the profile {plan.device} states no memory"
    usable = f"{memory.usable.value / 1e6:.1f} MB are usable ({memory.usable.source})"
    if not memory.fits:
        short_mb = (memory.needed_bytes - memory.usable.value) / 1e6
        return f"fit: NO, {short_mb:.1f} MB short; {usable}"
    share = memory.slots / memory.num_experts
    return f"fit: yes, with {memory.slots} experts in memory ({share:.0%}); {usable}"
