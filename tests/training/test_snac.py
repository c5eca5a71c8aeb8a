"""Our SNAC against the published package, with random weights: any checkpoint of it is ours too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.noise import noise_tape
from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.training.snac import Snac, VectorQuantizer, rows_from_scales, scales_from_rows
from deeptalk_edge.training.snac_files import load_snac, save_snac

TOLERANCE = 1e-4  # float32 through some forty convolutions

FIELDS: dict[str, Any] = {
    "sampling_rate": 24000,
    "encoder_dim": 6,
    "encoder_rates": (2, 4, 8, 8),
    "latent_dim": 96,
    "decoder_dim": 64,
    "decoder_rates": (8, 8, 4, 2),
    "codebook_size": 32,
    "codebook_dim": 8,
    "vq_strides": (4, 2, 1),
    "noise": True,
    "depthwise": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "24 kHz": {},
    "dense": {"depthwise": False},
    "no noise": {"noise": False},
    "four scales, odd rates": {
        "encoder_rates": (3, 3, 7),
        "latent_dim": 48,
        "decoder_rates": (7, 3, 3),
        "vq_strides": (8, 4, 2, 1),
    },
}


def _pair(**changes: Any) -> tuple[Any, Snac]:
    """The package's model with random weights, and ours with the same."""
    package = pytest.importorskip("snac")
    spec = CodecSpec(**{**FIELDS, **changes})
    torch.manual_seed(0)
    theirs = package.SNAC(
        attn_window_size=None, **{name: getattr(spec, name) for name in FIELDS}
    ).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("alpha"):  # all ones in a new model would hide a wrong axis
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    ours = Snac(spec).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _random_scales(spec: CodecSpec, num_frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(
            spec.codebook_size,
            (2, num_frames * spec.vq_strides[0] // stride),
            generator=generator,
        )
        for stride in spec.vq_strides
    ]


@pytest.fixture
def small_spec() -> CodecSpec:
    return CodecSpec(**FIELDS)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_encoder_equals_the_packages(shape: str) -> None:
    theirs, ours = _pair(**SHAPES[shape])
    samples = torch.randn(2, 1, 3 * ours.spec.frame_samples)
    assert ours.encoder is not None
    torch.testing.assert_close(
        ours.encoder(samples), theirs.encoder(samples), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_quantiser_equals_the_packages(shape: str) -> None:
    theirs, ours = _pair(**SHAPES[shape])
    latent = torch.randn(2, ours.spec.latent_dim, 3 * ours.spec.vq_strides[0])
    their_latent, their_scales = theirs.quantizer(latent)
    quantised = ours.quantizer(latent)
    for found, wanted in zip(quantised.scales, their_scales, strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(quantised.latent, their_latent, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        ours.quantizer.latent(quantised.scales), their_latent, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_decoder_equals_the_packages_on_the_same_noise(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = _pair(**SHAPES[shape])
    scales = _random_scales(ours.spec, num_frames=3)
    tape = [torch.from_numpy(noise) for noise in noise_tape(ours.spec, seed=5, num_frames=3)]
    blocks = iter(tape)
    monkeypatch.setattr("snac.layers.torch.randn", lambda *_, **__: next(blocks))
    wanted = theirs.decode(scales)[:, 0]
    found = ours.decode(rows_from_scales(scales, ours.spec), tape)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_noise_off_equals_the_package_with_silent_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair()
    scales = _random_scales(ours.spec, num_frames=3)
    monkeypatch.setattr("snac.layers.torch.randn", lambda *_, **__: torch.zeros(1))
    found = ours.decode(rows_from_scales(scales, ours.spec))
    torch.testing.assert_close(found, theirs.decode(scales)[:, 0], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_encode_gives_the_packages_codes_in_our_column_order() -> None:
    theirs, ours = _pair()
    samples = torch.randn(1, 2 * ours.spec.frame_samples + 100)
    coarse, middle, fine = theirs.encode(samples[:, None])
    rows = ours.encode(samples)
    assert rows.shape == (1, 3, ours.spec.frame_codes)
    assert torch.equal(rows[..., 0].flatten(1), coarse)
    assert torch.equal(rows[..., 1:3].flatten(1), middle)
    assert torch.equal(rows[..., 3:7].flatten(1), fine)


def test_rows_and_scales_convert_into_each_other(small_spec: CodecSpec) -> None:
    rows = torch.arange(2 * 5 * 7).view(2, 5, 7)
    scales = scales_from_rows(rows, small_spec)
    assert [scale.shape[1] for scale in scales] == [5, 10, 20]
    assert scales[2][0, :5].tolist() == [3, 4, 5, 6, 10]
    assert torch.equal(rows_from_scales(scales, small_spec), rows)


def test_the_quantisers_loss_pulls_projection_and_codebook_together(small_spec: CodecSpec) -> None:
    torch.manual_seed(0)
    quantizer = Snac(small_spec, with_encoder=False).quantizer
    latent = torch.randn(2, small_spec.latent_dim, 32, requires_grad=True)
    loss = quantizer(latent).loss
    loss.backward()
    assert latent.grad is not None
    latent_step = 1e-2 * latent.grad
    assert quantizer((latent - latent_step).detach()).loss < loss
    with torch.no_grad():
        for level in quantizer.quantizers:
            assert isinstance(level, VectorQuantizer)
            rows = level.codebook.weight
            assert rows.grad is not None
            rows -= 1e-2 * rows.grad
    assert quantizer(latent.detach()).loss < loss


def test_the_gradient_passes_the_quantiser_straight_through(small_spec: CodecSpec) -> None:
    torch.manual_seed(0)
    quantizer = Snac(small_spec, with_encoder=False).quantizer
    latent = torch.randn(1, small_spec.latent_dim, 8, requires_grad=True)
    quantizer(latent).latent.sum().backward()
    assert latent.grad is not None
    assert latent.grad.abs().sum() > 0


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_noise_tape_does_not_depend_on_how_it_is_cut(small_spec: CodecSpec, cut: int) -> None:
    whole = noise_tape(small_spec, seed=3, num_frames=5)
    first = noise_tape(small_spec, seed=3, num_frames=cut)
    rest = noise_tape(small_spec, seed=3, num_frames=5 - cut, first_frame=cut)
    for block, noise in enumerate(whole):
        assert np.array_equal(np.concatenate([first[block], rest[block]], axis=-1), noise)


def test_the_noise_tape_is_white_and_standard_normal(small_spec: CodecSpec) -> None:
    noise = noise_tape(small_spec, seed=0, num_frames=100)[-1].ravel()
    other = noise_tape(small_spec, seed=1, num_frames=100)[-1].ravel()
    bound = 4 / np.sqrt(noise.size)  # four standard errors
    assert abs(noise.mean()) < bound
    assert abs(noise.std() - 1) < bound
    assert abs((noise[1:] * noise[:-1]).mean()) < bound
    assert abs((noise * other).mean()) < bound
    assert 3.5 < np.abs(noise).max() < 6.5


@torch.inference_mode()
def test_a_saved_codec_decodes_alike_after_loading(small_spec: CodecSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Snac(small_spec, with_encoder=False)
    save_snac(codec, tmp_path / "snac")
    loaded = load_snac(tmp_path / "snac")
    assert loaded.spec == small_spec
    codes = torch.randint(small_spec.codebook_size, (1, 4, 7))
    signal, error = codec.decode(codes), loaded.decode(codes) - codec.decode(codes)
    assert error.norm() < 1e-2 * signal.norm()  # float16 weights: 11 bits, 40 layers
    with pytest.raises(ArtifactError, match=r"encoder\.\*"):
        loaded.encode(torch.zeros(1, 2048))


def test_the_packages_own_file_loads(tmp_path: Path) -> None:
    theirs, ours = _pair()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    config = {**FIELDS, "attn_window_size": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_snac(tmp_path)
    assert loaded.encoder is not None
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


NAME = "quantizer.quantizers.1.codebook.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(NAME), f"{NAME} is missing"),
        (lambda t: t.update({NAME: t[NAME][:5].clone()}), rf"{NAME} is \(5, 8\)"),
        (lambda t: t.update({"decoder.extra": torch.zeros(1)}), r"no place for .*decoder\.extra"),
        (lambda t: t.update({"encoder.odd": torch.zeros(1)}), r"encoder\.\S+"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Any, complaint: str, small_spec: CodecSpec, tmp_path: Path
) -> None:
    save_snac(Snac(small_spec, with_encoder=False), tmp_path / "snac")
    path = tmp_path / "snac" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=complaint):
        load_snac(tmp_path / "snac")


def test_damaged_weights_are_refused(small_spec: CodecSpec, tmp_path: Path) -> None:
    save_snac(Snac(small_spec, with_encoder=False), tmp_path / "snac")
    (tmp_path / "snac" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match="no readable SNAC weights"):
        load_snac(tmp_path / "snac")
