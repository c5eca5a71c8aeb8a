"""The checkpoint as the native CPU backend holds it: the plain reference over rounded weights.

Float32 graphs are no measure for it. After 26 routers the rounding of int4 weights alone moves
logits by half of the largest one, because near ties choose other experts. Against a reference with
the same weights, the kernels, which also round activations, stay within 6 %.
"""

from __future__ import annotations

import numpy as np

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.checkpoint.reader import EMBEDDING, HEAD, Checkpoint
from deeptalk_edge.export.packed.cpu_weights import CpuPrecision, LayerWeights, round_matrix
from deeptalk_edge.export.packed.experts import ExpertSource
from deeptalk_edge.export.verify.reference import Floats, Reference, silu

_MATRICES = ("q_proj.weight", "kv_a_proj_with_mqa.weight", "o_proj.weight")


class CpuReference(Reference):
    """A reference whose weights are rounded as native.bin and its expert records hold them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: ExpertSource,
        records: RecordFormat,
        precision: CpuPrecision,
    ) -> None:
        """`records` gives the widths of the MLPs that every token takes."""
        super().__init__(checkpoint, experts)
        self._own_records = records
        self._precision = precision

    def _tensor(self, name: str) -> Floats:
        weight = super()._tensor(name)
        if name in (EMBEDDING, HEAD):
            round_matrix(weight, self._precision.table_group)
        elif name.endswith("kv_b_proj.weight"):
            for head in weight.reshape(self.spec.decoder.num_heads, -1, weight.shape[1]):
                key, value = np.split(head, [self.spec.decoder.nope_dim])
                round_matrix(key.T, self._precision.matrix_group)  # it is held transposed
                round_matrix(value, self._precision.matrix_group)
        elif name.startswith("model.layers.") and name.endswith(_MATRICES):
            round_matrix(weight, self._precision.matrix_group)
        return weight

    def _swiglu(self, x: Floats, name: str) -> Floats:
        """An MLP that every token takes, (T, C): a sum of records."""
        total = np.zeros_like(x)
        layer = int(name.split(".")[2])
        for form, *weights in LayerWeights(self._checkpoint, layer).own_mlps(self._own_records):
            gate_up, down = form.dequantise(quantise_expert(form, *weights))
            gate, up = np.split(x @ gate_up.T, 2, axis=1)
            total += (silu(gate) * up) @ down.T
        return total
