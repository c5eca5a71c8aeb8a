"""codec.onnx: the stream equals the whole decode, however it is cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.graphs.codec import CodecGraph, CodecNoise, export_codec
from deeptalk_edge.export.verify.golden import GraphRunner
from deeptalk_edge.model.noise import noise_tape
from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.training.snac import Snac, scales_from_rows
from tests.export.checkpoints import CODEC, ODD_CODEC, CodecTensors, check_graphs, random_codec

TOLERANCE = 1e-5  # float32 on samples within -1..1
NUM_FRAMES = 6
SEED = 3

Array = NDArray[np.float32]
Codes = NDArray[np.int64]

chunkings = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A codec graph, the codec that it was made from, and the noise for both."""

    codec: Snac
    graph: CodecGraph
    run: GraphRunner

    def push(self, codes: Codes, position: int, length: int, state: Array) -> dict[str, Array]:
        feeds: dict[str, Any] = {
            "codes": codes,
            "position": np.array(position),
            "length": np.array(length),
            "state": state,
        }
        if self.graph.noise_rates:
            tape = noise_tape(self.codec.spec, SEED, len(codes), position)
            feeds |= {f"noise_{i}": noise.ravel() for i, noise in enumerate(tape)}
        return self.run(feeds)

    def decode(self, codes: Codes, chunks: list[int]) -> Array:
        """All samples of an utterance, with repeating chunk sizes; after its end the codes are
        random."""
        frame_samples = self.codec.spec.frame_samples
        wanted = len(codes) * frame_samples + self.graph.delay_samples
        rubbish = np.full((wanted // frame_samples + max(chunks) + 1, codes.shape[1]), 10**9)
        pushed = np.concatenate([codes, rubbish])
        state, position = np.zeros(self.graph.state_size, np.float32), 0
        sound: list[Array] = []
        while position * frame_samples < wanted:
            size = chunks[len(sound) % len(chunks)]
            chunk = pushed[position : position + size]
            outputs = self.push(chunk, position, len(codes), state)
            sound.append(outputs["pcm"])
            state = outputs["next_state"]
            position += size
        return np.concatenate(sound)[self.graph.delay_samples : wanted]

    def expected(self, codes: Codes) -> Array:
        """Torch's decode of all frames at once."""
        noise = None
        if self.graph.noise_rates:
            tape = noise_tape(self.codec.spec, SEED, len(codes))
            noise = [torch.from_numpy(block) for block in tape]
        with torch.inference_mode():
            sound: Array = self.codec.decode(torch.from_numpy(codes)[None], noise)[0].numpy()
        return sound


@pytest.fixture(
    scope="module",
    params=[(CODEC, "off"), (CODEC, "tape"), (ODD_CODEC, "off")],
    ids=["24 kHz, no noise", "24 kHz, noise tape", "odd rates, dense"],
)
def stream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stream:
    spec, noise = request.param
    return _export(spec, noise, tmp_path_factory.mktemp("codec"))


@settings(max_examples=15, deadline=None)
@given(chunks=chunkings, seed=st.integers(0, 99))
def test_every_chunking_gives_the_whole_decode(
    stream: Stream, chunks: list[int], seed: int
) -> None:
    codes = _codes(stream.codec.spec, NUM_FRAMES, seed)
    expected = stream.expected(codes)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(stream.decode(codes, chunks), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_an_utterance_shorter_than_the_delay_gives_the_whole_decode(
    stream: Stream, num_frames: int
) -> None:
    codes = _codes(stream.codec.spec, num_frames, 0)
    found = stream.decode(codes, [1])
    np.testing.assert_allclose(found, stream.expected(codes), atol=TOLERANCE, rtol=0)


def test_the_largest_integer_is_accepted_as_an_unknown_length(stream: Stream) -> None:
    codes = _codes(stream.codec.spec, NUM_FRAMES, 0)
    state = np.zeros(stream.graph.state_size, np.float32)
    near = stream.push(codes, 0, 10**6, state)
    far = stream.push(codes, 0, np.iinfo(np.int64).max, state)
    np.testing.assert_array_equal(near["pcm"], far["pcm"])


def test_the_graph_is_valid_onnx(stream: Stream, tmp_path: Path) -> None:
    export_codec(CodecTensors(stream.codec), "off", tmp_path)
    assert check_graphs(tmp_path) == 1


def test_the_delay_of_snac_24_khz_is_4757_samples(tmp_path: Path) -> None:
    """By hand, through the layers: see the formulas in export/graphs/codec.py."""
    delay = 3  # the first convolution
    for stride in (8, 8, 4, 2):
        delay = delay * stride + stride // 2 + 3 * (1 + 3 + 9)
    delay += 3  # the last convolution
    assert _export(CODEC, "off", tmp_path).graph.delay_samples == delay == 4757


def test_the_stream_equals_the_published_packages_decode(tmp_path: Path) -> None:
    snac = pytest.importorskip("snac")
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ((f, getattr(CODEC, f)) for f in CODEC.__dataclass_fields__)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = snac.SNAC(**fields, attn_window_size=None).eval()
    _disturb(theirs)
    for block in theirs.modules():
        if isinstance(block, snac.layers.NoiseBlock):
            block.forward = lambda x: x
    ours = Snac(CODEC, with_encoder=False).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    graph = export_codec(CodecTensors(ours), "off", tmp_path)
    stream = Stream(codec=ours, graph=graph, run=GraphRunner(tmp_path / "codec.onnx"))
    codes = _codes(CODEC, NUM_FRAMES, 0)
    with torch.inference_mode():
        expected = theirs.decode(scales_from_rows(torch.from_numpy(codes)[None], CODEC))[0, 0]
    assert expected.abs().max() > 0.1
    found = stream.decode(codes, [2, 1])
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.shapes.pop("decoder.model.3.block.0.alpha"), "lacks the tensor"),
        (lambda t: t.shapes.update({"decoder.model.1.bias": (31,)}), "is \\[31\\]"),
    ],
    ids=["missing", "misshapen"],
)
def test_a_codec_that_does_not_fit_its_config_is_refused(
    damage: Callable[[CodecTensors], object], message: str, tmp_path: Path
) -> None:
    tensors = CodecTensors(random_codec(CODEC))
    damage(tensors)
    with pytest.raises(ArtifactError, match=message):
        export_codec(tensors, "off", tmp_path)
    assert not (tmp_path / "codec.onnx").exists()


def _export(spec: CodecSpec, noise: CodecNoise, directory: Path) -> Stream:
    codec = random_codec(spec)
    graph = export_codec(CodecTensors(codec), noise, directory)
    return Stream(codec=codec, graph=graph, run=GraphRunner(directory / "codec.onnx"))


def _codes(spec: CodecSpec, num_frames: int, seed: int) -> Codes:
    shape = (num_frames, spec.frame_codes)
    return np.random.default_rng(seed).integers(0, spec.codebook_size, shape)


def _disturb(module: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
