"""A report as one HTML file that loads nothing else: no script, no font, no image, no network.

A content security policy in the page forbids what this module does not write. Numbers are text in
tables; colours repeat them for the eye and are never the only sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import log2

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7d4f; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.heat td { text-align: center; border: 1px solid var(--line); min-width: 2.6rem; color: #111; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True, slots=True)
class Markup:
    """HTML that is safe to write as it is."""

    html: str


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter plot."""

    x: float
    y: float
    label: str


def page(title: str, parts: Iterable[Markup]) -> str:
    """A whole page."""
    body = "\n".join(part.html for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def section(title: str, *parts: Markup) -> Markup:
    """A heading and what is below it."""
    return Markup(f"<h2>{escape(title)}</h2>\n" + "\n".join(part.html for part in parts))


def text(content: str) -> Markup:
    """A paragraph."""
    return Markup(f"<p>{escape(content)}</p>")


def verdict(content: str, *, good: bool) -> Markup:
    """A paragraph that says whether something passed."""
    return Markup(f'<p class="{"good" if good else "bad"}">{escape(content)}</p>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A plain table; numbers are shown with four digits."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(shown(cell))}</td>" for cell in row) for row in rows]
    return Markup(_wide("".join(f"<tr>{line}</tr>\n" for line in lines)))


def heat_map(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    low: float,
    marked: Iterable[tuple[int, int]] = (),
) -> Markup:
    """Numbers with a colour by their logarithm: red at `low` and below, green from 16 times that.

    `marked` are (row, column) whose number gets a star.
    """
    stars = set(marked)
    lines = ["<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)]
    for number, (name, values) in enumerate(rows):
        cells = "".join(
            f'<td style="background:{_colour(value, low)}">{shown(value)}'
            f"{'*' if (number, place) in stars else ''}</td>"
            for place, value in enumerate(values)
        )
        lines.append(f"<th>{escape(name)}</th>{cells}")
    return Markup(_wide("".join(f"<tr>{line}</tr>\n" for line in lines), "heat"))


def scatter(points: Sequence[Point], x_name: str, y_name: str) -> Markup:
    """Points with their labels on linear axes from zero."""
    width, height, left, bottom = 640, 300, 60, 40
    most_x = max((p.x for p in points), default=1.0) * 1.1 or 1.0
    most_y = max((p.y for p in points), default=1.0) * 1.1 or 1.0
    marks = [
        f'<path d="M{left} 10V{height - bottom}H{width - 10}" fill="none" stroke="currentColor"/>',
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end" font-size="12" '
        f'fill="currentColor">{escape(x_name)}, to {shown(most_x)}</text>',
        f'<text x="{left + 6}" y="20" font-size="12" fill="currentColor">{escape(y_name)}, to '
        f"{shown(most_y)}</text>",
    ]
    for point in points:
        x = left + point.x / most_x * (width - left - 10)
        y = height - bottom - point.y / most_y * (height - bottom - 10)
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#3b6fb6"/><text x="{x + 7:.1f}" '
            f'y="{y + 4:.1f}" font-size="11" fill="currentColor">{escape(point.label)}</text>'
        )
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_name)} by '
        f'{escape(x_name)}">{"".join(marks)}</svg>'
    )


def shown(value: object) -> str:
    """A cell's text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _colour(value: float, low: float) -> str:
    """From red (0) over yellow to green (1)."""
    share = 0.0 if value <= 0 else min(max(log2(max(value / max(low, 1e-9), 1.0)) / 4, 0.0), 1.0)
    return f"hsl({int(130 * share)} 65% 72%)"


def _wide(rows: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{named}>\n{rows}</table></div>'
