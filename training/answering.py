"""Asks a checkpoint questions as its data has them, and hears the answers: what `eval`, `pairs` and
rehearsal share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.config import CheckpointConfig
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.progress import progress
from deeptalk_edge.training.checkpoint import model_of
from deeptalk_edge.training.data.conversations import BadSample
from deeptalk_edge.training.data.dataset import Reader, build_index, open_tokenizer, spread
from deeptalk_edge.training.data.samples import Question, heard_log_mel
from deeptalk_edge.training.generate import Answer, Sampling, generate
from deeptalk_edge.training.model import align_features
from deeptalk_edge.training.snac_files import load_snac
from deeptalk_edge.training.stages.prepare import system_of
from deeptalk_edge.training.stages.recipe import Source

Samples = NDArray[np.float32]

BATCH_SIZE = 16

_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # how byte-level BPE writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One answer."""

    text: str
    word_frames: tuple[int, ...]
    """The row of the answer in which each word begins."""
    frames: Ids
    """(A, K)."""


class Answerer:
    """A checkpoint that answers; greedy unless told otherwise. Not thread-safe."""

    def __init__(self, config: CheckpointConfig) -> None:
        """Raises ArtifactError if a file is missing or damaged."""
        self.model = model_of(config).eval()
        self.codec = load_snac(config.directory / "snac")
        self.tokenizer, _ = open_tokenizer(config.directory)
        self._max_rows = int(config.generation.get("max_rows", 1000))

    def answers(
        self, questions: Sequence[Question], sampling: Sampling | None = None
    ) -> list[Said]:
        """Answer questions, in their order; those with prompts of one length share a batch.

        Raises BadSample if a recording cannot be read.
        """
        by_shape: dict[tuple[int, bool, str], list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            length = len(question.prompt.rows)
            by_shape[length, bool(question.heard), question.speaker].append(i)
        groups = [
            places[i : i + BATCH_SIZE]
            for places in by_shape.values()
            for i in range(0, len(places), BATCH_SIZE)
        ]
        said: dict[int, Said] = {}
        for group in progress(groups, name="answer", unit="batch"):
            answers = self._generate([questions[i] for i in group], sampling)
            said |= zip(group, map(self._said, answers), strict=True)
        return [said[i] for i in range(len(questions))]

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Question], sampling: Sampling | None) -> list[Answer]:
        features, mask = None, None
        if questions[0].heard:
            masks = [torch.from_numpy(question.prompt.audio_mask)[None] for question in questions]
            heard = [
                align_features(self._hear(question), one)
                for question, one in zip(questions, masks, strict=True)
            ]
            features, mask = torch.cat(heard), torch.cat(masks)
        return generate(
            self.model,
            np.stack([question.prompt.rows for question in questions]),
            features,
            mask,
            speaker=questions[0].speaker,
            sampling=sampling,
            max_rows=self._max_rows,
        )

    def sound_of(self, frames: Ids) -> Samples:
        """Codec frames (A, K) decoded without noise."""
        if not len(frames):
            return np.zeros(0, np.float32)
        with torch.inference_mode():
            sound: Samples = self.codec.decode(torch.from_numpy(frames)[None])[0].numpy()
        return sound

    def _hear(self, question: Question) -> torch.Tensor:
        """Features (1, F, C) of all heard turns, end to end."""
        spec, pieces = self.model.spec, []
        for clips in question.heard:
            mel = torch.from_numpy(heard_log_mel(clips, spec))[None]
            pieces.append((self.model.encode(mel), clips))
        if len(pieces) == 1:
            return pieces[0][0]
        from deeptalk_edge.training.data.samples import num_frames_of

        return torch.cat([f[:, : num_frames_of(clips)] for f, clips in pieces], dim=1)

    def _said(self, answer: Answer) -> Said:
        known = [i for i in answer.text_ids if i < self.tokenizer.get_vocab_size()]
        return Said(
            text=self.tokenizer.decode(known, skip_special_tokens=True).strip(),
            word_frames=tuple(self._word_frames(answer.text_ids)),
            frames=answer.frames,
        )

    def _word_frames(self, text_ids: Sequence[int]) -> Iterator[int]:
        """A word begins with a space, but for the first."""
        is_first, known = True, self.tokenizer.get_vocab_size()
        specials = (self.model.spec.vocabulary.bos, self.model.spec.vocabulary.eos)
        for row, text_id in enumerate(text_ids):
            if text_id >= known or text_id in specials:
                continue
            token = self.tokenizer.id_to_token(text_id) or ""
            if is_first or token.startswith(_SPACE):
                yield row
            is_first = False


def questions_of(reader: Reader, task: str, max_questions: int) -> list[tuple[str, Question]]:
    """Name and question of some samples, spread evenly over those that the task fits.

    Raises SettingsError if no sample is good.
    """
    entries = build_index(reader).entries
    if not entries:
        raise SettingsError("no sample is good; `deeptalk-edge train check` says why")
    fitting = []
    for entry in entries:
        conversation = reader.files[entry.source].conversation(entry.line, entry.offset)
        with suppress(BadSample):
            question = reader.writers[entry.source].question(conversation, task)
            fitting.append((reader.name(entry.source, entry.line), question))
    return spread(fitting, max_questions)


def open_reader(
    config: CheckpointConfig, sources: Sequence[Source], *, max_rows: int = 4096
) -> Reader:
    """A reader of data as this checkpoint meets it. Raises ArtifactError if it is damaged."""
    return Reader(
        checkpoint=config.directory,
        spec=config.model,
        sources=tuple(sources),
        system=system_of(config),
        max_rows=max_rows,
    )
