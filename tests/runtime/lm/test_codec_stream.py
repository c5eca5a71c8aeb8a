"""The stream gives the samples of the whole decode for any cuts."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.noise import SEED_LIMIT, check_seed, gaussian_tape, noise_tape
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.lm.codec_stream import StreamingCodec, frames_to_sound
from deeptalk_edge.training.snac_files import load_snac
from tests.runtime.speaking_checkpoint import CODEC

FRAMES = np.random.default_rng(3).integers(0, CODEC.codebook_size, (9, 7))
SEED = 5


def stream(bundle: Bundle, cuts: list[int]) -> NDArray[np.float32]:
    entry = bundle.manifest.codec
    graph = OrtCodec(bundle.file(bundle.manifest.ort_graphs.codec), threads=1)
    codec = StreamingCodec(graph, entry, seed=SEED)
    return np.concatenate([*map(codec.push, np.split(FRAMES, cuts)), codec.finish()])


def whole(bundle: Bundle, *, tape: bool) -> NDArray[np.float32]:
    """Torch's decode of all frames at once."""
    snac = load_snac(bundle.path.parent / "checkpoint" / "snac")
    noise = noise_tape(CODEC, SEED, len(FRAMES)) if tape else None
    with torch.inference_mode():
        given = None if noise is None else [torch.from_numpy(block) for block in noise]
        return np.asarray(snac.decode(torch.from_numpy(FRAMES)[None], given)[0].numpy())


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 8), unique=True).map(sorted))
@pytest.mark.parametrize("tape", [False, True])
def test_any_chunking_equals_the_whole_decode(
    bundle: Bundle, tape_bundle: Bundle, tape: bool, cuts: list[int]
) -> None:
    used = tape_bundle if tape else bundle
    np.testing.assert_allclose(stream(used, cuts), whole(used, tape=tape), atol=1e-5)


def test_noise_changes_the_samples(bundle: Bundle, tape_bundle: Bundle) -> None:
    assert np.abs(stream(bundle, []) - stream(tape_bundle, [])).max() > 1e-3


def test_the_first_sample_comes_with_the_frame_that_completes_the_look_ahead(
    bundle: Bundle,
) -> None:
    entry = bundle.manifest.codec
    graph = OrtCodec(bundle.file(bundle.manifest.ort_graphs.codec), threads=1)
    codec = StreamingCodec(graph, entry)
    sizes = [codec.push(frame[None]).size for frame in FRAMES]
    assert frames_to_sound(entry) == 3
    assert sizes == [0, 0, 3 * 2048 - entry.delay_samples] + [2048] * 6
    assert codec.finish().size == entry.delay_samples


def test_an_answer_without_frames_has_no_sound(bundle: Bundle) -> None:
    assert StreamingCodec(NoCodec(), bundle.manifest.codec).finish().size == 0


class NoCodec:
    def decode(self, codes: object, **rest: object) -> NoReturn:
        raise AssertionError("nothing to decode")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("first", [0, 3])
def test_the_bundle_counts_noise_as_the_tape_does(first: int) -> None:
    for block, noise in enumerate(noise_tape(CODEC, SEED, 2, first)):
        per_frame = noise.size // 2
        ours = gaussian_tape(SEED, block, first * per_frame, 2 * per_frame)
        np.testing.assert_array_equal(ours, noise.ravel())


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 50))
def test_a_noise_sample_depends_on_its_place_alone(first: int, skip: int, count: int) -> None:
    tape: NDArray[np.float32] = gaussian_tape(1, 2, first, skip + count)
    np.testing.assert_array_equal(tape[skip:], gaussian_tape(1, 2, first + skip, count))
    assert np.isfinite(tape).all()


@pytest.mark.parametrize("seed", [2**63, SEED_LIMIT - 1])
def test_every_seed_that_settings_take_makes_noise(tape_bundle: Bundle, seed: int) -> None:
    check_seed(seed)
    graph = OrtCodec(tape_bundle.file(tape_bundle.manifest.ort_graphs.codec), threads=1)
    codec = StreamingCodec(graph, tape_bundle.manifest.codec, seed=seed)
    assert np.isfinite(np.concatenate([codec.push(FRAMES), codec.finish()])).all()
