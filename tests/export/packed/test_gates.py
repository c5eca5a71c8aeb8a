"""gates.npz: the checkpoint's routers, for the look-ahead of the runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.packed.gates import write_gates
from tests.export.checkpoints import write_checkpoint
from tests.specs import PLAIN


def test_gates_hold_the_routers_and_the_norms_before_them(tmp_path: Path) -> None:
    spec = replace(PLAIN, decoder=replace(PLAIN.decoder, num_layers=4, num_dense_layers=2))
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", spec).place)
    write_gates(checkpoint, tmp_path / "gates.npz")
    with np.load(tmp_path / "gates.npz", allow_pickle=False) as gates:
        assert set(gates.files) == {"gates", "norms"}
        for i, layer in enumerate((2, 3)):
            name = f"model.layers.{layer}"
            router = checkpoint.tensor(f"{name}.mlp.gate.weight")
            norm = checkpoint.tensor(f"{name}.post_attention_layernorm.weight")
            np.testing.assert_array_equal(gates["gates"][i], router)
            np.testing.assert_array_equal(gates["norms"][i], norm)
            assert gates["gates"].dtype == gates["norms"].dtype == np.float32


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", PLAIN).place)
    for name in ("first.npz", "second.npz"):
        write_gates(checkpoint, tmp_path / name)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
