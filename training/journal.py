"""What a run says of itself: a JSONL file, TensorBoard if asked, and one HTML page.

step        losses of each stream, rate, gradient norm, samples a second
router      of each MoE layer and modality: load, entropy, dead experts
evaluation  the score and its parts
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import write_file
from deeptalk_edge.report.page import Markup, heat_map, page, section, table, text
from deeptalk_edge.training.expert_split import ExpertLoads

JOURNAL = "journal.jsonl"
REPORT = "report.html"


class Journal:
    """Appends to a run's journal; a resumed run goes on in the same file."""

    def __init__(self, directory: Path, *, tensorboard: bool = False) -> None:
        """Raises SettingsError if TensorBoard is wanted and not installed."""
        self._path = directory / JOURNAL
        self._writer = _open_tensorboard(directory) if tensorboard else None

    def resume(self, num_done: int) -> None:
        """Drop the lines of steps that a killed run did after its last checkpoint: they are done
        again."""
        if self._path.is_file():
            kept = [entry for entry in read_journal(self._path) if entry["step"] <= num_done]
            write_file(self._path, "".join(json.dumps(e) + "\n" for e in kept).encode())

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Write one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in _scalars(kind, values):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a kill may have cut the last one."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def past_scores(directory: Path, num_done: int) -> list[float]:
    """The scores of a run's evaluations in its first steps."""
    path = directory / JOURNAL
    entries = read_journal(path) if path.is_file() else []
    judged = [e for e in entries if e["kind"] == "evaluation" and e["step"] <= num_done]
    return [entry["score"] for entry in judged]


def router_facts(loads: ExpertLoads) -> list[dict[str, Any]]:
    """Of each MoE layer and modality: the load of every expert, the entropy of the loads as a share
    of the most there can be, and the experts that get nothing."""
    facts = []
    for modality, shares in loads.shares_by_modality().items():
        for layer, load in enumerate(shares):
            facts.append(
                {
                    "modality": modality,
                    "layer": layer,
                    "load": [round(x, 4) for x in load.tolist()],
                    "entropy": round(_entropy(load), 4),
                    "dead": torch.nonzero(load == 0).flatten().tolist(),
                }
            )
    return facts


def _entropy(load: Tensor) -> float:
    positive = load[load > 0]
    return float(-(positive * positive.log()).sum()) / math.log(len(load))


def _scalars(kind: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(f"{kind}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{kind}/{name}", float(value)))
    return found


def _open_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "tensorboard = true needs TensorBoard: pip install 'deeptalk-edge[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory / "tensorboard"))


# The page -----------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 560, 160
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def write_report(directory: Path, title: str) -> None:
    """Draw the journal as one page without scripts or links.

    Raises DoesNotFit if the disk is full.
    """
    entries = read_journal(directory / JOURNAL)
    steps = [e for e in entries if e["kind"] == "step"]
    judged = [e for e in entries if e["kind"] == "evaluation"]
    routers = [e for e in entries if e["kind"] == "router"]
    names = dict.fromkeys(name for e in steps for name in e["losses"])
    lines = {n: [(e["step"], e["losses"].get(n)) for e in steps] for n in names}
    parts = [section("Losses", line_chart(lines))]
    if judged:
        scores = {"score": [(e["step"], e["score"]) for e in judged]}
        parts.append(section("Evaluation", line_chart(scores)))
    if steps:
        rates = {"samples a second": [(e["step"], e["samples_per_s"]) for e in steps]}
        parts.append(section("Speed", line_chart(rates)))
    if routers:
        parts.append(section("Routers", *router_tables(routers[-1]["facts"])))
    write_file(directory / REPORT, page(title, parts).encode())


def line_chart(lines: Mapping[str, Sequence[tuple[float, float | None]]]) -> Markup:
    """Some lines over steps, as SVG; what is no number is left out."""
    kept = {
        name: [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
        for name, points in lines.items()
    }
    everything = [point for points in kept.values() for point in points]
    if not everything:
        return text("nothing yet")
    last = max(x for x, _ in everything) or 1
    low, high = min(0.0, *(y for _, y in everything)), max(y for _, y in everything)
    span = (high - low) or 1.0
    drawn = []
    for i, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(
            f"{x / last * _WIDTH:.1f},{_HEIGHT - (y - low) / span * _HEIGHT:.1f}" for x, y in points
        )
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        drawn.append(
            f'<text x="{_WIDTH + 8}" y="{14 + 16 * i}" fill="{colour}" font-size="12">'
            f"{escape(name)} {points[-1][1] if points else ''!s:.6}</text>"
        )
    size = f'width="{_WIDTH + 180}" height="{max(_HEIGHT, 16 * len(kept)) + 4}"'
    ends = f"0 to step {last:g}; {low:.4g} to {high:.4g}"
    return Markup(f"<svg {size}>{''.join(drawn)}</svg><p>{ends}</p>")


def router_tables(
    facts: Sequence[Mapping[str, Any]], split: Sequence[Sequence[int]] | None = None
) -> list[Markup]:
    """Loads of every layer and modality as a heat map, a split's audio experts starred; entropy and
    dead experts as a table."""
    names = [f"{fact['modality']}, MoE layer {fact['layer']}" for fact in facts]
    num_experts = len(facts[0]["load"])
    marked = [
        (row, expert)
        for row, fact in enumerate(facts)
        for expert in (split[fact["layer"]] if split else ())
    ]
    rows = [(name, fact["load"]) for name, fact in zip(names, facts, strict=True)]
    said = [
        (name, fact["entropy"], ", ".join(map(str, fact["dead"])) or "none")
        for name, fact in zip(names, facts, strict=True)
    ]
    return [
        heat_map([str(i) for i in range(num_experts)], rows, low=0.25 / num_experts, marked=marked),
        table(("", "entropy of the loads", "dead experts"), said),
    ]
