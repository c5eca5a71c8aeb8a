"""An export holds a few tensors of the checkpoint at a time, however many there are."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.checkpoint.shards import Weights
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.export.checkpoints import write_checkpoint
from tests.specs import PLAIN


class _Reader:
    """Counts the tensors that were read and are still referenced, views included."""

    def __init__(self) -> None:
        self.live = self.most = self.total = 0
        self._read = Weights.tensor

    def tensor(self, weights: Weights, name: str) -> Any:
        array: Any = np.array(self._read(weights, name))
        weakref.finalize(array, self._dropped)
        self.live += 1
        self.total += 1
        self.most = max(self.most, self.live)
        return array

    def _dropped(self) -> None:
        self.live -= 1


@pytest.mark.parametrize("layers", [2, 5])
def test_no_more_than_four_tensors_are_held_at_once(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(PLAIN, decoder=replace(PLAIN.decoder, num_layers=layers))
    place = write_checkpoint(tmp_path / "checkpoint", spec).place
    reader = _Reader()
    monkeypatch.setattr(Weights, "tensor", lambda *args: reader.tensor(*args))
    export_bundle(place, tmp_path / "bundle", ExportSettings())
    assert reader.total > 3 * layers * PLAIN.decoder.num_experts // 2
    assert reader.most <= 4
    assert reader.live == 0
