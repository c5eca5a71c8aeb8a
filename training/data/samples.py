"""One conversation, read for one task, as the item that a model trains on.

task                 question     answer
ASRRAW               heard        text; the last prompt row holds the ASR token
AQA, AQACONV         heard        text
AQAA, AQACONVA       heard        text and codes
RQACONV, RQACONVA    heard (70 %) or typed, drawn for each turn that is both
TQA, TQAA            typed        text, or text and codes
TTS                  typed        text and codes: a request to say the sentence

A dialogue is cut at one answer, drawn from those that will do (evaluation takes the last), and only
that answer is trained. Where codes are required, the answer must have them.

Source: DeepTalk `data_util.py`; what is refused here is misaligned or dropped there in silence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, AudioError
from deeptalk_edge.model.features import RATE_HZ, log_mel, max_samples, num_frames
from deeptalk_edge.model.prompt import Heard, Segment, Template, Typed, speak_as
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.data.codes import CodeCache
from deeptalk_edge.training.data.conversations import (
    BadSample,
    Clip,
    Conversation,
    Preferred,
    Turn,
    read_code_file,
)
from deeptalk_edge.training.data.sounds import clip_seconds, read_clips
from deeptalk_edge.training.items import (
    Item,
    joined_segments,
    spoken_item,
    text_segment,
    written_item,
)

HEARD_SHARE = 0.7
"""Of the turns of RQACONV that could be either."""

SPOKEN_TASKS = frozenset({"AQAA", "AQACONVA", "RQACONVA", "TTS", "TQAA"})
HEARING_TASKS = frozenset({"ASRRAW", "AQA", "AQAA", "AQACONV", "AQACONVA"})
EITHER_TASKS = frozenset({"RQACONV", "RQACONVA"})

TTS_REQUEST = "Say the sentence in brackets and nothing else.\n[{text}]"
"""How a text is asked to be spoken; the official wording is another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An item and what it hears, which is read only when a batch is made."""

    item: Item
    heard: tuple[tuple[Clip, ...], ...]
    """The recordings of each heard turn."""

    answer: str
    question: str
    """The last user turn's text; "" where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt to be answered."""

    prompt: Segment
    heard: tuple[tuple[Clip, ...], ...]
    text: str
    answer: str
    """The one that is wanted."""
    speaker: str


