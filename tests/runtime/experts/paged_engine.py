"""The ONNX Runtime engine with experts from a pager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.experts.paged import PagedExperts, float32_record
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordFile
from tests.runtime.experts.records import Fault, FaultyFile, harmless


def open_bundle_pager(
    bundle: Bundle,
    num_slots: int,
    *,
    policy: str = "phased",
    fault: Fault = harmless,
    damages: Callable[[int], bool] = lambda offset: False,
    **settings: Any,
) -> ExpertPager:
    manifest, decoder = bundle.manifest, bundle.manifest.model.decoder
    file = RecordFile(bundle.file(manifest.experts.file))
    slot_bytes = max(
        -(-record.bytes // PAGE_BYTES) * PAGE_BYTES for record in manifest.experts.records
    )
    return ExpertPager(
        manifest.experts.records,
        FaultyFile(file, fault, damages),
        CpuPool(num_slots=num_slots, slot_bytes=slot_bytes),
        POLICIES[policy](len(manifest.experts.records), decoder.num_experts, None),
        PagerSettings(**{"chunk_bytes": PAGE_BYTES, **settings}),
    )


def open_engine(bundle: Bundle, pager: ExpertPager, *, context_rows: int = 32) -> OrtEngine:
    experts = PagedExperts(pager, float32_record(bundle.manifest.record_format))
    return OrtEngine(bundle, context_rows=context_rows, open_experts=lambda: experts)
