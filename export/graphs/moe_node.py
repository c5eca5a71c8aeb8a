"""`deeptalk::DtMoE`: the routed experts of one layer as one node, as native/tensorrt_plugin reads.

    x, ids, weights, slot_table, slot_arena -> routed, missing

`slot_table_L` says in which record of `slot_arena_L` an expert lies, -1 where in none; a use
without a slot adds nothing and is counted. The arena is opaque here, int32: what is in a record is
deeptalk_edge/bundle/expert_record.py's. Several layers may be bound to one buffer.
"""

from __future__ import annotations

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.export.graphs.builder import INT32, Dim, Graph
from deeptalk_edge.model.spec import DecoderSpec

KIND = "DtMoE"


def moe_node(
    graph: Graph,
    x: str,
    expert_ids: str,
    expert_weights: str,
    *,
    layer: int,
    shape: tuple[Dim, ...],
    spec: DecoderSpec,
    records: RecordFormat,
) -> tuple[str, str]:
    """Add the experts of a layer, and its slot table and arena as inputs of the graph.

    `x` has `shape` (.., C) and the graph's precision; `expert_ids` (.., k) are int32, the weights
    float32 and final. Returns the weighted sum, as x, and the count of uses without a slot, (1).
    """
    slot_table = graph.input(f"slot_table_{layer}", INT32, (spec.num_experts,))
    slot_arena = graph.input(
        f"slot_arena_{layer}", INT32, (f"slots_{layer}", records.record_bytes // 4)
    )
    routed, missing = f"routed_{layer}", f"missing_{layer}"
    graph.node(
        KIND,
        [x, expert_ids, expert_weights, slot_table, slot_arena],
        {
            routed: (graph.float_type, shape),
            missing: (INT32, (1,)),
        },
        plugin_version="1",
        plugin_namespace="deeptalk",
        weight_dtype=records.dtype,
        group=records.group or 0,
        width=spec.width,
        ffn_width=spec.expert_ffn_width,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        carry=0,
    )
    return routed, missing
