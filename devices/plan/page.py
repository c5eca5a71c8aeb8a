"""Plans as text for the terminal: one device in full, several as a table."""

from __future__ import annotations

from collections.abc import Sequence

from deeptalk_edge.devices.plan.device import DevicePlan
from deeptalk_edge.devices.plan.times import FRAME_MS, Times

COMPUTED = "computed, not measured"


def page(plans: Sequence[DevicePlan], model: str) -> str:
    """All of them as a table; one alone in full."""
    if len(plans) == 1:
        return _whole(plans[0], model)
    first = plans[0]
    lines = [
        f"{model}: {COMPUTED}; a question of {first.question_s:g} s, "
        f"{_items(first.num_items)}, hangover {first.assumptions.hangover_ms:.0f} ms",
        f"{'device':16}{'verdict':9}{'experts':>8}{'step ms, 1 / 2 items':>22}{'encoder':>9}"
        f"{'prefill':>9}{'paging':>9}{'first sound':>12}{'voice to voice, floor':>23}  limited by",
    ]
    lines += [_row(plan) for plan in plans]
    lines += ["", *_notes(plans)]
    return "\n".join(lines)


def _row(plan: DevicePlan) -> str:
    share = plan.memory.resident_share
    memory = "-" if share is None else f"{share:.0%}{_mark(plan, 'memory')}"
    line = f"{plan.device:16}{plan.verdict:9}{memory:>8}"
    expected, floor = plan.expected, plan.floor
    if expected is None or floor is None:
        return f"{line}  {plan.why_no_times}"
    step = " / ".join(f"{expected.step_ms[items]:.1f}" for items in (1, 2))
    line += f"{step + _mark(plan, 'step'):>22}"
    for value in (expected.encoder_ms, expected.prefill_ms):
        line += f"{f'{value:.0f}' + _mark(plan, 'prefill'):>9}"
    line += f"{f'{expected.paging_ms:.0f}' + _mark(plan, 'paging'):>9}"
    mark = _mark(plan, "total")
    line += f"{f'{expected.first_sound_ms:.0f}' + mark:>12}"
    line += f"{f'{expected.voice_to_voice_ms:.0f}' + mark:>14}"
    return f"{line}{f'{floor.voice_to_voice_ms:.0f}' + mark:>9}  {expected.limited_by}"


def _whole(plan: DevicePlan, model: str) -> str:
    mode = f", power mode {plan.power_mode}" if plan.power_mode else ""
    lines = [
        f"{model} on {plan.device} ({plan.summary}{mode}): {COMPUTED}",
        "",
        f"verdict       {plan.verdict}: {plan.reason}",
    ]
    if plan.verdict == "refuses":
        lines.append(f"nearest       {plan.nearest or 'no option of ours makes it work'}")
    lines += [
        f"precision     {', '.join(f'{part} {kind}' for part, kind in plan.precision.items())}",
        f"conversation  {plan.context_rows} rows, {_items(plan.num_items)}",
        "",
        *_memory_lines(plan),
        "",
    ]
    if plan.expected is None or plan.floor is None:
        lines.append(f"times         not known: {plan.why_no_times}")
    else:
        lines += _time_lines(plan, plan.floor, plan.expected)
    return "\n".join([*lines, "", *_notes([plan])])


def _memory_lines(plan: DevicePlan) -> list[str]:
    memory = plan.memory
    lines = ["memory on the device"]
    lines += [f"  {part:22}{size / 1e6:10.1f} MB" for part, size in memory.parts.items()]
    slots = memory.min_slots if memory.slots is None else max(memory.slots, 0)
    size_mb = slots * memory.expert_bytes / 1e6
    lines.append(
        f"  {'experts':22}{size_mb:10.1f} MB   {slots} of {memory.num_experts}, at least "
        f"{memory.min_slots}, {memory.expert_bytes / 1e6:.2f} MB each"
    )
    if memory.usable:
        mark = _mark(plan, "memory")
        lines.append(f"  {'usable':22}{memory.usable.value / 1e6:10.1f} MB{mark}")
    return lines


def _time_lines(plan: DevicePlan, floor: Times, expected: Times) -> list[str]:
    lines = [f"{'':32}{'floor':>10}{'expected':>10}"]

    def line(name: str, low: float, high: float, mark: str = "", note: str = "") -> None:
        shown = f"{f'{low:.1f}' + mark:>10}{f'{high:.1f}' + mark:>10}"
        lines.append(f"  {name:30}{shown}{note}".rstrip())

    for items in (1, 2):
        speed = expected.step_ms[items] / FRAME_MS
        note = f"   {speed:.2f} of real time; limited by {expected.limit[items]}"
        if expected.stall_ms[items]:
            note += f"; {expected.stall_ms[items]:.1f} ms of it wait for experts"
        name = f"step, {_items(items)}, ms"
        line(name, floor.step_ms[items], expected.step_ms[items], _mark(plan, "step"), note)
    window = f"encoder, {plan.encoder_window} window, ms"
    line(window, floor.encoder_ms, expected.encoder_ms, _mark(plan, "prefill"))
    line("prefill, ms", floor.prefill_ms, expected.prefill_ms, _mark(plan, "prefill"))
    line("paging in prefill, ms", floor.paging_ms, expected.paging_ms, _mark(plan, "paging"))
    line("codec, a frame, ms", floor.codec_ms, expected.codec_ms, _mark(plan, "prefill"))
    mark = _mark(plan, "total")
    line("first sound, ms", floor.first_sound_ms, expected.first_sound_ms, mark)
    note = f"   {plan.question_s:g} s of question; limited by {expected.limited_by}"
    line("voice to voice, ms", floor.voice_to_voice_ms, expected.voice_to_voice_ms, mark, note)
    return lines


def _notes(plans: Sequence[DevicePlan]) -> list[str]:
    """What the figures assume, and which facts are not confirmed."""
    assumed = plans[0].assumptions
    lines = [
        "floor: full memory rate, 80 % of the peak, no paging. expected: "
        f"{assumed.step_efficiency:.0%} of the memory's rate in steps, "
        f"{assumed.product_efficiency:.0%} of the peak in encoder and prefill, "
        f"{assumed.prefill_memory_efficiency:.0%} of the memory's rate there, "
        + ("" if assumed.reads_hide else "reads and products of many rows add up, ")
        + "experts as in `routes replay synthetic:mid`, all missing ones read once in prefill",
    ]
    for plan in plans:
        if plan.unconfirmed:
            names = dict.fromkeys(name for group in plan.unconfirmed.values() for name in group)
            lines.append(f"? {plan.device}: on unconfirmed facts: {', '.join(names)}")
        if plan.verdict == "refuses" and len(plans) > 1:
            lines.append(f"{plan.device} refuses: {plan.reason}; nearest: {plan.nearest or 'none'}")
    return lines


def _mark(plan: DevicePlan, group: str) -> str:
    return "?" if group in plan.unconfirmed else ""


def _items(num_items: int) -> str:
    return "one item" if num_items == 1 else f"{num_items} items"
