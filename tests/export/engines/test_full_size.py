"""Graphs of the official size, with random weights, as engines for two generations of cards.

Building shows that TensorRT-RTX accepts the graphs, fuses attention, and copies no expert, weight
or cache. Nothing runs here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deeptalk_edge.bench.export_full import build_step
from deeptalk_edge.bench.random_checkpoint import RandomCheckpoint
from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.export.engines.build import EngineSettings, build_engine, unsupported_nodes
from deeptalk_edge.export.engines.inspect import read_plan
from deeptalk_edge.export.engines.shapes import codec_shape_ranges
from deeptalk_edge.export.graphs.codec import export_codec
from deeptalk_edge.export.graphs.encoder import export_encoder
from tests.export.checkpoints import CodecTensors, random_codec
from tests.places import OFFICIAL_SIZE

SPEC = read_model_spec(OFFICIAL_SIZE)
ONE_LAYER = replace(SPEC, decoder=replace(SPEC.decoder, num_layers=1, num_dense_layers=0))
TARGETS = ("sm_89", "sm_120")
RTX = EngineSettings(backend="tensorrt_rtx", targets=TARGETS)


@pytest.mark.parametrize("experts", ["int8", "int4"])
@pytest.mark.parametrize("moe", ["operators", "plugin"])
def test_a_decoder_layer_reads_its_experts_in_place(
    moe: str, experts: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plugin: Path | None = request.getfixturevalue("plugin") if moe == "plugin" else None
    figures = build_step(ONE_LAYER, experts, TARGETS, plugin, tmp_path)
    forms = figures["profiles"]
    assert [form["plugins"] for form in forms] == ([1, 1, 1] if plugin else [0, 0])
    for form in forms:
        assert (form["expert_sized_temporaries"], form["copies"]) == ([], [])
    # Scratch memory of decoding; the six experts of a row are 26 MB and more.
    assert [form["scratch_mb"] < 20 for form in forms[:2]] == [True, True]
    assert figures["engine_mb"] < 200  # no expert in the plan


def test_the_encoder_builds_with_fused_attention(tmp_path: Path) -> None:
    export_encoder(
        RandomCheckpoint(SPEC, OFFICIAL_SIZE / "snac"), tmp_path, precision="float16", is_fixed=True
    )
    assert unsupported_nodes(tmp_path / "encoder.onnx", RTX) == []
    build_engine(tmp_path / "encoder.onnx", tmp_path / "encoder.engine", [], RTX)
    (plan,) = read_plan(tmp_path / "encoder.engine")
    assert plan.targets == TARGETS
    assert len(plan.fused_attentions) == SPEC.encoder.num_layers
    # Attention of 1500 frames without fusion would hold 16 x 1500 x 1500 scores.
    assert plan.temporaries_of(16 * 1500 * 1500) == []


def test_the_streaming_codec_builds_in_both_precisions(tmp_path: Path) -> None:
    codec = CodecTensors(random_codec(read_codec_spec(OFFICIAL_SIZE / "snac")))
    for precision in ("float32", "float16"):
        place = tmp_path / precision
        place.mkdir()
        export_codec(codec, "off", place, precision=precision)
        profiles = codec_shape_ranges(place / "codec.onnx", ())
        built = build_engine(place / "codec.onnx", place / "codec.engine", profiles, RTX)
        (plan,) = read_plan(place / "codec.engine")
        assert plan.targets == TARGETS
        assert plan.moves_of(512 * 512) == []
        assert built.bytes < 120e6