class SampleWriter:
    """Writes conversations as samples, for one checkpoint's vocabulary."""

    def __init__(
        self, spec: ModelSpec, template: Template, *, system: str, cache: CodeCache | None
    ) -> None:
        self._spec, self._template, self._system, self._cache = spec, template, system, cache

    def sample(self, conversation: Conversation, task: str, draw: random.Random | None) -> Sample:
        """Raises BadSample, saying what is wrong. Without `draw` the choice is the evaluation's:
        the last answer, heard where it can be."""
        system, turns = self._turns(conversation, task, draw)
        *history, user, answer = turns
        prompt, heard = self._prompt(system, [*history, user], task, draw)
        frames = np.concatenate(
            [
                np.arange(num_frames_of(clips)) + i * self._spec.encoder.max_frames
                for i, clips in enumerate(heard)
            ]
            or [np.zeros(0, np.int64)]
        )
        if task in SPOKEN_TASKS:
            item = self._spoken(prompt, answer, frames)
        else:
            if task == "ASRRAW":
                rows = self._speaker_rows(prompt.rows, "ASR")
                prompt = Segment(rows=rows, audio_mask=prompt.audio_mask)
            item = written_item(self._template.vocabulary, prompt, self._text(answer), frames)
        return Sample(item=item, heard=tuple(heard), answer=answer.text, question=user.text)

    def pair(self, preferred: Preferred, task: str) -> tuple[Sample, Sample]:
        """The better and the worse answer to one prompt. Raises BadSample as `sample` does."""
        turns = preferred.prompt.turns
        if turns[-1].role != "assistant":
            raise BadSample("the last turn of a pair's conversation must be the answer's text")

        def with_codes(codes: tuple[int, ...] | Path) -> Conversation:
            last = turns[-1]
            answer = Turn(
                role="assistant",
                text=last.text,
                codes=codes,
                speaker=last.speaker,
                word_frames=last.word_frames,
            )
            return Conversation(turns=(*turns[:-1], answer), name=preferred.prompt.name)

        win = self.sample(with_codes(preferred.win), task, None)
        return win, self.sample(with_codes(preferred.lose), task, None)

    def question(self, conversation: Conversation, task: str) -> Question:
        """The prompt alone, heard where the task hears; and the answer that is wanted. Raises
        BadSample as `sample` does."""
        system, turns = self._turns(conversation, task, None)
        prompt, heard = self._prompt(system, turns[:-1], task, None)
        return Question(
            prompt=prompt,
            heard=tuple(heard),
            text=turns[-2].text,
            answer=turns[-1].text,
            speaker=turns[-1].speaker,
        )

    def _turns(
        self, conversation: Conversation, task: str, draw: random.Random | None
    ) -> tuple[str, list[Turn]]:
        """The system text, and the turns up to the answer that is trained."""
        turns = list(conversation.turns)
        system = self._system
        if turns[0].role == "system":
            system, turns = turns[0].text, turns[1:]
        for i, turn in enumerate(turns):
            if turn.role != ("user", "assistant")[i % 2]:
                raise BadSample(f"turn {i + 1} is the {turn.role}'s; user and assistant alternate")
        ends = [
            i
            for i, turn in enumerate(turns)
            if turn.role == "assistant"
            and (task not in SPOKEN_TASKS or turn.codes is not None or turn.clips)
        ]
        if not ends:
            needed = "an answer with codec or wavpath" if task in SPOKEN_TASKS else "an answer"
            raise BadSample(f"{task} needs {needed}, and there is none")
        end = draw.choice(ends) if draw else ends[-1]
        return system, turns[: end + 1]

    def _prompt(
        self, system: str, turns: Sequence[Turn], task: str, draw: random.Random | None
    ) -> tuple[Segment, list[tuple[Clip, ...]]]:
        segments: list[Segment] = []
        heard: list[tuple[Clip, ...]] = []
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                ids = self._template.answer(turn.text)
                segments.append(text_segment(self._template.vocabulary, ids))
                continue
            user: Heard | Typed
            if self._is_heard(turn, task, draw):
                user = Heard(num_frames=self._check_clips(turn.clips))
                heard.append(turn.clips)
            else:
                text = TTS_REQUEST.format(text=turn.text) if task == "TTS" else turn.text
                user = Typed(text=text)
            first = i == 0
            segments.append(
                self._template.opening(system, user) if first else self._template.next_turn(user)
            )
        return joined_segments(segments), heard

    def _is_heard(self, turn: Turn, task: str, draw: random.Random | None) -> bool:
        if task in HEARING_TASKS and not turn.clips:
            raise BadSample(f"{task} needs the question's wavpath")
        if task in HEARING_TASKS:
            return True
        can_be_typed = bool(turn.text.strip())
        if task in EITHER_TASKS and turn.clips:
            return not can_be_typed or draw is None or draw.random() < HEARD_SHARE
        if not can_be_typed:
            raise BadSample("a typed question has no text")
        return False

    def _check_clips(self, clips: tuple[Clip, ...]) -> int:
        count = num_frames_of(clips)
        most = num_frames(max_samples(self._spec.encoder))
        if count > most:
            raise BadSample(
                f"{clips[0].path}: {count / 50:.1f} s of speech, the encoder takes "
                f"{most / 50:.1f} s"
            )
        return count

    def _spoken(self, prompt: Segment, answer: Turn, frames: Ids) -> Item:
        codes = self._codes(answer)
        text_ids = self._text(answer, num_codes=len(codes))
        most = len(codes) + 1 + self._spec.vocabulary.num_codebooks
        if len(text_ids) + 1 > most:
            raise BadSample(
                f"the text has {len(text_ids) + 1} ids and its speech only {most} rows; the codes "
                "are cut, or another sentence's"
            )
        try:
            return spoken_item(
                self._template.vocabulary, prompt, text_ids, codes, frames, speaker=answer.speaker
            )
        except ArtifactError as error:
            raise BadSample(str(error)) from error

    def _codes(self, answer: Turn) -> Ids:
        """Frames (A, K) of an answer, checked against its recording if it has one."""
        k = self._spec.vocabulary.num_codebooks
        if answer.codes is None:
            if self._cache is None:
                raise BadSample("the answer has no codec, and nothing here makes codes")
            try:
                return self._cache.codes_of(answer.clips[0].path)
            except AudioError as error:
                raise BadSample(str(error)) from error
        flat = read_code_file(answer.codes) if isinstance(answer.codes, Path) else answer.codes
        if not flat or len(flat) % k:
            raise BadSample(f"{len(flat)} codes are no whole number of frames of {k}")
        size = self._spec.vocabulary.codebook_size
        if min(flat) < 0 or max(flat) >= size:
            wrong = next(code for code in flat if not 0 <= code < size)
            raise BadSample(f"code {wrong} is outside 0 to {size - 1}")
        frames = np.array(flat, np.int64).reshape(-1, k)
        if answer.clips:
            expected = sum(map(clip_seconds, answer.clips)) / CODEC_FRAME_S
            if abs(expected - len(frames)) > 1.5:
                raise BadSample(
                    f"{len(frames)} codec frames for a recording of {expected:.1f} frames"
                )
        return frames

    def _text(self, answer: Turn, num_codes: int | None = None) -> list[int]:
        """BOS to EOS; words in their rows where the checkpoint aligns text so."""
        if not answer.text.strip():
            raise BadSample("the answer has no text")
        if self._spec.text_alignment == "ahead" or answer.word_frames is None:
            if self._spec.text_alignment == "word":
                raise BadSample("this checkpoint aligns text by words: answers need word_frames")
            return self._template.answer(answer.text)
        return aligned_text(self._template, answer.text, answer.word_frames, num_codes)

    def _speaker_rows(self, rows: Ids, speaker: str) -> Ids:
        try:
            return speak_as(self._template.vocabulary, rows, speaker)
        except ArtifactError as error:
            raise BadSample(str(error)) from error


