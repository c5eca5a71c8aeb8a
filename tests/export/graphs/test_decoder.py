"""The decoder's graphs against the torch reference, all eight streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.verify.golden import DecoderRunner, GraphRunner
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.experts import Routing, SwiGlu
from deeptalk_edge.training.model import DeepTalk
from tests.export.checkpoints import check_graphs, write_checkpoint
from tests.specs import SPECS
from tests.training.random_models import random_rows

TOLERANCE = 1e-4  # float32 on logits of some tens; summation order alone differs
NUM_ROWS = 9

Array = NDArray[np.float32]

PROMPTS = {
    "text": [False] * NUM_ROWS,
    "audio": [True] * NUM_ROWS,
    "mixed": [False] * 3 + [True] * 4 + [False] * 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A bundle and the model that it was made from."""

    place: Path
    manifest: Manifest
    model: DeepTalk

    def decoder(self) -> DecoderRunner:
        return DecoderRunner(self.place, self.manifest)


@pytest.fixture(
    scope="module",
    params=list(SPECS.values()),
    ids=list(SPECS.keys()),
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    place = tmp_path_factory.mktemp("decoder")
    written = write_checkpoint(place / "checkpoint", request.param)
    export_bundle(written.place, place / "bundle", ExportSettings())
    bundle = Bundle.open(place / "bundle")
    with torch.inference_mode():
        yield Exported(place=bundle.path, manifest=bundle.manifest, model=written.model)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("num_items", [1, 2])
def test_the_logits_of_all_eight_streams_are_the_models(
    exported: Exported, prompt: str, num_items: int
) -> None:
    rows, features, mask = _prompt(exported.model.spec, num_items, PROMPTS[prompt])
    expected = exported.model(rows, features.expand(num_items, -1, -1), mask.expand(num_items, -1))
    hidden = exported.decoder().run(rows.numpy(), features.numpy(), mask.numpy())
    logits = GraphRunner(exported.place / "head.onnx")({"hidden": hidden[:, -1]})
    last = expected[:, -1]
    _assert_close(logits["text_logits"], exported.model.text_logits(last))
    _assert_close(logits["code_logits"], exported.model.code_logits(last))
    _assert_close(hidden, expected)


@pytest.mark.parametrize("num_items", [1, 2])
@pytest.mark.parametrize("cuts", [[NUM_ROWS], [1] * NUM_ROWS, [4, 1, 4], [1, 8]], ids=str)
def test_cached_decoding_equals_the_full_forward(
    exported: Exported, num_items: int, cuts: list[int]
) -> None:
    rows, features, mask = _prompt(exported.model.spec, num_items, PROMPTS["mixed"])
    expected = exported.model(rows, features.expand(num_items, -1, -1), mask.expand(num_items, -1))
    decoder = exported.decoder()
    found = [
        decoder.run(r.numpy(), f.numpy(), m.numpy())
        for r, f, m in zip(
            torch.split(rows, cuts, 1),
            torch.split(features, cuts),
            torch.split(mask, cuts),
            strict=True,
        )
    ]
    _assert_close(np.concatenate(found, axis=1), expected)


def test_the_router_picks_the_models_experts(exported: Exported) -> None:
    rows, features, mask = _prompt(exported.model.spec, 2, PROMPTS["text"])
    routing: list[Routing] = []
    exported.model(rows, routing=routing)
    decoder = exported.decoder()
    decoder.run(rows.numpy(), features.numpy(), mask.numpy())
    assert len(decoder.expert_ids) == len(exported.model.spec.decoder.moe_layers)
    for found, expected in zip(decoder.expert_ids, routing, strict=True):
        np.testing.assert_array_equal(np.sort(found), expected.expert_ids.sort().values.numpy())


def test_an_expert_equals_the_models_mlp(exported: Exported) -> None:
    spec = exported.model.spec.decoder
    mlp = SwiGlu(spec.width, spec.expert_ffn_width)
    x = torch.randn(5, spec.width)
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    run = GraphRunner(exported.place / exported.manifest.ort_graphs.expert)
    feeds = {"x": x, "gate_up": gate_up, "down": mlp.down_proj.weight}
    found = run({name: tensor.detach().numpy() for name, tensor in feeds.items()})["y"]
    _assert_close(found, mlp(x))


def test_every_graph_is_valid_onnx(exported: Exported) -> None:
    assert check_graphs(exported.place) == len(exported.model.spec.decoder.moe_layers) + 6


def test_embed_and_a_tied_head_share_one_table(exported: Exported) -> None:
    spec = exported.model.spec
    own = "embedding.bin" if spec.tied_head else "head.bin"
    for name, file in (("embed.onnx", "embedding.bin"), ("head.onnx", own)):
        graph = onnx.load(str(exported.place / name), load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {file}
        table_bytes = spec.vocabulary.size * spec.decoder.width * 4
        assert (exported.place / file).stat().st_size - table_bytes in range(4096)
    assert (exported.place / "head.bin").is_file() is not spec.tied_head


def test_a_segment_reads_the_cache_in_place(exported: Exported, tmp_path: Path) -> None:
    """ONNX Runtime folds every transpose of the cache into the product that reads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(exported.place / "segment_00.onnx", options)
    nodes = onnx.load(str(tmp_path / "optimised.onnx"), load_external_data=False).graph.node
    readers = {
        node.op_type for node in nodes if any(name.startswith("cache_") for name in node.input)
    }
    assert readers == {"FusedMatMul", "Shape"}


def _prompt(
    spec: ModelSpec, num_items: int, heard: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (B, T, K + 1), features (T, C), audio mask (T,)."""
    rows = random_rows(spec, num_items, len(heard))
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(len(heard), spec.decoder.width, generator=generator)
    return rows, features, torch.tensor(heard)


def _assert_close(found: Array, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE, rtol=0)
