"""How a pager moves bytes; how large its pool is stands in `sizing.py`."""

from __future__ import annotations

from dataclasses import dataclass

from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerSettings:
    """How to move bytes. None of it changes what a model says."""

    readers: int = 4
    """Threads, and so chunks in flight."""
    chunk_bytes: int = 1 << 20
    wave_experts: int = 16
    """Experts of one wave of a union at most."""
    sweep_share: float = 0.7
    """Part of the pool that a sweep may take."""
    fills: bool = False
    """Fill free slots while nobody waits: the first answer is as quick as the next."""
    least_slots: int = 16
    """The pool is never made smaller than this."""
    paranoid: bool = False
    """Verify the checksum at every load, not at the first one only."""
    poison: bool = False
    """Overwrite a slot with NaN when its expert leaves: a stale read shows at once. For tests."""

    def __post_init__(self) -> None:
        if self.readers < 1 or self.wave_experts < 1 or not 0 <= self.sweep_share <= 1:
            raise ValueError(f"{self}: readers and wave_experts from 1, sweep_share from 0 to 1")
        if self.chunk_bytes < PAGE_BYTES or self.chunk_bytes % PAGE_BYTES:
            raise ValueError(f"chunk_bytes = {self.chunk_bytes}: expected whole pages")
