"""The memory that a running bundle needs: the planner and the runtime share this arithmetic.

    memory = weights + cache + workspace + reserve + slots x bytes of a slot

The planner (devices/plan) reckons with it before a bundle exists; the runtime sizes its pool and
its caches by it at load.
"""

from __future__ import annotations

import logging

from deeptalk_edge.bundle.expert_record import PAGE_BYTES
from deeptalk_edge.bundle.target import TargetBackend
from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.model.spec import DecoderSpec

RESERVE_BYTES = 500_000_000
"""Left to the system and to what grows later."""

_NULL_ROWS = 1  # of a float cache: zeros that no query sees
_LANES = {"ort": 3.0, "cpu": 2.0, "tensorrt_rtx": 3.5, "tensorrt": 3.5}
"""Caches of a conversation that can answer batch-parallel. ONNX Runtime's has one item and, apart
from it, two side by side; our kernels share the rows before a fork. Engines have two lanes of all
rows and of a quarter, one for each decoding profile, and a lane for the rows of a dropped item."""

log = logging.getLogger(__name__)


def slot_bytes(record_bytes: int) -> int:
    """A slot holds any record, on its own pages."""
    return -(-record_bytes // PAGE_BYTES) * PAGE_BYTES


def least_slots(top_k: int) -> int:
    """Below this nothing runs: two layers' experts, and four on their way."""
    return 2 * top_k + 4


def slots_in(available_bytes: int, *, num_records: int, slot_bytes: int) -> int:
    """Slots out of what is available once everything else is loaded; all records if they fit."""
    return min(num_records, max(available_bytes - RESERVE_BYTES, 0) // slot_bytes)


def pool_slots(
    *, num_records: int, slot_bytes: int, num_layers: int, top_k: int, available_bytes: int
) -> int:
    """Slots for a pool out of what is available now; all records if they fit.

    Raises DoesNotFit if not even the least pool does. Warns below one step's experts: there the
    pool forgets everything before it is asked again.
    """
    num_slots = slots_in(available_bytes, num_records=num_records, slot_bytes=slot_bytes)
    least = min(least_slots(top_k), num_records)
    if num_slots < least:
        raise DoesNotFit(
            f"{available_bytes / 1e9:.2f} GB of memory are available; the system keeps "
            f"{RESERVE_BYTES / 1e9:.1f} GB and {least} experts take "
            f"{least * slot_bytes / 1e9:.2f} GB; free memory, or export with smaller experts"
        )
    if num_slots < min(num_layers * top_k, num_records):
        log.warning(
            "room for %d experts, one step uses %d: every step reads nearly all of its experts "
            "from disk; free memory, or export with smaller experts",
            num_slots,
            num_layers * top_k,
        )
    return num_slots


def cache_bytes(decoder: DecoderSpec, backend: TargetBackend, kind: str, context_rows: int) -> int:
    """The latent caches of one conversation of so many rows, all layers and lanes.

    `kind` is the precision of the bundle's kv_cache.
    """
    if backend == "cpu":
        layer_bytes = context_rows * native_row_bytes(decoder, kind)
    else:
        value_bytes = 4 if kind == "float32" else 2
        layer_bytes = (context_rows + _NULL_ROWS) * decoder.cache_width * value_bytes
    return int(_LANES[backend] * decoder.num_layers * layer_bytes)


def native_row_bytes(decoder: DecoderSpec, kind: str) -> int:
    """One row of one layer for our CPU kernels: both parts padded as in native/cpu/context.h; int8
    rows end with two float32 scales."""
    value_bytes, step, scales = (1, 128, 8) if kind == "int8" else (2, 32, 0)
    parts = decoder.latent_dim, decoder.rope_dim + scales
    return value_bytes * sum(-(-part // step) * step for part in parts)
