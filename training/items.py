"""Conversations as the grid rows that a model trains on, and batches of them.

item     rows, what each row has to predict, and which audio frame a row hears
batch    items padded on the right; the frames index one table of features, which is remembered
         (`make tiny`) or encoded from the batch's own log-mels

Source: DeepTalk `data_util.py: extract_input_output`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deeptalk_edge.model.prompt import Segment, speak_as
from deeptalk_edge.model.rows import Ids, delay, text_rows
from deeptalk_edge.model.spec import ModelSpec, VocabularySpec
from deeptalk_edge.training.losses import IGNORE

NO_FRAME = -1

LENGTH_STEP = 8
"""Batches come in few lengths, for a matrix product is compiled for each (`experts.STRETCH`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One conversation, before padding."""

    rows: Ids
    """(T, K + 1)."""

    targets: Ids
    """(T, K + 1): what the next row holds, codes un-shifted, IGNORE where nothing is asked."""

    frames: Ids
    """(T,): the audio frame that a row hears, else NO_FRAME."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Items padded on the right, on the device."""

    rows: Tensor
    """(B, T, K + 1)."""

    targets: Tensor
    """(B, T, K + 1)."""

    frames: Tensor
    """(B, T): rows of the feature table."""

    live: Tensor
    """(B, T): rows that are no padding."""

    log_mel: Tensor | None = None
    """(U, M, 2F): what is heard, where the features are not remembered. Frame f of utterance u is
    row u * F + f of the feature table."""

    names: tuple[str, ...] = ()
    """Where each item comes from: file and line."""

    def halves(self) -> tuple[Batch, Batch]:
        """The first items and the last, of a batch with remembered features."""
        middle = len(self.rows) // 2
        first, last = (
            Batch(
                rows=self.rows[part],
                targets=self.targets[part],
                frames=self.frames[part],
                live=self.live[part],
                names=self.names[part],
            )
            for part in (slice(None, middle), slice(middle, None))
        )
        return first, last

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def speech_rows(self, vocabulary: VocabularySpec) -> Tensor:
        """Rows (B, T) that carry speech: a heard frame, or a code in any codebook."""
        is_code = torch.stack(
            [
                self.rows[..., i] - vocabulary.codebook_base(i) < vocabulary.codebook_size
                for i in range(vocabulary.num_codebooks)
            ]
        )
        return (self.frames != NO_FRAME) | is_code.any(dim=0)


def spoken_item(
    vocabulary: VocabularySpec,
    prompt: Segment,
    text_ids: Sequence[int],
    codes: Ids,
    frames: Ids,
    *,
    speaker: str,
    train_text: bool = True,
) -> Item:
    """An answer in text and codes (A, K); `text_ids` run from BOS to EOS.

    Without `train_text` the question does not tell the answer, so the first code, which is said
    before any text, is not predicted either.

    Raises ArtifactError if the checkpoint knows no such speaker.
    """
    ids = list(text_ids)
    answer_rows = delay(vocabulary, codes, ids)
    labels = np.full_like(answer_rows, IGNORE)
    if train_text:
        labels[: len(ids) + 1, -1] = answer_rows[: len(ids) + 1, -1]
    for i in range(vocabulary.num_codebooks):
        labels[i + 1 : i + 1 + len(codes), i] = codes[:, i]
        labels[i + 1 + len(codes), i] = vocabulary.end_audio
    if not train_text:
        labels[1, 0] = IGNORE
    rows = speak_as(vocabulary, prompt.rows, speaker)
    return _joined(rows, prompt.audio_mask, answer_rows, labels, frames)


def written_item(
    vocabulary: VocabularySpec, prompt: Segment, text_ids: Sequence[int], frames: Ids
) -> Item:
    """An answer in text only: what the second item of batch-parallel decoding sees."""
    ids = [*text_ids, vocabulary.eot]
    answer_rows = text_rows(vocabulary, ids)
    labels = np.full_like(answer_rows, IGNORE)
    labels[:, -1] = ids
    return _joined(prompt.rows, prompt.audio_mask, answer_rows, labels, frames)


def joined_segments(segments: Sequence[Segment]) -> Segment:
    """Segments one after the other."""
    return Segment(
        rows=np.concatenate([segment.rows for segment in segments]),
        audio_mask=np.concatenate([segment.audio_mask for segment in segments]),
    )


def text_segment(vocabulary: VocabularySpec, text_ids: Sequence[int]) -> Segment:
    """An earlier answer as history keeps it: its text alone."""
    rows = text_rows(vocabulary, list(text_ids))
    return Segment(rows=rows, audio_mask=np.zeros(len(rows), np.bool_))


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedItems:
    """Items padded on the right, still on the host and open to change."""

    rows: Ids
    targets: Ids
    frames: Ids
    live: npt.NDArray[np.bool_]

    def batch(
        self, *, log_mel: Tensor | None = None, names: Sequence[str] = (), device: str = "cpu"
    ) -> Batch:
        """As tensors on a device."""
        made = Batch(
            rows=torch.from_numpy(self.rows),
            targets=torch.from_numpy(self.targets),
            frames=torch.from_numpy(self.frames),
            live=torch.from_numpy(self.live),
            log_mel=log_mel,
            names=tuple(names),
        )
        return made if device == "cpu" else made.to(device)


def pad_items(items: Sequence[Item], spec: ModelSpec) -> PaddedItems:
    """Rows and targets (B, T, K + 1), frames and live (B, T); T is a multiple of LENGTH_STEP."""
    longest = max(len(item.rows) for item in items)
    length = longest + -longest % LENGTH_STEP
    padding = text_rows(spec.vocabulary, [spec.vocabulary.pad_text])
    rows = np.repeat(np.repeat(padding[None], length, axis=1), len(items), axis=0)
    targets = np.full_like(rows, IGNORE)
    frames = np.full(rows.shape[:2], NO_FRAME, np.int64)
    live = np.zeros(rows.shape[:2], np.bool_)
    for i, item in enumerate(items):
        rows[i, : len(item.rows)] = item.rows
        targets[i, : len(item.rows)] = item.targets
        frames[i, : len(item.rows)] = item.frames
        live[i, : len(item.rows)] = True
    return PaddedItems(rows=rows, targets=targets, frames=frames, live=live)


def corrupt_codes(
    rows: Ids, vocabulary: VocabularySpec, largest_share: float, rng: np.random.Generator
) -> None:
    """Replace some codes of the rows (B, T, K + 1), in place: what is fed, not what is asked.

    The share of wrong codes is drawn for each item and codebook from 0 to `largest_share`. A model
    that always sees a perfect history trusts it more than the text, and cannot go on after a code
    that it got wrong itself.
    """
    for i in range(vocabulary.num_codebooks):
        local = rows[..., i] - vocabulary.codebook_base(i)
        share = rng.uniform(0, largest_share, (len(rows), 1))
        hit = (local < vocabulary.codebook_size) & (rng.random(local.shape) < share)
        wrong = vocabulary.codebook_base(i) + rng.integers(0, vocabulary.codebook_size, local.shape)
        rows[..., i] = np.where(hit, wrong, rows[..., i])


def _joined(
    prompt_rows: Ids,
    audio_mask: npt.NDArray[np.bool_],
    answer_rows: Ids,
    labels: Ids,
    heard_frames: Ids,
) -> Item:
    """Join prompt and answer; the target of a row is the label of the next one."""
    num_prompt = len(prompt_rows)
    rows = np.concatenate([prompt_rows, answer_rows])
    targets = np.full_like(rows, IGNORE)
    targets[num_prompt - 1 : -1] = labels
    frames = np.full(len(rows), NO_FRAME, np.int64)
    frames[:num_prompt][audio_mask] = heard_frames
    return Item(rows=rows, targets=targets, frames=frames)
