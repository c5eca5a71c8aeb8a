"""The tiny checkpoint as it is used: a recorded question in, text and codec frames out, in
torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from deeptalk_edge.features import SAMPLES_PER_FRAME, log_mel, num_frames
from deeptalk_edge.prompt import Heard
from deeptalk_edge.rows import Ids
from deeptalk_edge.training.generate import Mode, generate
from deeptalk_edge.training.model import DeepTalk, align_features
from deeptalk_edge.training.tiny.shape import SPEAKER, SYSTEM_PROMPT, tiny_template
from deeptalk_edge.training.tiny.tokenizer import decode

Samples = npt.NDArray[np.float32]

MAX_ROWS = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a question was answered with."""

    text: str
    frames: Ids
    """Codec frames (A, K)."""

    is_complete: bool


class TorchKiosk:
    """Answers recorded questions, many at a time where their lengths agree."""

    def __init__(
        self, model: DeepTalk, tokenizer: Tokenizer, mode: Mode = "batch-parallel"
    ) -> None:
        self._model, self._tokenizer, self._mode = model.eval(), tokenizer, mode
        self._template = tiny_template(model.spec, tokenizer)

    def __call__(self, pcm: Samples) -> Reply:
        """Answer one question, 16 kHz."""
        return self._answer_group([pcm])[0]

    def answer_all(
        self, clips: Sequence[Samples], *, round_to_frames: int = 32, group_size: int = 64
    ) -> list[Reply]:
        """Answer many. Each is followed by silence up to a multiple of `round_to_frames`, so that
        prompts of one length can share a batch."""
        groups: dict[int, list[int]] = defaultdict(list)
        width = round_to_frames * SAMPLES_PER_FRAME
        for i, clip in enumerate(clips):
            groups[-(-len(clip) // width) * width].append(i)
        replies: dict[int, Reply] = {}
        for length, members in groups.items():
            for first in range(0, len(members), group_size):
                group = members[first : first + group_size]
                padded = [np.pad(clips[i], (0, length - len(clips[i]))) for i in group]
                replies.update(zip(group, self._answer_group(padded), strict=True))
        return [replies[i] for i in range(len(clips))]

    @torch.inference_mode()
    def _answer_group(self, clips: Sequence[Samples]) -> list[Reply]:
        """Answer recordings of one length."""
        spec, device = self._model.spec, next(self._model.parameters()).device
        mels = np.stack([log_mel(clip, spec.encoder) for clip in clips])
        encoded = self._model.encode(torch.from_numpy(mels).to(device))
        user = Heard(num_frames=num_frames(len(clips[0])))
        prompt = self._template.opening(SYSTEM_PROMPT, user)
        mask = torch.from_numpy(prompt.audio_mask).to(device).expand(len(clips), -1)
        answers = generate(
            self._model,
            np.repeat(prompt.rows[None], len(clips), axis=0),
            align_features(encoded, mask),
            mask,
            speaker=SPEAKER,
            mode=self._mode,
            max_rows=MAX_ROWS,
        )
        return [
            Reply(
                text=decode(self._tokenizer, answer.text_ids).strip(),
                frames=answer.frames,
                is_complete=answer.is_complete,
            )
            for answer in answers
        ]
