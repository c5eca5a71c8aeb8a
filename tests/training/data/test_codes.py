"""The codec's encoder computes the codes of a recording once; later they come from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.sound.wav import WavWriter
from deeptalk_edge.training.data.codes import CODEC_ENCODER, CodeCache, open_code_writer
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import load_snac, save_snac
from tests.places import TINY

SECONDS = 0.5


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "answer.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, round(24000 * SECONDS))
    writer = WavWriter(path, 24000)
    writer.write(noise.astype(np.float32))
    writer.close()
    return path


def test_the_shipped_encoder_makes_frames_of_the_shipped_codec(recording: Path) -> None:
    frames = CodeCache(TINY, recording.parent / "cache").codes_of(recording)
    assert frames.shape == (-(-round(24000 * SECONDS) // 2048), 7)
    assert frames.max() < load_snac(TINY / "snac").spec.codebook_size


def test_a_recording_is_encoded_once(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = recording.parent / "cache"
    first = CodeCache(TINY, cache).codes_of(recording)
    (stored,) = cache.iterdir()
    stored.write_text(" ".join(["7"] * first.size))
    assert (CodeCache(TINY, cache).codes_of(recording) == 7).all()


def test_snacs_encoder_is_used_if_there_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = load_snac(TINY / "snac").spec
    save_snac(Snac(spec), tmp_path / "snac")
    codec = load_snac(tmp_path / "snac")
    samples = np.random.default_rng(0).normal(0, 0.1, 3000).astype(np.float32)
    expected = codec.encode(torch.from_numpy(np.pad(samples, (0, 1096)))[None])[0]
    assert open_code_writer(tmp_path).codes(samples).tolist() == expected.tolist()


def test_a_codec_without_an_encoder_is_named(tmp_path: Path) -> None:
    shutil.copytree(TINY / "snac", tmp_path / "snac")
    with pytest.raises(SettingsError, match="can only decode"):
        open_code_writer(tmp_path)


def test_the_encoder_of_another_codec_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY / "snac", tmp_path / "snac")
    tensors = load_file(TINY / CODEC_ENCODER)
    name = "quantizer.quantizers.0.codebook.weight"
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / CODEC_ENCODER)
    with pytest.raises(ArtifactError, match="belongs to another codec"):
        open_code_writer(tmp_path)
