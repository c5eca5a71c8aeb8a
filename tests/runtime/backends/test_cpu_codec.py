"""The codec on the kernels gives the samples of codec.onnx, for any sizes and cuts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.bench.random_snac import SNAC_24KHZ
from deeptalk_edge.bundle.manifest import NATIVE_CODEC, CodecEntry
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.export.graphs.codec import CodecNoise, export_codec
from deeptalk_edge.export.packed.cpu_codec import native_codec_bytes, write_native_codec
from deeptalk_edge.model.noise import gaussian_tape
from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.runtime.backends.cpu.codec import CpuCodec
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.lm.codec_stream import Codec
from tests.export.checkpoints import CODEC, ODD_CODEC, CodecTensors, random_codec
from tests.native.cpu import built

Array = NDArray[np.float32]

TOLERANCE = 1e-5  # float32 on samples within -1..1; 9e-7 was measured
NUM_FRAMES = 9
LENGTH = 6  # frames of the utterance; later frames are random


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One codec as a graph and as the kernels' weights."""

    folder: Path
    entry: CodecEntry

    @property
    def weights(self) -> Path:
        return self.folder / NATIVE_CODEC

    def graph(self) -> OrtCodec:
        return OrtCodec(self.folder / "codec.onnx", threads=1)

    def kernels(self, library: CpuLibrary, path: str | None = None, threads: int = 1) -> CpuCodec:
        return CpuCodec(self.weights, self.entry, threads=threads, path=path, library=library)


@contextmanager
def exported(spec: CodecSpec, noise: CodecNoise) -> Iterator[Exported]:
    with tempfile.TemporaryDirectory() as name:
        folder, tensors = Path(name), CodecTensors(random_codec(spec))
        graph = export_codec(tensors, noise, folder)
        write_native_codec(tensors, noise, folder / NATIVE_CODEC)
        entry = CodecEntry(
            spec=spec,
            delay_samples=graph.delay_samples,
            state_size=graph.state_size,
            noise=noise,
            noise_rates=graph.noise_rates,
        )
        yield Exported(folder=folder, entry=entry)


def chunk(entry: CodecEntry, begin: int, end: int, state: Array) -> dict[str, Any]:
    """The call that pushes frames [begin, end)."""
    shape = (LENGTH, entry.spec.frame_codes)
    codes = np.random.default_rng(3).integers(0, entry.spec.codebook_size, shape)
    rubbish = np.full((NUM_FRAMES - LENGTH, entry.spec.frame_codes), 10**9)
    return {
        "codes": np.concatenate([codes, rubbish])[begin:end],
        "position": begin,
        "length": LENGTH,
        "state": state,
        "noise": [
            gaussian_tape(5, i, begin * rate, (end - begin) * rate)
            for i, rate in enumerate(entry.noise_rates)
        ],
    }


def stream(codec: Codec, entry: CodecEntry, cuts: list[int]) -> Array:
    """All samples, the delay included, in pieces of these sizes; the last piece has the rest."""
    state, sound = np.zeros(entry.state_size, np.float32), []
    edges = sorted({0, NUM_FRAMES, *(edge for edge in accumulate(cuts) if edge < NUM_FRAMES)})
    for begin, end in pairwise(edges):
        pcm, state = codec.decode(**chunk(entry, begin, end, state))
        sound.append(pcm)
    return np.concatenate(sound)


pieces = st.lists(st.integers(1, 7), max_size=6)
specs = st.builds(
    replace,
    st.sampled_from([CODEC, ODD_CODEC]),
    decoder_rates=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    vq_strides=st.sampled_from([(1,), (3, 1), (4, 2, 1)]),
    latent_dim=st.integers(1, 40),
    decoder_dim=st.integers(1, 12).map(lambda n: 8 * n),
    codebook_dim=st.integers(1, 9),
    depthwise=st.booleans(),
    noise=st.booleans(),
)


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    return built.library()


@pytest.fixture(scope="module")
def tape() -> Iterator[Exported]:
    with exported(CODEC, "tape") as codec:
        yield codec


