"""Settings of a pager's reads; `sizing.py` sizes its pool."""

from __future__ import annotations

from dataclasses import dataclass

from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerSettings:
    """Settings of reads. None of them changes answers."""

    readers: int = 4
    """Reader threads, which is also the number of chunks in flight."""
    chunk_bytes: int = 1 << 20
    wave_experts: int = 16
    """Most experts of one wave of a union."""
    sweep_share: float = 0.7
    """Largest share of the pool for a sweep."""
    fills: bool = False
    """Fill free slots while idle, so that the first answer is as fast as later ones."""
    least_slots: int = 16
    """Least slots of the pool."""
    paranoid: bool = False
    """Verify the checksum at every load, not only at the first."""
    poison: bool = False
    """Overwrite a slot with NaN when its expert is evicted, so that a stale read shows. For
    tests."""

    def __post_init__(self) -> None:
        if self.readers < 1 or self.wave_experts < 1 or not 0 <= self.sweep_share <= 1:
            raise ValueError(f"{self}: readers and wave_experts from 1, sweep_share from 0 to 1")
        if self.chunk_bytes < PAGE_BYTES or self.chunk_bytes % PAGE_BYTES:
            raise ValueError(f"chunk_bytes = {self.chunk_bytes}: expected whole pages")
