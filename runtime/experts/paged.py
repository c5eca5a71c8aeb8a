"""An engine's source of experts: one interface to pager, look-ahead and recorder.

An engine calls `begin_prefill` or `begin_step` for each pass of its layers. For each router it
calls `waves`, for arrays, or `tables`, for addresses; a pass within `all_resident` need not.
`ExpertSum` is the part for ONNX Runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.experts.degrade import Degrade
from deeptalk_edge.runtime.experts.lease import Lease
from deeptalk_edge.runtime.experts.look_ahead import LookAhead
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record import ExpertWeights
from deeptalk_edge.runtime.experts.routes import Modality, RouteRecorder, union
from deeptalk_edge.runtime.experts.sizing import read_memory

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
ReadRecord = Callable[[NDArray[np.uint8]], ExpertWeights]


def float32_record(form: RecordFormat) -> ReadRecord:
    """Return a function that reads a record (bytes,) as `gate_up` (2G, C) and `down` (C, G) in
    float32, as views, or as copies if it is stored in another type."""

    def read(record: NDArray[np.uint8]) -> ExpertWeights:
        stored = form.unpack(record[: form.record_bytes])  # a slot may be larger than its record
        if form.dtype == "float32":
            return ExpertWeights(stored.gate_up, stored.down)
        return ExpertWeights(*form.dequantise(stored))

    return read


class PagedExperts:
    """Experts of one engine, from a pager that other engines may share."""

    def __init__(
        self,
        pager: ExpertPager,
        read_record: ReadRecord | Mapping[int, ReadRecord],
        *,
        look_ahead: LookAhead | None = None,
        recorder: RouteRecorder | None = None,
        degrade: Degrade | None = None,
        is_shared: bool = True,
    ) -> None:
        """Exact unless `degrade` is given. `close` also closes a pager that is not shared; then
        every method but `close` raises UsageError."""
        if not isinstance(pager.pool, CpuPool):
            raise ValueError("these experts are read by the CPU; the pager's pool is a device's")
        self.recorder = recorder
        """May be set and removed between passes."""
        self._pager, self._memory = pager, pager.pool.memory
        self._read_record, self._look_ahead = read_record, look_ahead
        self._degrade = degrade
        self._is_shared = is_shared
        self._lifetime = Lifetime("the source of experts", self._give_back)

    @property
    def slot_bytes(self) -> int:
        """Readable bytes at each address."""
        return self._pager.pool.slot_bytes

    def user_started_speaking(self) -> None:
        """The user has begun to speak, so a turn begins."""
        self._begin(Phase.LISTENING, np.empty(0))

    def begin_prefill(self, audio_mask: NDArray[np.bool_]) -> None:
        """Rows of a prompt are fed; the mask (T,) marks rows of speech."""
        self._begin(Phase.THINKING, np.where(audio_mask, Modality.HEARD, Modality.WRITTEN))

    def begin_step(self, num_items: int) -> None:
        """One row of the answer is fed to each item: item 0 speaks, item 1 only writes."""
        self._begin(Phase.SPEAKING, np.array([Modality.SPOKEN, Modality.WRITTEN][:num_items]))

    def all_resident(self) -> AbstractContextManager[bool]:
        """Context of True if `addresses` of all layers hold every expert until it ends. It is False
        with a recorder or `degrade`, which need each routing."""
        self._lifetime.check()
        return nullcontext(False) if self.recorder or self._degrade else self._pager.all_resident()

    def addresses(self, layer: int) -> NDArray[np.uint64]:
        """Addresses (E,) of a layer's experts: a live view, always at the same place."""
        self._lifetime.check()
        return self._pager.addresses(layer)

    def waves(
        self, layer: int, ids: Ids, weights: Array, normed: Array
    ) -> Generator[Iterator[tuple[int, ExpertWeights]], None, None]:
        """Yield the experts of ids (N, k), ascending, in groups. A group is valid until the next
        one; an expert is read when iteration reaches it. Close the generator if you may leave it
        early.

        With `degrade`, ids and weights are changed in place.
        """
        read_record = (
            self._read_record[layer]
            if isinstance(self._read_record, Mapping)
            else self._read_record
        )
        with closing(self._leases(layer, ids, weights, normed)) as leases:
            for lease, _ in leases:
                yield (
                    (expert, read_record(self._memory[slot]))
                    for expert, slot in lease.slots.items()
                )

    def tables(
        self, layer: int, ids: Ids, weights: Array, normed: Array
    ) -> Generator[NDArray[np.uint64], None, None]:
        """Yield the groups of `waves` as addresses (E,), 0 for experts outside the group."""
        with closing(self._leases(layer, ids, weights, normed)) as leases:
            for lease, is_all in leases:
                table = lease.addresses
                if not is_all:
                    table = np.zeros_like(table)
                    table[lease.experts] = lease.addresses[lease.experts]
                yield table

    def _leases(
        self, layer: int, ids: Ids, weights: Array, normed: Array
    ) -> Generator[tuple[Lease, bool], None, None]:
        """Yield leases, and whether the lease holds all of `ids`."""
        self._lifetime.check()
        predicted = None
        if self._look_ahead and (self.recorder or not self._pager.has_all):
            predicted = self._look_ahead.predict(layer, normed)
        if self.recorder:
            self.recorder.routed(layer, ids, weights, predicted, normed)
        chosen = ids
        if self._degrade:
            resident = self._pager.addresses(layer) != 0
            chosen = ids[self._degrade.apply(layer, ids, weights, normed, resident)]
        experts = union(chosen)
        if not experts:
            return
        num_left = len(experts)
        with closing(self._pager.waves(layer, experts)) as leases:
            for lease in leases:
                num_left -= len(lease.slots)
                if predicted is not None and not num_left:  # after every demand of this layer
                    self._pager.hint(layer + 1, union(predicted))
                yield lease, len(lease.slots) == len(experts) and not self._degrade

    def _begin(self, phase: Phase, modality: NDArray[Any]) -> None:
        self._lifetime.check()
        self._pager.enter(phase)
        if self.recorder:
            self.recorder.begin(phase, modality.astype(np.uint8))

    def idle(self) -> None:
        """Neither side speaks: free slots may be filled."""
        self._lifetime.check()
        self._pager.idle()

    def end_turn(self) -> dict[str, Any]:
        """End a turn: shrink or grow the pool with the system's free memory. Returns the turn's
        counters, and the counters of `degrade` since the beginning."""
        self._lifetime.check()
        counts = self._pager.end_turn(read_memory(), time.monotonic())
        if self._degrade:
            counts["degraded"] = self._degrade.report()
        return counts

    def close(self) -> None:
        """Release the memory; the owner of a shared pager closes that."""
        self._lifetime.close()

    def _give_back(self) -> None:
        del self._memory
        if not self._is_shared:
            self._pager.close()


