"""Compares our step with torch's own export of the reference, with experts as our nodes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.graphs.builder import OPSET
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.verify.run_step import StepRunner
from deeptalk_edge.training.experts import MixtureOfExperts
from deeptalk_edge.training.model import DeepTalk
from tests.export.arenas import model_arenas
from tests.export.checkpoints import write_checkpoint
from tests.export.graphs.test_step import SPECS_OF_ENGINES
from tests.training.random_models import random_rows

pytest.importorskip("onnxscript", reason="no onnxscript: torch cannot export to ONNX")

NUM_ROWS = 9
TOLERANCE = 1e-4  # float32 on values of some tens


class Traced(nn.Module):
    """The reference's decoder; each layer's routed experts are a node, its tensors arguments."""

    def __init__(self, model: DeepTalk, records: RecordFormat) -> None:
        super().__init__()
        self._model = model
        spec = model.spec.decoder
        self._attributes: dict[str, Any] = {
            "weight_dtype": records.dtype,
            "group": records.group or 0,
            "width": spec.width,
            "ffn_width": spec.expert_ffn_width,
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
        }

    def forward(self, x: Tensor, tables: list[Tensor], arenas: list[Tensor]) -> Tensor:
        mixtures = [m for m in self.modules() if isinstance(m, MixtureOfExperts)]
        for mixture, table, arena in zip(mixtures, tables, arenas, strict=True):
            self._stand_in(mixture, table, arena)
        return self._model.decode(x)

    def _stand_in(self, mixture: MixtureOfExperts, table: Tensor, arena: Tensor) -> None:
        """A sum over all experts, because torch cannot export a loop over the chosen ones."""

        def routed(tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            y, _ = torch.onnx.ops.symbolic_multi_out(
                "deeptalk::DtMoE",
                (tokens, ids.int(), weights, table, arena),
                self._attributes,
                dtypes=(tokens.dtype, torch.int32),
                shapes=(tokens.shape, (1,)),
                version=1,
            )
            return y

        mixture.routed = routed  # type: ignore[method-assign]


def test_torchs_export_and_ours_agree(tmp_path: Path) -> None:
    spec = SPECS_OF_ENGINES["yarn"]
    model = write_checkpoint(tmp_path / "checkpoint", spec).model
    records = RecordFormat(dtype="float32", width=64, ffn_width=64)
    arenas = model_arenas(model, records)
    with torch.inference_mode():
        x = model.embed(random_rows(spec, 1, NUM_ROWS))
    step = StepSettings(records=records, precision="float32", num_rows=None)
    export_step(Checkpoint.open(tmp_path / "checkpoint"), tmp_path, step)
    rewrite_as_operators(tmp_path / "step.onnx", tmp_path / "step_native.onnx")
    ours = StepRunner(tmp_path / "step_native.onnx", arenas, capacity=NUM_ROWS).run(x.numpy())
    tables = [torch.from_numpy(arena.slot_table) for arena in arenas.values()]
    packed = [torch.from_numpy(arena.records.view(np.int32)) for arena in arenas.values()]
    names = [f"{kind}_{layer}" for kind in ("slot_table", "slot_arena") for layer in arenas]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Traced(model, records),
            (x.clone(), tables, packed),
            input_names=["x", *names],
            dynamo=True,
            opset_version=OPSET,
        )
    assert program is not None
    program.save(str(tmp_path / "traced.onnx"))
    rewrite_as_operators(tmp_path / "traced.onnx", tmp_path / "traced_native.onnx")
    feeds = {"x": x.numpy()}
    for layer, arena in arenas.items():
        feeds[f"slot_table_{layer}"] = arena.slot_table
        for name in records.sections:
            feeds[f"slot_arena_{layer}.{name}"] = arena.view(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "traced_native.onnx")
    (theirs,) = session.run(None, feeds)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours["hidden"], theirs, atol=TOLERANCE, rtol=0)
