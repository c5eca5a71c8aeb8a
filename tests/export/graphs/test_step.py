"""step.onnx without the plugin against the torch reference, in prefill and decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ArtifactError, DoesNotFit
from deeptalk_edge.export.graphs.builder import DOMAIN, Graph
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.verify.run_step import Arena, StepRunner
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.experts import Routing
from deeptalk_edge.training.model import DeepTalk
from tests.export.arenas import model_arenas
from tests.export.checkpoints import write_checkpoint
from tests.specs import SPECS
from tests.training.random_models import random_rows

CAPACITY = 24
NUM_ROWS = 9
TOLERANCE = 1e-4  # float32 on values of some tens; summation order alone differs
HALF_TOLERANCE = 0.03  # float16 on values of some units: 11 bits through three or four layers


RECORDS = RecordFormat(dtype="float32", width=64, ffn_width=64)


def engine_spec(spec: ModelSpec) -> ModelSpec:
    """Widths that every record format accepts."""
    return replace(spec, decoder=replace(spec.decoder, width=64, expert_ffn_width=64))


SPECS_OF_ENGINES = {name: engine_spec(spec) for name, spec in SPECS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint on disk and the model that it was written from."""

    place: Path
    model: DeepTalk
    arenas: dict[int, Arena]

    def run(self, **settings: Any) -> StepRunner:
        """A runner of the step with these settings, without the plugin."""
        step = StepSettings(records=RECORDS, context_rows=64, **settings)
        name = "_".join(map(str, settings.values()))
        export_step(Checkpoint.open(self.place), self.place, step, name=name)
        native = self.place / f"{name}_native.onnx"
        rewrite_as_operators(self.place / f"{name}.onnx", native)
        return StepRunner(
            native, self.arenas, capacity=CAPACITY, num_items=settings.get("num_items", 1)
        )


@pytest.fixture(
    scope="module", params=list(SPECS_OF_ENGINES.values()), ids=list(SPECS_OF_ENGINES.keys())
)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Written]:
    spec = request.param
    place = tmp_path_factory.mktemp("step") / "checkpoint"
    model = write_checkpoint(place, spec).model
    with torch.inference_mode():
        yield Written(place=place, model=model, arenas=model_arenas(model, RECORDS))


@pytest.mark.parametrize("num_items", [1, 2])
def test_decoding_row_by_row_equals_the_full_forward(written: Written, num_items: int) -> None:
    x, expected = _rows(written.model, num_items)
    runner = written.run(precision="float32", num_items=num_items)
    found = runner.run(x.numpy())
    np.testing.assert_allclose(found["hidden"], expected.numpy(), atol=TOLERANCE, rtol=0)
    assert not found["missing"].any()


@pytest.mark.parametrize("cuts", [[NUM_ROWS], [4, 1, 4], [1, 8]], ids=str)
@pytest.mark.parametrize("num_items", [1, 2])
def test_a_prefill_in_pieces_equals_the_full_forward(
    written: Written, num_items: int, cuts: list[int]
) -> None:
    x, expected = _rows(written.model, num_items)
    runner = written.run(precision="float32", num_items=num_items, num_rows=None)
    found = [runner.run(piece.numpy())["hidden"] for piece in torch.split(x, cuts, 1)]
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), expected.numpy(), atol=TOLERANCE, rtol=0
    )


def test_rows_after_the_counted_ones_change_nothing(written: Written) -> None:
    x, expected = _rows(written.model, 1)
    runner = written.run(precision="float32")
    runner.run(x.numpy() + 1)
    runner.num_rows = 0
    found = runner.run(x.numpy())["hidden"]
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0)


def test_float16_hidden_states_equal_the_models_within_rounding(written: Written) -> None:
    x, expected = _rows(written.model, 2)
    found = written.run(precision="float16", num_items=2).run(x.numpy())["hidden"]
    np.testing.assert_allclose(found, expected.numpy(), atol=HALF_TOLERANCE, rtol=0)


def test_the_step_returns_the_routers_choice(written: Written) -> None:
    x, _ = _rows(written.model, 2)
    routing: list[Routing] = []
    written.model.decode(x, routing=routing)
    found = written.run(precision="float32", num_items=2).run(x.numpy())["expert_ids"]
    assert len(found) == len(routing)
    for ids, expected in zip(found, routing, strict=True):
        np.testing.assert_array_equal(np.sort(ids), expected.expert_ids.sort().values.numpy())


def _rows(model: DeepTalk, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded rows (B, T, C) and the model's hidden states."""
    x = model.embed(random_rows(model.spec, num_items, NUM_ROWS))
    expected = model.decode(x)
    assert expected.abs().max() > 0.1
    return x, expected


def test_weights_that_are_inputs_are_in_their_file_and_in_no_graph(written: Written) -> None:
    x, expected = _rows(written.model, 2)
    runner = written.run(precision="float32", num_items=2, dense="given")
    found = runner.run(x.numpy())["hidden"]
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0)
    stem = "float32_2_given"
    graph = onnx.load(str(written.place / f"{stem}.onnx"), load_external_data=False).graph
    given = json.loads((written.place / f"{stem}.weights.json").read_text())
    assert given.keys() <= {value.name for value in graph.input}
    spec = written.model.spec.decoder
    without_mlp = 0 if spec.num_shared_experts else len(spec.moe_layers)
    # qkv, o_proj, gate_up and down of each
    assert len(given) == 4 * spec.num_layers - 2 * without_mlp
    assert all(place["offset"] % 4096 == 0 for place in given.values())
    constants = {tensor.name for tensor in graph.initializer}
    assert not any(name.endswith(("qkv.weight", "down.weight")) for name in constants)


def test_the_step_needs_no_operator_newer_than_opset_18(written: Written) -> None:
    """TensorRT 10.3 on JetPack 6 parses no newer ones."""
    written.run(precision="float16", num_rows=None)
    graph = onnx.load(str(written.place / "float16_None.onnx"), load_external_data=False).graph
    ours = [node for node in graph.node if node.domain == DOMAIN]
    assert len(ours) == len(written.model.spec.decoder.moe_layers)
    for node in graph.node:
        if node not in ours:
            schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=18)
            assert {a.name for a in node.attribute} <= schema.attributes.keys()
            assert len(node.input) <= schema.max_input


def test_a_full_cache_is_refused(written: Written) -> None:
    x, _ = _rows(written.model, 1)
    runner = written.run(precision="float32", num_rows=None)
    for _ in range(CAPACITY // NUM_ROWS):
        runner.run(x.numpy())
    with pytest.raises(DoesNotFit, match=f"{NUM_ROWS * 3} rows, the caches hold {CAPACITY}"):
        runner.run(x.numpy())


def test_rows_that_are_not_whole_int4_groups_are_refused(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint", SPECS_OF_ENGINES["plain"]).place
    settings = StepSettings(records=RECORDS, dense="int4")
    with pytest.raises(ArtifactError, match="rows of 40 weights, int4 takes multiples of 64"):
        export_step(Checkpoint.open(place), tmp_path, settings)
    assert not (tmp_path / "step.onnx").exists()


@pytest.mark.parametrize("worst", [1e6, np.nan], ids=str)
def test_a_weight_beyond_float16_is_refused_by_name(worst: float, tmp_path: Path) -> None:
    weight = np.array([1.0, worst], np.float32)
    for take in (Graph.weight, Graph.given):
        with (
            pytest.raises(ArtifactError, match=r"gate: weights up to .*export in float32"),
            Graph(tmp_path, "graph", precision="float16") as graph,
        ):
            take(graph, "gate", weight)
