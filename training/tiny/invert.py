"""`python -m deeptalk_edge.training.tiny.invert CHECKPOINT`: an encoder for its codec.

The tiny checkpoint's SNAC has no encoder, and its codes were made by a mel encoder that was thrown
away. Its inverse is learnt from what the checkpoint itself says: codes, decoded to sound, and from
the sound the codes again, each scale by cross-entropy after the true codes of the slower ones.
`make tiny` keeps the encoder that made its codes, and does not need this.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.model.prompt import Typed
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.progress import progress
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.data.codes import CODEC_ENCODER
from deeptalk_edge.training.data.dataset import open_template
from deeptalk_edge.training.generate import generate
from deeptalk_edge.training.loop import LoopSettings, train
from deeptalk_edge.training.losses import Losses
from deeptalk_edge.training.snac import (
    ResidualQuantizer,
    Snac,
    VectorQuantizer,
    scales_from_rows,
)
from deeptalk_edge.training.snac_files import load_snac
from deeptalk_edge.training.tiny.domain import questions
from deeptalk_edge.training.tiny.shape import SPEAKER, SYSTEM_PROMPT
from deeptalk_edge.training.tiny.tokens import Tokeniser

SHARPNESS = 12.0
"""Of the softmax over cosines."""

CLIP_FRAMES = 16
CLIPS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Fit the encoder and write it beside the checkpoint's weights."""
    parser = argparse.ArgumentParser(prog="invert", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, help=f"default CHECKPOINT/{CODEC_ENCODER}")
    parser.add_argument("--answers", type=int, default=320, help="to learn from")
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args(argv)
    codec = load_snac(args.checkpoint / "snac")
    said = own_answers(args.checkpoint, args.answers)
    held_out = max(1, len(said) // 20)
    tokeniser = fit_encoder(codec, said[held_out:], args.steps)
    shares = recovered(tokeniser, codec, said[:held_out])
    tokeniser.half().save(args.out or args.checkpoint / CODEC_ENCODER)
    print("codes recovered, slowest scale first:", " ".join(f"{share:.3f}" for share in shares))
    return 0


@torch.inference_mode()
def own_answers(checkpoint: Path, count: int, *, seed: int = 0) -> list[Ids]:
    """Codec frames (A, 7) of what a checkpoint answers to typed questions of its domain."""
    model = load_model(checkpoint).eval()
    template = open_template(checkpoint, model.spec)
    by_length: dict[int, list[Ids]] = defaultdict(list)
    asked = random.Random(seed).sample(questions(), count)
    for question in asked:
        rows = template.opening(SYSTEM_PROMPT, Typed(text=question.text)).rows
        by_length[len(rows)].append(rows)
    frames = []
    groups = [(rows[i : i + 16]) for rows in by_length.values() for i in range(0, len(rows), 16)]
    for group in progress(groups, name="answers", unit="batch"):
        answers = generate(model, np.stack(group), speaker=SPEAKER, mode="single", max_rows=100)
        frames += [answer.frames for answer in answers if len(answer.frames) > CLIP_FRAMES]
    random.Random(seed).shuffle(frames)
    return frames


def fit_encoder(codec: Snac, said: Sequence[Ids], num_steps: int) -> Tokeniser:
    """A mel encoder before the codec's own, frozen quantiser."""
    torch.manual_seed(0)
    tokeniser = Tokeniser(codec.spec)
    tokeniser.quantizer.load_state_dict(codec.quantizer.state_dict())
    tokeniser.quantizer.requires_grad_(False)
    pairs = [_sound_and_codes(codec, tokeniser, frames) for frames in said]
    mels = torch.cat([mel for mel, _ in pairs], dim=1)  # (M, F)
    codes = torch.cat([frames for _, frames in pairs])  # (A, 7)
    stride = codec.spec.vq_strides[0]

    def clips_at(step: int) -> list[tuple[Tensor, Tensor]]:
        draw = random.Random(step)
        starts = [draw.randrange(len(codes) - CLIP_FRAMES) for _ in range(CLIPS)]
        ends = [(start, start + CLIP_FRAMES) for start in starts]
        mel = torch.stack([mels[:, stride * a : stride * b] for a, b in ends])
        return [(mel, torch.stack([codes[a:b] for a, b in ends]))]

    def losses_of(clips: tuple[Tensor, Tensor]) -> Losses:
        mel, frames = clips
        mel = mel + 0.1 * torch.randn_like(mel)  # decoded sound is not recorded sound
        scales = scales_from_rows(frames, codec.spec)
        return scale_losses(tokeniser.encoder(mel), tokeniser.quantizer, scales)

    settings = LoopSettings(num_steps=num_steps, learning_rate=2e-3, weight_decay=0.01)
    train(tokeniser, clips_at, losses_of, settings, name="invert")
    return tokeniser.eval()


def scale_losses(
    latent: Tensor, quantizer: ResidualQuantizer, scales: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Cross-entropy of each scale's codes (B, F / stride), given the true slower ones."""
    residual, losses = latent, {}
    for i, (scale, wanted) in enumerate(zip(quantizer.quantizers, scales, strict=True)):
        assert isinstance(scale, VectorQuantizer)
        rows = F.normalize(scale.project(residual), dim=1).transpose(1, 2)
        logits = SHARPNESS * rows @ F.normalize(scale.codebook.weight).T
        losses[f"scale{i}"] = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        residual = residual - scale.expand(scale.rows(wanted))
    return losses


def recovered(tokeniser: Tokeniser, codec: Snac, said: Sequence[Ids]) -> list[float]:
    """The share of each scale's codes that come back from the decoded sound."""
    hits = np.zeros(codec.spec.frame_codes)
    count = 0
    for frames in said:
        sound = codec.decode(torch.from_numpy(frames)[None])[0].detach().numpy()
        found = tokeniser.codes(sound).numpy()
        hits += (found == frames).sum(axis=0)
        count += len(frames)
    return [float(hits[0] / count), float(hits[1:3].mean() / count), float(hits[3:].mean() / count)]


@torch.no_grad()
def _sound_and_codes(codec: Snac, tokeniser: Tokeniser, frames: Ids) -> tuple[Tensor, Tensor]:
    """The log-mel (M, F) of decoded frames, and the frames."""
    codes = torch.from_numpy(frames)
    sound = codec.decode(codes[None])
    return tokeniser.log_mel(sound)[0], codes


if __name__ == "__main__":
    sys.exit(main())
