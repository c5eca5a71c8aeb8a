"""What a bundle says of how its weights were quantised and how well: written by `calibrate`, shown
by `bundle inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from deeptalk_edge.schema import Between, Items, Text

Share = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(0, 1 << 48)]
Line = Annotated[str, Text("[^\\ud800-\\udfff]{0,4000}", "text that can be encoded")]
Interval = Annotated[tuple[float, ...], Items(2, 2)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of the gate beside its threshold."""

    value: float | None
    """None: not measured; `reason` says why."""
    interval: Interval | None = None
    """95 %, by bootstrap over utterances, where there is one."""
    limit: float | None = None
    """None: reported, not checked."""
    most: bool = True
    """The limit is the most that is allowed; else the least."""
    reason: Line | None = None

    @property
    def passed(self) -> bool | None:
        """None: nothing was asked, or nothing measured."""
        if self.value is None or self.limit is None:
            return None
        return self.value <= self.limit if self.most else self.value >= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Accuracy beside the float reference, on held-out utterances."""

    utterances: Count
    rows: Count
    """Rows whose logits were compared."""
    backend: Line
    """What computed the quantised logits."""
    measures: Mapping[str, Measure]

    @property
    def failed(self) -> list[str]:
        """The measures beyond their limits."""
        return [name for name, measure in self.measures.items() if measure.passed is False]

    @property
    def passed(self) -> bool:
        return not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingGain:
    """Hits of the pager's pool on turns held out, by replay, not measured on a device."""

    pools: tuple[Share, ...]
    """Of all experts."""
    phased: tuple[Share, ...]
    """As the pager decides by itself."""
    measured: tuple[Share, ...]
    """With the popularity and succession of routing.npz."""
    used: bool
    """The pager begins with them: every pool gains two points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAgreement:
    """Routers fitted to the quantised experts: their agreement with the float model's choices, the
    mean over layers, on measured utterances that the fit left out."""

    layers: tuple[Count, ...]
    """Whose router is a fitted one; in the others the trained router is as good."""
    trained: Share
    fitted: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How the routed experts of a bundle were quantised."""

    method: Literal["rtn", "mse", "awq", "gptq", "smoothquant"]
    corpus: Line
    utterances: Count
    """Measured, not held out."""
    seed: Annotated[int, Between(0, 1 << 32)]
    experts: Count
    forced: Count
    """Experts topped up with lent tokens."""
    below_floor: Count
    """Experts under the default floor of 32 routed tokens; 0 unless the user lowered it."""
    floor: Count
    error: Annotated[float, Between(0, 1e9)]
    """Relative error of the experts' outputs on their tokens, the mean over all."""
    budget_bytes: Count | None = None
    paging: PagingGain | None = None
    """None: too few turns to hold some out."""
    routers: RouterAgreement | None = None
    """None: not fitted."""
    gate: Gate | None = None
    """None: not run."""
