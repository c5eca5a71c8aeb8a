"""The report of a calibration as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deeptalk_edge.bundle.calibration import Gate
from deeptalk_edge.calibration.calibrate import Findings
from deeptalk_edge.calibration.coverage import ExpertCoverage
from deeptalk_edge.calibration.observe import PHASES
from deeptalk_edge.report.page import (
    Markup,
    Point,
    heat_map,
    page,
    scatter,
    section,
    table,
    text,
    verdict,
)
from deeptalk_edge.runtime.experts.routes import Modality


def report_page(found: Findings, content: Mapping[str, Any]) -> str:
    """The page; `content` is what report.json holds."""
    calibration = found.table.calibration
    parts = [
        text(
            f"Checkpoint {found.table.checkpoint.name} ({found.table.checkpoint.sha256[:12]}), "
            f"device {found.table.device}, method {calibration.method}; "
            f"{calibration.utterances} utterances measured from {calibration.corpus}."
        ),
        _gate(calibration.gate),
        _coverage(found),
        _errors(content),
        _routers(content["routers"]),
        _sizes(found, content),
        _corpus(content["corpus"]),
    ]
    return page(f"Calibration of {found.table.checkpoint.name}", parts)


def _gate(gate: Gate | None) -> Markup:
    if gate is None:
        return section("Accuracy gate", text("Not run."))
    said = (
        f"Passed on {gate.utterances} utterances held out, {gate.rows} rows, by backend "
        f"{gate.backend}."
        if gate.passed
        else f"Failed: {', '.join(gate.failed)}."
    )
    rows = []
    for name, measure in gate.measures.items():
        low, high = measure.interval or (None, None)
        limit = None
        if measure.limit is not None:
            limit = f"{'at most' if measure.most else 'at least'} {measure.limit:g}"
        rows.append((name.replace("_", " "), measure.value, low, high, limit, measure.reason))
    head = ("figure", "value", "95 % from", "to", "limit", "why not measured")
    return section("Accuracy gate", verdict(said, good=gate.passed), table(head, rows))


def _coverage(found: Findings) -> Markup:
    coverage = found.coverage
    layers = list(found.quantised.errors)
    experts = sorted({e.expert for e in coverage.experts})
    by_place = {(e.layer, e.expert): e for e in coverage.experts}
    columns = [str(expert) for expert in experts]

    def row(layer: int, value_of: Any) -> tuple[str, Sequence[float]]:
        return f"layer {layer}", [value_of(by_place[layer, expert]) for expert in experts]

    marked = [
        (number, place)
        for number, layer in enumerate(layers)
        for place, expert in enumerate(experts)
        if by_place[layer, expert].forced
    ]
    parts = [
        text(
            "Routed tokens of each expert's own modality, by layer and expert. Red: at the floor "
            f"of {coverage.floor} or below. A star: topped up to {coverage.threshold} with forced "
            "tokens, which count for no floor."
        ),
        heat_map(
            columns,
            [row(layer, lambda e: e.routed) for layer in layers],
            low=max(coverage.floor, 1),
            marked=marked,
        ),
        text("All tokens by modality and phase:"),
        _counts(found, layers, experts),
    ]
    if coverage.forced:
        head = ("expert", "own modality", "routed", "of all modalities", "forced")
        parts.append(table(head, [_forced(each) for each in coverage.forced]))
    return section("Coverage", *parts)


def _counts(found: Findings, layers: Sequence[int], experts: Sequence[int]) -> Markup:
    rows = []
    for row, layer in enumerate(layers):
        for kind in Modality:
            for place, phase in enumerate(PHASES):
                values = found.observation.counts[row, :, kind, place]
                if values.any():
                    name = f"{layer} {kind.name.lower()} {phase.value}"
                    rows.append((name, *(int(v) for v in values)))
    return table(("layer, modality, phase", *map(str, experts)), rows)


def _forced(each: ExpertCoverage) -> tuple[object, ...]:
    name = f"layer {each.layer} expert {each.expert}"
    return name, each.own, each.routed, each.routed_all, each.forced


def _errors(content: Mapping[str, Any]) -> Markup:
    rows = [
        (f"layer {layer}", e["precision"], e["mean_error"], e["worst_error"], e["input_most"])
        for layer, e in content["layers"].items()
    ]
    return section(
        "Error and ranges by layer",
        text("Relative error of the experts' outputs on their own tokens; greatest |input|."),
        table(("layer", "precision", "mean error", "worst expert", "greatest input"), rows),
    )


def _routers(layers: Mapping[str, Any]) -> Markup:
    title = "Routers"
    if not layers:
        return section(title, text("Not fitted; `calibrate --fit-routers` does."))
    rows = [
        (
            f"layer {layer}",
            e["rows"],
            e["agreement"],
            e["fitted_agreement"],
            "fitted" if e["fitted"] else "trained",
        )
        for layer, e in layers.items()
    ]
    return section(
        title,
        text("Share of the float model's choices, on utterances that the fit left out."),
        table(("layer", "rows", "trained router", "exported router", "exported is"), rows),
    )


def _sizes(found: Findings, content: Mapping[str, Any]) -> Markup:
    points = [
        Point(e["bytes"] / 1e6, e["mean_error"], f"layer {layer} {e['precision']}")
        for layer, e in content["layers"].items()
    ]
    total = content["expert_bytes"] / 1e6
    return section(
        "Size against accuracy",
        text(f"Routed experts take {total:.1f} MB."),
        scatter(points, "MB of a layer's experts", "mean error"),
    )


def _corpus(corpus: Mapping[str, Any]) -> Markup:
    parts = [table(("stratum", "utterances"), list(corpus["strata"].items()))]
    refused = corpus["refused"] | corpus["not_asked"]
    if refused:
        parts.append(table(("could not be used", "why"), list(refused.items())))
    return section("Corpus", *parts)