CODEC_FRAME_S = 2048 / 24000
"""Seconds of a codec frame. Source: SNAC 24 kHz."""


def aligned_text(
    template: Template, text: str, word_frames: Sequence[int], num_codes: int | None = None
) -> list[int]:
    """BOS, each word from the row in which its sound begins on, EOS; PAD_T fills the rows between.
    A word of several ids takes as many rows, and pushes on what follows.

    Raises BadSample if there are not as many frames as words.
    """
    words = text.split()
    if len(words) != len(word_frames):
        raise BadSample(f"{len(word_frames)} word_frames for {len(words)} words")
    ids, pad = [template.vocabulary.bos], template.vocabulary.pad_text
    for i, (word, frame) in enumerate(zip(words, word_frames, strict=True)):
        ids += [pad] * (frame - len(ids))
        ids += template.encode(word if i == 0 else f" {word}")
    if num_codes is not None:
        ids += [pad] * (num_codes + 1 - len(ids))
    return [*ids, template.vocabulary.eos]


def num_frames_of(clips: Sequence[Clip]) -> int:
    """Encoder frames of a turn's recordings, end to end. Raises BadSample if one is missing."""
    return num_frames(round(sum(map(clip_seconds, clips)) * RATE_HZ))


def heard_log_mel(clips: Sequence[Clip], spec: ModelSpec) -> NDArray[np.float32]:
    """The log-mel (M, 2F) of a turn's recordings, end to end, of the whole window.

    Raises BadSample if one cannot be read.
    """
    try:
        return log_mel(read_clips(clips), spec.encoder)
    except AudioError as error:
        raise BadSample(f"{clips[0].path}: {error}") from error