@settings(max_examples=12, deadline=None)
@given(spec=specs, noise=st.sampled_from(["off", "tape"]), cuts=pieces)
def test_codecs_of_any_size_give_the_samples_of_their_graph(
    library: CpuLibrary, spec: CodecSpec, noise: CodecNoise, cuts: list[int]
) -> None:
    with exported(spec, noise) as codec:
        assert codec.weights.stat().st_size == native_codec_bytes(spec, noise)
        expected = stream(codec.graph(), codec.entry, [])
        for path in library.path_names:
            found = stream(codec.kernels(library, path), codec.entry, cuts)
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_a_codec_of_the_released_size_gives_the_samples_of_its_graph(library: CpuLibrary) -> None:
    with exported(SNAC_24KHZ, "off") as codec:
        assert codec.weights.stat().st_size == native_codec_bytes(SNAC_24KHZ, "off")
        expected = stream(codec.graph(), codec.entry, [])
        found = stream(codec.kernels(library), codec.entry, [1, 2, 5])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@settings(max_examples=15, deadline=None)
@given(cuts=pieces, threads=st.integers(1, 3))
def test_cuts_and_threads_do_not_change_a_bit(
    library: CpuLibrary, tape: Exported, cuts: list[int], threads: int
) -> None:
    for path in library.path_names:
        whole = stream(tape.kernels(library, path), tape.entry, [])
        cut = stream(tape.kernels(library, path, threads), tape.entry, cuts)
        np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("code", [-1, CODEC.codebook_size])
def test_a_code_that_the_codebook_lacks_is_refused(
    library: CpuLibrary, tape: Exported, code: int
) -> None:
    call = chunk(tape.entry, 0, 2, np.zeros(tape.entry.state_size, np.float32))
    call["codes"][1, 6] = code
    with pytest.raises(BackendError, match="outside its table"):
        tape.kernels(library).decode(**call)


@pytest.mark.parametrize("name", ["codes", "state", "noise_2"])
def test_an_input_of_another_shape_is_refused(
    library: CpuLibrary, tape: Exported, name: str
) -> None:
    call = chunk(tape.entry, 0, 2, np.zeros(tape.entry.state_size, np.float32))
    if name == "noise_2":
        call["noise"][2] = call["noise"][2][1:]
    else:
        call[name] = call[name][..., 1:]
    with pytest.raises(ValueError, match=f"{name}: expected"):
        tape.kernels(library).decode(**call)


@pytest.mark.parametrize("position", [-1, 2**41])
def test_an_impossible_position_is_refused(
    library: CpuLibrary, tape: Exported, position: int
) -> None:
    call = chunk(tape.entry, 0, 1, np.zeros(tape.entry.state_size, np.float32))
    with pytest.raises(ValueError, match="position"):
        tape.kernels(library).decode(**{**call, "position": position})


@pytest.mark.parametrize("extra", [-64, 64], ids=["short", "long"])
def test_weights_of_another_codec_are_refused(
    library: CpuLibrary, tape: Exported, tmp_path: Path, extra: int
) -> None:
    content = tape.weights.read_bytes()
    place = tmp_path / NATIVE_CODEC
    place.write_bytes(content[:extra] if extra < 0 else content + bytes(extra))
    with pytest.raises(ArtifactError, match="bytes of weights"):
        CpuCodec(place, tape.entry, threads=1, library=library)


def test_impossible_sizes_are_refused(library: CpuLibrary, tape: Exported) -> None:
    odd_width = replace(tape.entry, spec=replace(CODEC, decoder_dim=24))
    with pytest.raises(ArtifactError, match="a multiple of 2 to the power num_blocks"):
        CpuCodec(tape.weights, odd_width, threads=1, library=library)


def test_a_state_of_another_size_is_refused(library: CpuLibrary, tape: Exported) -> None:
    entry = replace(tape.entry, state_size=7)
    with pytest.raises(ArtifactError, match="the manifest says 7"):
        CpuCodec(tape.weights, entry, threads=1, library=library)
