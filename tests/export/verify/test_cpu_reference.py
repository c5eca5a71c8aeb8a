"""The reference for the kernels has exactly the weights of native.bin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.reader import EMBEDDING, Checkpoint
from deeptalk_edge.export.packed.cpu_weights import CpuPrecision, write_native_weights
from deeptalk_edge.export.packed.experts import RoundedExperts
from deeptalk_edge.export.verify.cpu_reference import CpuReference
from tests.export.checkpoints import write_checkpoint
from tests.specs import PLAIN

DECODER = replace(PLAIN.decoder, width=64, expert_ffn_width=32)
SPEC = replace(PLAIN, decoder=DECODER)
RECORDS = RecordFormat(dtype="int8", width=DECODER.width, ffn_width=DECODER.expert_ffn_width)


class Held:
    """native.bin, and the reference of the same checkpoint."""

    def __init__(self, place: Path) -> None:
        checkpoint = Checkpoint.open(write_checkpoint(place / "checkpoint", SPEC).place)
        write_native_weights(checkpoint, RECORDS, CpuPrecision(), place)
        experts = RoundedExperts(checkpoint, RECORDS)
        self.reference = CpuReference(checkpoint, experts, RECORDS, CpuPrecision())
        self._content = (place / "native.bin").read_bytes()
        self._arrays = json.loads((place / "native.json").read_text())["arrays"]

    def matrix(self, name: str) -> NDArray[np.float32]:
        entry = self._arrays[name]
        rows, columns = entry["rows"], entry["columns"]
        weights = np.frombuffer(self._content, np.int8, rows * columns, entry["offset"])
        scales = np.frombuffer(self._content, np.float32, rows, entry["scales_offset"])
        return weights.reshape(rows, columns) * scales[:, None]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(tmp_path_factory.mktemp("held"))


@pytest.mark.parametrize(
    ("tensor", "array"),
    [(EMBEDDING, "table"), ("model.layers.1.self_attn.o_proj.weight", "layers.1.out")],
)
def test_a_matrix_is_rounded_as_the_kernels_hold_it(held: Held, tensor: str, array: str) -> None:
    np.testing.assert_array_equal(held.reference._tensor(tensor), held.matrix(array))


def test_both_parts_of_the_latent_projection_are_rounded_as_the_kernels_hold_them(
    held: Held,
) -> None:
    both = held.reference._tensor("model.layers.1.self_attn.kv_b_proj.weight")
    heads = both.reshape(DECODER.num_heads, -1, DECODER.latent_dim)
    key_up = heads[:, : DECODER.nope_dim].transpose(0, 2, 1).reshape(-1, DECODER.nope_dim)
    value_up = heads[:, DECODER.nope_dim :].reshape(-1, DECODER.latent_dim)
    np.testing.assert_array_equal(key_up, held.matrix("layers.1.key_up"))
    np.testing.assert_array_equal(value_up, held.matrix("layers.1.value_up"))


def test_the_encoder_and_the_router_are_not_rounded(held: Held) -> None:
    for name in (
        "model.audio_encoder.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
    ):
        exact = held.reference._checkpoint.tensor(name)
        np.testing.assert_array_equal(held.reference._tensor(name), exact)
