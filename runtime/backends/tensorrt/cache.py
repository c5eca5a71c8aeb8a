"""The latent cache on the device: two lanes, twice.

layout    (L, B, S, W) for the latents and for the rotary keys, in two sizes: all rows, and the
          quarter that the first decoding profile sees. A profile fixes S, and a lane is dense. Rows
          are written to both sizes as long as they fit, so no size is ever copied to another
lanes     outside of a fork all lanes hold the same rows: given the same row they choose the same
          experts, whose bytes are read once
trim      changes only the number of rows; later rows stay in memory, are finite, and do not count
keep      copies the dropped lane to a spare lane, at the same rows, and repeats the kept lane;
          `recall` copies the spare rows to every lane

Every copy runs on the stream of the steps, which orders them: nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice, aligned
from deeptalk_edge.runtime.cuda import Cudart

KINDS = ("latent", "rope")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Sizes of the cache."""

    num_layers: int
    num_lanes: int
    """B, the lanes of the step's engine."""
    sizes: tuple[int, ...]
    """S, the rows, of each profile of the engine."""
    row_bytes: tuple[int, int]
    """Bytes of one row of each kind, in one layer of one lane."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows of one kind in one size."""

    pointer: int
    size: int
    row_bytes: int
    num_lanes: int

    @property
    def lane_bytes(self) -> int:
        return self.size * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        return aligned(self.num_lanes * self.lane_bytes)

    @property
    def is_dense(self) -> bool:
        """Whether layers follow each other without gaps."""
        return self.layer_bytes == self.num_lanes * self.lane_bytes

    def place(self, lane: int, row: int) -> int:
        """Address of a row in the first layer."""
        return self.pointer + lane * self.lane_bytes + row * self.row_bytes