class Cut(Protocol):
    """An engine's arrays at a router, for B items of T rows."""

    normed: Array
    """(B, T, C)"""
    expert_ids: Ids
    """(B, T, k)"""
    expert_weights: Array
    """(B, T, k)"""


class ExpertBinding(Protocol):
    """Buffers bound to the expert graph's inputs and outputs."""

    def feed(self, name: str, buffer: Array) -> None: ...

    def fetch(self, name: str, buffer: Array) -> None: ...

    def run(self) -> None: ...


class ExpertSum:
    """Runs the routed experts of a layer and sums their outputs in ascending id."""

    def __init__(self, binding: ExpertBinding, experts: PagedExperts) -> None:
        self._binding, self._experts = binding, experts

    def add_up(self, layer: int, cut: Cut, routed: Array) -> None:
        """Write the weighted sum of the experts' outputs for B items of T rows to `routed` (B, T,
        C)."""
        width, top_k = cut.normed.shape[-1], cut.expert_ids.shape[-1]
        normed, total = cut.normed.reshape(-1, width), routed.reshape(-1, width)
        ids = cut.expert_ids.reshape(-1, top_k)
        weights = cut.expert_weights.reshape(-1, top_k)
        total[...] = 0.0
        with closing(self._experts.waves(layer, ids, weights, normed)) as waves:
            for expert, (gate_up, down) in chain.from_iterable(waves):
                tokens, places = (ids == expert).nonzero()
                x = normed[tokens]
                y = np.empty_like(x)
                binding = self._binding
                for name, buffer in (("x", x), ("gate_up", gate_up), ("down", down)):
                    binding.feed(name, buffer)
                binding.fetch("y", y)
                binding.run()
                y *= weights[tokens, places][:, None]
                total[tokens] += y
