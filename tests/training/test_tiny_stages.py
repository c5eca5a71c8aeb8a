"""Features in training, and the tensors that each stage of the tiny model trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.model.spec import EncoderSpec
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.table import apply_rule
from deeptalk_edge.training.tiny.hearing import Ear, HearingSettings
from deeptalk_edge.training.tiny.stages import (
    HeardMemory,
    Stage,
    remember,
    start_decoder,
)
from tests.specs import PLAIN

ENCODER = EncoderSpec(
    num_mel_bins=80, width=48, num_layers=2, num_heads=4, ffn_width=32, max_frames=100
)
SPEC = replace(PLAIN, encoder=ENCODER)
WINDOW = 2 * ENCODER.max_frames


def _clips(count: int = 3) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Noise of different lengths, multiples of the hop, after 30 ms of silence as a clip has it."""
    rng, silence = np.random.default_rng(0), np.zeros(480, np.float32)
    noises = [rng.normal(0, 0.1, 160 * (57 + 20 * i)).astype(np.float32) for i in range(count)]
    return [np.concatenate([silence, noise]) for noise in noises]


def _ear() -> Ear:
    return Ear(_clips(), ENCODER, HearingSettings(), "cpu")


def test_without_variation_training_features_equal_the_devices() -> None:
    ear, rng = _ear(), np.random.default_rng(0)
    takes = ear.plan(np.arange(3), rng, strength=0.0)
    heard = ear.hear(takes, WINDOW, rng)
    for clip, mel in zip(_clips(), heard.numpy(), strict=True):
        whole = mel[:, : len(clip) // 160 - 2]  # the last frames reach into the silence after it
        expected = log_mel(clip, ENCODER)[:, : whole.shape[1]]
        np.testing.assert_allclose(whole, expected, atol=2e-3)  # kept in float16


def test_variation_changes_the_sound_and_not_its_range() -> None:
    ear, rng = _ear(), np.random.default_rng(0)
    clean = ear.hear(ear.plan(np.arange(3), rng, strength=0.0), WINDOW, rng)
    varied = ear.hear(ear.plan(np.arange(3), rng), WINDOW, rng)
    assert not torch.allclose(clean, varied, atol=0.1)
    spans = varied.amax(dim=(1, 2)) - varied.amin(dim=(1, 2))
    assert (spans <= 2.0 + 1e-5).all()  # eight decades, as `log_mel` clamps them
    assert varied.isfinite().all()


def test_a_bend_moves_formants_and_a_blur_takes_the_pitch_away() -> None:
    """A tone represents a harmonic: bending moves it to another bin, blurring widens it."""
    tone = np.sin(2 * np.pi * 1000 / 16000 * np.arange(16000), dtype=np.float32)
    still = {
        "stretch": (1.0, 1.0),
        "warp": (1.0, 1.0),
        "equaliser": 0.0,
        "level": (0.0, 0.0),
        "noise_share": 0.0,
        "mask_share": 0.0,
    }

    def peaks(bend: float, blur_share: float) -> tuple[set[int], float]:
        settings = HearingSettings(bend=bend, blur_share=blur_share, **still)  # type: ignore[arg-type]
        ear, rng = Ear([tone] * 8, ENCODER, settings, "cpu"), np.random.default_rng(0)
        takes = ear.plan(np.arange(8), rng)
        frames = ear.hear(takes, WINDOW, rng)[range(8), :, takes.lead + 50]
        return set(frames.argmax(dim=1).tolist()), float(frames.diff(dim=1).abs().max())

    (plain, edge), (bent, _), (_, soft_edge) = peaks(0.0, 0.0), peaks(8.0, 0.0), peaks(0.0, 1.0)
    assert max(plain) - min(plain) <= 3
    assert max(bent) - min(bent) > 6
    assert soft_edge < 0.98 * edge


def test_full_margins_keep_the_most_silence() -> None:
    settings, rng = (
        HearingSettings(max_lead_frames=10, max_trail_frames=20),
        np.random.default_rng(0),
    )
    ear = Ear(_clips(), ENCODER, settings, "cpu")
    takes = ear.plan(np.arange(3), rng, 0.0, full_margins=True)
    assert takes.lead.tolist() == [10] * 3
    assert (takes.mel_frames - ear.lengths).tolist() == [30] * 3


def test_remembered_features_equal_those_of_the_whole_window() -> None:
    torch.manual_seed(0)
    model, ear = DeepTalk(SPEC), _ear()
    memory = remember(
        model, ear, np.array([2, 0]), strength=0.0, bfloat16=False, seed=1, batch_size=1
    )
    rng = np.random.default_rng(1)
    takes = ear.plan(np.array([2]), rng, 0.0, full_margins=True)
    expected = model.encode(ear.hear(takes, WINDOW, rng))[0, : takes.num_frames[0]]
    first, count = memory.spans[2]
    torch.testing.assert_close(memory.features[first : first + count], expected.half())
    assert memory.spans[0][0] == count
    assert len(memory.features) == sum(span[1] for span in memory.spans.values())


def test_remembered_features_survive_saving_and_loading(tmp_path: Path) -> None:
    memory = HeardMemory(torch.randn(5, 3).half(), {7: (0, 2), 4: (2, 3)})
    memory.save(tmp_path / "heard.safetensors")
    read = HeardMemory.load(tmp_path / "heard.safetensors", "cpu")
    assert torch.equal(read.features, memory.features)
    assert read.spans == memory.spans
    assert [path.name for path in tmp_path.iterdir()] == ["heard.safetensors"]


def test_frames_are_counted_as_on_a_device() -> None:
    ear = _ear()
    takes = ear.plan(np.arange(3), np.random.default_rng(0), strength=0.0)
    for samples, frames in zip(160 * takes.mel_frames, takes.num_frames, strict=True):
        assert frames == num_frames(int(samples))


@pytest.mark.parametrize(
    ("stage", "attention", "audio_expert", "text_expert"),
    [
        (Stage.ALIGN, True, True, True),
        (Stage.AUDIO, False, True, False),
        (Stage.TEXT, False, False, True),
        (Stage.JOINT, True, True, True),
    ],
)
def test_a_stage_trains_the_tensors_of_the_official_trainers_table(
    stage: Stage, attention: bool, audio_expert: bool, text_expert: bool
) -> None:
    model = DeepTalk(PLAIN)
    apply_rule(model, stage.rule, [[0, 1], [2, 3]])
    moves = {name: p.requires_grad for name, p in model.named_parameters()}
    assert moves["model.layers.0.self_attn.q_proj.weight"]
    assert moves["model.embed_tokens.weight"]
    assert moves["model.layers.1.mlp.gate.weight"]
    assert moves["model.layers.1.mlp.shared_experts.up_proj.weight"]
    assert moves["model.layers.1.self_attn.q_proj.weight"] is attention
    assert moves["model.layers.2.self_attn.o_proj.weight"] is attention
    assert moves["model.layers.1.mlp.experts.0.up_proj.weight"] is audio_expert
    assert moves["model.layers.2.mlp.experts.0.up_proj.weight"] is text_expert
    assert not any(moves[name] for name in moves if name.startswith("model.audio_"))


def test_stages_can_follow_one_another() -> None:
    model = DeepTalk(PLAIN)
    for stage in Stage:
        apply_rule(model, stage.rule, [[0, 1], [2, 3]])
    assert all(p.requires_grad for p in model.model.layers.parameters())


def test_a_new_decoder_keeps_its_structure() -> None:
    model = DeepTalk(PLAIN)
    start_decoder(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.1)
