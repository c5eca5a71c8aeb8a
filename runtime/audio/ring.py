"""A ring of samples between a sound callback, which pushes, and one reader, which pops.

Positions are counts of samples that only grow. Each side moves its own position, so neither waits
for the other. A late reader gets the newest samples; the oldest are dropped and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class SampleRing:
    """Holds the last `capacity` samples. One pusher, one popper."""

    def __init__(self, capacity: int, block_samples: int, dtype: DTypeLike) -> None:
        """`block_samples` is the largest block of a `push`."""
        self._capacity = capacity
        # One block more, so that the pusher never overwrites samples that the popper reads.
        self._ring: NDArray[Any] = np.zeros(capacity + block_samples, dtype)
        self._pushed = self._popped = 0
        self.num_dropped = 0

    @property
    def available(self) -> int:
        return min(self._pushed - self._popped, self._capacity)

    def push(self, samples: NDArray[Any]) -> None:
        """Append (N,); never waits."""
        start = self._pushed % len(self._ring)
        first = min(len(samples), len(self._ring) - start)
        self._ring[start : start + first] = samples[:first]
        self._ring[: len(samples) - first] = samples[first:]
        self._pushed += len(samples)

    def pop(self, count: int) -> NDArray[Any] | None:
        """Return the next `count` samples in order, or None if there are fewer."""
        while self.available >= count:
            late = self._pushed - self._popped - self._capacity
            if late > 0:
                self.num_dropped += late
                self._popped += late
            start = self._popped % len(self._ring)
            first = self._ring[start : start + count]
            samples = np.concatenate([first, self._ring[: count - len(first)]])
            if self._pushed - self._popped <= self._capacity:  # not overtaken while copying
                self._popped += count
                return samples
        return None
