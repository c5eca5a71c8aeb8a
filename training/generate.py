"""Answers from the torch model, row by row: the reference that the runtime is held against.

batch-parallel   two items a question: the second one's rows hold no speech, and its text is
                 believed
single           one item: text and codes from the same hidden state

Source: DeepTalk `eval_qa.py: batch_parallel_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deeptalk_edge.model.prompt import speak_as
from deeptalk_edge.model.rows import AnswerRows, Ids, codec_columns
from deeptalk_edge.training.model import Cache, DeepTalk

Mode = Literal["batch-parallel", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next ids are drawn; a top_k of 1 is greedy, one above the vocabulary draws from all
    of it."""

    text_top_k: int = 1
    audio_top_k: int = 1
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one question was answered with."""

    text_ids: list[int]
    """As sampled, up to EOS, which is included."""

    frames: Ids
    """Codec frames (A, K), un-delayed."""

    is_complete: bool
    """Text and speech came to their ends; else `max_rows` cut them off."""


@torch.inference_mode()
def generate(
    model: DeepTalk,
    prompts: Ids,
    features: Tensor | None = None,
    audio_mask: Tensor | None = None,
    *,
    speaker: str,
    mode: Mode = "batch-parallel",
    sampling: Sampling | None = None,
    max_rows: int = 1000,
) -> list[Answer]:
    """Answer N questions whose prompts (N, T, K + 1) have one length, PAD_A in their last rows.

    `features` (N, T, C) and `audio_mask` (N, T) as `DeepTalk.embed` takes them.

    Raises ArtifactError if the checkpoint knows no such speaker.
    """
    vocabulary, device = model.spec.vocabulary, next(model.parameters()).device
    sampling = sampling or Sampling()
    generator = torch.Generator(device).manual_seed(sampling.seed)
    num_questions, silent = len(prompts), codec_columns(vocabulary, vocabulary.pad_audio)
    items = [speak_as(vocabulary, prompt, speaker) for prompt in prompts]
    if mode == "batch-parallel":
        items += list(prompts)
        features = None if features is None else torch.cat([features, features])
        audio_mask = None if audio_mask is None else torch.cat([audio_mask, audio_mask])
    rows = torch.from_numpy(np.stack(items)).to(device)
    cache = Cache()
    hidden = model(rows, features, audio_mask, cache=cache)[:, -1]
    answers = [AnswerRows(vocabulary) for _ in range(num_questions)]
    texts: list[list[int]] = [[] for _ in answers]
    frames: list[list[Ids]] = [[] for _ in answers]
    for _ in range(max_rows):
        text_ids = _sample(
            model.text_logits(hidden[-num_questions:]), sampling.text_top_k, sampling, generator
        )
        code_ids = _sample(
            model.code_logits(hidden[:num_questions]), sampling.audio_top_k, sampling, generator
        )
        fed = []
        for i, answer in enumerate(answers):
            if not answer.is_text_done:
                texts[i].append(int(text_ids[i]))
            row, frame = answer.push(int(text_ids[i]), code_ids[i])
            if frame is not None:
                frames[i].append(frame)
            fed.append(row)
        if all(answer.is_done for answer in answers):
            break
        if mode == "batch-parallel":
            fed += [np.append(silent, row[-1]) for row in fed]
        step = torch.from_numpy(np.stack(fed)).to(device)[:, None]
        hidden = model(step, cache=cache)[:, -1]
    return [
        Answer(
            text_ids=text,
            frames=np.array(spoken, np.int64).reshape(-1, vocabulary.num_codebooks),
            is_complete=answer.is_done,
        )
        for answer, text, spoken in zip(answers, texts, frames, strict=True)
    ]


def _sample(logits: Tensor, top_k: int, sampling: Sampling, generator: torch.Generator) -> Ids:
    """Ids (...) drawn from (..., V)."""
    if top_k == 1:
        ids: Ids = logits.argmax(dim=-1).cpu().numpy()
        return ids
    top_k = min(top_k, logits.shape[-1])
    best, candidates = (logits.float() / sampling.temperature).topk(top_k, dim=-1)
    drawn = torch.multinomial(best.softmax(-1).flatten(0, -2), 1, generator=generator)
    ids = candidates.gather(-1, drawn.view(*best.shape[:-1], 1))[..., 0].cpu().numpy()
    return ids
