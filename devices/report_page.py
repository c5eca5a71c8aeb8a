"""A report as tables for a terminal: by `rich` where it is installed, else plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deeptalk_edge.devices.report import Distribution, Report, State

_NAMES = {
    "v2v_ms": "voice to voice, ms",
    "ttfa_ms": "  turn's end to first sound, ms",
    "eot_hangover_ms": "  hangover, ms",
    "rtf": "compute per second of sound",
    "heard_s": "heard of an answer, s",
    "barge_in_stop_ms": "stop after an interruption, ms",
    "encoder_ms": "encoder, ms",
    "prefill_ms": "prefill, ms",
    "first_frame_ms": "question to first frame, ms",
    "first_sample_ms": "question to first sample, ms",
    "step_ms_p50": "step, median of a turn, ms",
}
_COLUMNS = ("n", "p50", "p90", "p95", "p99", "max")


def page(report: Report) -> str:
    """Everything that a person asks first; the JSON has the rest."""
    lines = [*_head(report), ""]
    lines.append(_table("measured by voice", report.metrics))
    lines.append(_table("stages of the compute", report.stages))
    lines += _foot(report)
    return "\n".join(lines)


def _head(report: Report) -> list[str]:
    device, bundle, work = report.device, report.bundle, report.workload
    backend = bundle.kernel_path or "ONNX Runtime"
    cut = "to their end" if work.cut_s is None else f"cut after {work.cut_s:g} s"
    return [
        f"machine     {device.gpu or device.model or device.processor}, {device.processor}, "
        f"{device.num_cores} cores; profile {device.profile}",
        f"bundle      {bundle.path}, SHA-256 {bundle.sha256[:12]}",
        f"backend     {bundle.backend}, {backend}, {bundle.threads} thread(s), {bundle.mode}",
        "precision   " + ", ".join(f"{part} {kind}" for part, kind in bundle.precision.items()),
        f"turns       {work.turns} counted, {work.warmup_turns} before, {work.port}, answers {cut}",
        f"at start    {_state(report.state_start)}",
        f"at end      {_state(report.state_end)}",
    ]


def _state(state: State) -> str:
    def shown(name: str, value: float | str | None, unit: str = "") -> str:
        if value is None:
            return f"{name} -"
        return f"{name} {value:.0f}{unit}" if isinstance(value, float) else f"{name} {value}{unit}"

    return ", ".join(
        (
            shown("mode", state.power_mode),
            shown("governor", state.governor),
            shown("cpu", state.cpu_mhz, " MHz"),
            shown("gpu", state.gpu_mhz, " MHz"),
            shown("hottest", state.hottest_c, " C"),
            shown("throttled", state.throttled),
        )
    )


def _table(title: str, figures: Mapping[str, Distribution]) -> str:
    rows = [
        (_NAMES.get(name, name), *(_cell(getattr(one, column)) for column in _COLUMNS))
        for name, one in figures.items()
    ]
    return _rich(title, rows) or _plain(title, rows)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        str(value) if isinstance(value, int) else f"{value:.3g}" if value < 10 else f"{value:.0f}"
    )


def _plain(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"{title:36}" + "".join(f"{name:>9}" for name in _COLUMNS)]
    lines += [f"{row[0]:36}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    return "\n".join(lines) + "\n"


def _rich(title: str, rows: Sequence[Sequence[str]]) -> str | None:
    """None where the package is missing or stdout is no terminal."""
    import sys

    if not (sys.stdout and sys.stdout.isatty()):
        return None
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return None
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _foot(report: Report) -> list[str]:
    experts, power, memory = report.experts, report.power, report.memory
    parts = ", ".join(f"{name} {size:.0f}" for name, size in memory.parts_mb.items())
    lines = [
        f"underruns   {report.underruns}; failed turns {report.failed_turns}",
        f"memory      {_number(memory.peak_resident_mb)} MB at its peak, "
        f"{_number(memory.before_mb)} before; computed, MB: {parts}",
    ]
    if experts.hit_share is None:
        lines.append(f"experts     {experts.why}")
    else:
        lines.append(
            f"experts     {experts.hit_share:.1%} hits, {(experts.loaded_bytes or 0) / 1e6:.0f} MB "
            f"read, {experts.stall_ms or 0:.0f} ms waited, {experts.slots} slots"
        )
    energy = power.energy_j_per_turn
    if power.mean_w is None or energy is None:
        lines.append(f"power       not known: {power.why}")
    else:
        lines.append(
            f"power       {power.mean_w:.1f} W, {_number(energy.p50)} J a turn ({power.method})"
        )
    return [*lines, *(f"warning     {warning}" for warning in report.warnings)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