class DeviceCache:
    """Rows of one conversation. One owner; not thread-safe."""

    def __init__(self, device: GpuDevice, shape: CacheShape, stream: int, *, capacity: int) -> None:
        """Raises DoesNotFit if the device has not enough memory."""
        self.capacity = capacity
        self.num_rows = 0
        self.num_items = 1
        self.is_lost = False
        """Whether the device failed: then rows are counted and nothing is copied."""
        self._cuda: Cudart = device.cuda
        self._shape, self._stream = shape, stream
        self._blocks = {
            (kind, size): self._new_block(device, size, row_bytes, shape.num_lanes)
            for kind, row_bytes in zip(KINDS, shape.row_bytes, strict=True)
            for size in sorted(set(shape.sizes))
        }
        self._aside = {
            kind: self._new_block(device, max(shape.sizes), row_bytes, 1)
            for kind, row_bytes in zip(KINDS, shape.row_bytes, strict=True)
            if shape.num_lanes == 2
        }
        self._num_shared = 0  # leading rows that all lanes have in common
        self._dropped_rows: int | None = None  # rows of the lane that `keep` dropped
        self._aside_from = 0  # first of its rows in the spare lane; earlier rows are in the lanes
        self.clear()

    def clear(self) -> None:
        """Zero all rows. Rows that do not count must be finite: attention multiplies them by 0."""
        for block in [*self._blocks.values(), *self._aside.values()]:
            num_bytes = self._shape.num_layers * block.layer_bytes
            self._cuda.begin_memset(block.pointer, 0, num_bytes, self._stream)

    def address(self, kind: str, size: int, layer: int) -> int:
        """Address of a layer's lanes (B, S, W), for a profile of `size` rows."""
        block = self._blocks[kind, size]
        return block.pointer + layer * block.layer_bytes

    def check_room(self, num_rows: int) -> None:
        """Raises DoesNotFit if `num_rows` more rows do not fit."""
        end = self.num_rows + num_rows
        if end > self.capacity:
            raise DoesNotFit(
                f"{end} rows of conversation, the cache holds {self.capacity}; start a new "
                "conversation or export with more context rows"
            )

    def append(self, new: dict[str, int], *, num_lanes: int, num_rows: int) -> None:
        """Add a pass's new rows, (L, B, T, W) of each kind, to every size that they fit. Rows of a
        single lane are added to every lane."""
        for (kind, size), block in self._blocks.items():
            fitting = min(num_rows, size - self.num_rows)
            if fitting > 0:
                self._append_to(block, new[kind], num_lanes, num_rows, fitting)
        self.num_rows += num_rows

    def _append_to(
        self, block: _Block, source: int, num_lanes: int, num_rows: int, fitting: int
    ) -> None:
        place, lane_bytes = block.place(0, self.num_rows), num_rows * block.row_bytes
        num_bytes, num_layers = fitting * block.row_bytes, self._shape.num_layers
        if num_lanes == block.num_lanes and block.is_dense:
            pitch, num_all = block.lane_bytes, num_layers * num_lanes
            self._copy(place, pitch, source, lane_bytes, num_bytes, num_all)
            return
        for lane in range(block.num_lanes):
            of_lane = source + (lane * lane_bytes if num_lanes > 1 else 0)
            to = place + lane * block.lane_bytes
            pitches = block.layer_bytes, num_lanes * lane_bytes
            self._copy(to, pitches[0], of_lane, pitches[1], num_bytes, num_layers)

    def fork(self) -> None:
        if self._is_forked:
            raise ValueError("fork: the cache is forked already; recall or reset it first")
        if self._shape.num_lanes < 2:
            raise ValueError("fork: the step's engine has one lane; export for batch-parallel")
        self.num_items, self._num_shared = 2, self.num_rows

    def keep(self, item: int) -> None:
        if self.num_items != 2 or item not in (0, 1):
            raise ValueError(f"keep({item}): there are {self.num_items} items")
        self._dropped_rows, self._aside_from = self.num_rows, self._num_shared
        self._set_aside(1 - item, self._num_shared, self.num_rows)
        for block in self._blocks.values():
            self._copy_rows(block, item, block, 1 - item, self._num_shared, self.num_rows)
        self.num_items = 1

    def recall(self) -> None:
        if self._dropped_rows is None:
            raise ValueError("recall: no item was dropped")
        for (kind, _), block in self._blocks.items():
            for lane in range(2):
                self._copy_rows(
                    self._aside[kind], 0, block, lane, self._aside_from, self._dropped_rows
                )
        self.num_rows, self._dropped_rows, self._num_shared = self._dropped_rows, None, 0

    def trim(self, position: int) -> None:
        if not 0 <= position <= self.num_rows:
            raise ValueError(f"trim({position}): there are {self.num_rows} rows")
        if self._dropped_rows is not None and position < self._aside_from:
            # The dropped item still needs the rows that will be overwritten.
            self._set_aside(0, position, self._aside_from)
            self._aside_from = position
        self._num_shared = min(self._num_shared, position)
        self.num_rows = position

    def reset(self) -> None:
        self.num_rows, self.num_items = 0, 1
        self._dropped_rows, self._num_shared = None, 0

    @property
    def _is_forked(self) -> bool:
        return self.num_items == 2 or self._dropped_rows is not None

    def _set_aside(self, lane: int, start: int, end: int) -> None:
        for kind in KINDS:
            source = self._blocks[kind, max(self._shape.sizes)]
            self._copy_rows(source, lane, self._aside[kind], 0, start, end)

    def _copy_rows(
        self, source: _Block, source_lane: int, to: _Block, to_lane: int, start: int, end: int
    ) -> None:
        """Copy rows [start, end) of one lane to another, as far as both sizes have them."""
        count = min(end, to.size, source.size) - start
        if count > 0:
            self._copy(
                to.place(to_lane, start),
                to.layer_bytes,
                source.place(source_lane, start),
                source.layer_bytes,
                count * to.row_bytes,
                self._shape.num_layers,
            )

    def _copy(
        self, to: int, pitch: int, source: int, source_pitch: int, row_bytes: int, num_rows: int
    ) -> None:
        if not self.is_lost:
            self._cuda.copy_rows(
                to,
                pitch,
                source,
                source_pitch,
                row_bytes=row_bytes,
                num_rows=num_rows,
                stream=self._stream,
            )

    def _new_block(self, device: GpuDevice, size: int, row_bytes: int, num_lanes: int) -> _Block:
        block = _Block(0, size, row_bytes, num_lanes)
        pointer = device.malloc(self._shape.num_layers * block.layer_bytes)
        return replace(block, pointer=pointer)
