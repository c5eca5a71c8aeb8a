"""Several plans as one picture: a bar a device, from the end of speech to the answer's first sound.

SVG, written here: no library is needed on the device. It says that it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deeptalk_edge.devices.plan.device import DevicePlan
from deeptalk_edge.devices.plan.times import Times

_COLOURS = {
    "hangover": "#9aa0a6",
    "encoder": "#1f77b4",
    "prefill": "#2ca02c",
    "paging": "#d62728",
    "steps": "#ff7f0e",
}
_LEFT, _WIDTH, _ROW, _TOP = 150, 900, 26, 64


def svg(plans: Sequence[DevicePlan], model: str) -> str:
    """A whole SVG document."""
    timed = [(plan, plan.expected) for plan in plans if plan.expected]
    longest_ms = max((expected.voice_to_voice_ms for _, expected in timed), default=1.0)
    scale = (_WIDTH - _LEFT - 110) / longest_ms
    height = _TOP + _ROW * len(plans) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="20">{escape(model)}: voice to voice, ms; computed, not measured</text>',
        *_legend(),
    ]
    for place, plan in enumerate(plans):
        y = _TOP + place * _ROW
        parts.append(f'<text x="8" y="{y + 15}">{escape(plan.device)}</text>')
        if plan.expected is None or plan.verdict == "refuses":
            parts.append(f'<text x="{_LEFT}" y="{y + 15}" fill="#666">{escape(_why(plan))}</text>')
        else:
            parts += _bar(plan.expected, y, scale, is_unsure=bool(plan.unconfirmed))
    return "\n".join([*parts, "</svg>", ""])


def parts_of(expected: Times) -> dict[str, float]:
    """Milliseconds of the bar, in the order of time; the steps include the sound that is ahead."""
    parts = {
        "hangover": expected.voice_to_voice_ms - expected.first_sound_ms,
        "encoder": expected.encoder_ms,
        "prefill": expected.prefill_ms,
        "paging": expected.paging_ms,
    }
    return parts | {"steps": expected.voice_to_voice_ms - sum(parts.values())}


def _bar(expected: Times, y: int, scale: float, *, is_unsure: bool) -> list[str]:
    x, drawn = float(_LEFT), []
    for name, part_ms in parts_of(expected).items():
        drawn.append(
            f'<rect x="{x:.1f}" y="{y + 3}" width="{part_ms * scale:.1f}" height="{_ROW - 8}" '
            f'fill="{_COLOURS[name]}"><title>{name} {part_ms:.0f} ms</title></rect>'
        )
        x += part_ms * scale
    label = f"{expected.voice_to_voice_ms:.0f}{'?' if is_unsure else ''}"
    return [*drawn, f'<text x="{x + 5:.1f}" y="{y + 15}">{label}</text>']


def _legend() -> list[str]:
    parts = []
    for place, (name, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 110 * place
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="45">{name}</text>')
    return parts


def _why(plan: DevicePlan) -> str:
    if plan.verdict == "refuses":
        return f"refuses: {plan.reason}"
    return plan.why_no_times or ""
