"""A step in pieces: it equals the whole step and holds at most one layer in memory."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.graphs.builder import Precision
from deeptalk_edge.export.graphs.layers import Dense
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.verify import run_step as step_run
from deeptalk_edge.export.verify.golden import GraphRunner, golden_inputs
from deeptalk_edge.export.verify.run_step import Arena, StepRunner, layer_arena
from deeptalk_edge.export.verify.step_pieces import step_pieces
from tests.export.arenas import model_arenas
from tests.export.checkpoints import write_checkpoint
from tests.export.graphs.test_step import RECORDS, SPECS_OF_ENGINES
from tests.places import TINY

CAPACITY = 12


@pytest.fixture(scope="module")
def jetson(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint's bundle that carries its graphs: no engine is built."""
    place = tmp_path_factory.mktemp("jetson") / "bundle"
    export_bundle(TINY, place, ExportSettings(profile=load_profile("agx-orin-64gb")))
    return Bundle.open(place)


def test_every_piece_holds_exactly_one_layer_with_a_router(jetson: Bundle) -> None:
    step = jetson.file("step_native.onnx")
    whole = onnx.load(str(step), load_external_data=False).graph
    spec = jetson.manifest.model.decoder
    weights: list[str] = []
    nodes = 0
    for piece, layer in zip(step_pieces(step), spec.moe_layers, strict=True):
        onnx.save(piece, jetson.path / "piece.onnx")
        onnx.checker.check_model(str(jetson.path / "piece.onnx"), full_check=True)
        arenas = {value.name.split(".")[0] for value in piece.graph.input if "arena" in value.name}
        assert arenas == {f"slot_arena_{layer}"}
        external = [t.name for t in piece.graph.initializer if t.external_data]
        weights += [name for name in external if not name.startswith("rotary.")]
        nodes += len(piece.graph.node)
    shared = 40 * (len(spec.moe_layers) - 1)  # masks, turns, outputs
    assert len(whole.node) <= nodes < len(whole.node) + shared
    assert sorted(weights) == sorted(
        t.name for t in whole.initializer if t.external_data and not t.name.startswith("rotary.")
    )


@pytest.mark.parametrize(
    ("precision", "dense", "num_rows"),
    [
        ("float32", "float", None),
        ("float32", "float", 1),
        ("float16", "int8", 1),
        ("float16", "given", None),
    ],
)
@pytest.mark.parametrize("spec", ["plain", "yarn"])
def test_pieces_compute_what_the_whole_step_computes(
    spec: str, precision: Precision, dense: Dense, num_rows: int | None, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path / "checkpoint", SPECS_OF_ENGINES[spec])
    arenas = model_arenas(written.model, RECORDS)
    settings = StepSettings(
        records=RECORDS, precision=precision, dense=dense, num_items=2, num_rows=num_rows
    )
    export_step(Checkpoint.open(written.place), tmp_path, settings)
    step = tmp_path / "step_native.onnx"
    rewrite_as_operators(tmp_path / "step.onnx", step)
    x = np.random.default_rng(0).normal(size=(2, 7, RECORDS.width)).astype(np.float32)
    of_two = functools.partial(StepRunner, step, arenas, capacity=CAPACITY, num_items=2)
    whole = of_two().run(x, rows_at_once=3)
    outputs: dict[str, list[Any]] = {"expert_ids": [], "missing": []}
    for piece in step_pieces(step):
        found = of_two(piece=piece).run(x, rows_at_once=3)
        x = found["hidden"]
        for name, parts in outputs.items():
            parts.append(found[name])
    np.testing.assert_array_equal(x, whole["hidden"])
    for name, parts in outputs.items():
        np.testing.assert_array_equal(np.concatenate(parts), whole[name])


def test_pieces_of_the_shipped_checkpoint_compute_its_step(jetson: Bundle) -> None:
    """In the precision of a Jetson, with the experts of the bundle."""
    step, experts = jetson.file("step_native.onnx"), jetson.file("experts.bin")
    layers, width = jetson.manifest.model.decoder.moe_layers, jetson.manifest.model.decoder.width
    arenas = {layer: layer_arena(experts, jetson.manifest, layer) for layer in layers}
    x = np.random.default_rng(0).normal(size=(2, 7, width)).astype(np.float32)
    of_two = functools.partial(StepRunner, step, arenas, capacity=CAPACITY, num_items=2)
    whole = of_two().run(x)["hidden"]
    for piece in step_pieces(step):
        x = of_two(piece=piece).run(x)["hidden"]
    np.testing.assert_array_equal(x, whole)


def test_one_graph_and_one_layers_experts_are_open_at_a_time(
    jetson: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs: list[weakref.ref[Any]] = []
    opened: list[str] = []

    def note(name: str, one: Any, beside: int) -> None:
        """Check that at most `most` others are open when `one` is opened."""
        assert sum(ref() is not None for ref in refs) <= beside, name
        refs.append(weakref.ref(one))
        opened.append(name)

    class Graph(GraphRunner):
        def __init__(self, *args: Any) -> None:
            note("graph", self, 0)
            super().__init__(*args)

    class Piece(StepRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            note("piece", self, 1)
            super().__init__(*args, **kwargs)

    def arena(*args: Any) -> Arena:
        found = layer_arena(*args)
        note("experts", found.records, 0)
        return found

    for name, watched in (("GraphRunner", Graph), ("StepRunner", Piece), ("layer_arena", arena)):
        monkeypatch.setattr(step_run, name, watched)
    manifest = jetson.manifest
    inputs, experts = golden_inputs(manifest.model), jetson.file("experts.bin")
    step_run.engine_outputs(jetson.path, experts, manifest, inputs)
    pieces = ["experts", "piece"] * len(manifest.model.decoder.moe_layers)
    assert opened == ["graph"] * 2 + pieces + ["graph"] * 2
