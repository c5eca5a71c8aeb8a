"""Training batches of the tiny language model, as grid rows.

heard    a spoken question, answered in text (as item 1 of batch-parallel decoding) or aloud (as
         item 0); some after an earlier heard turn, its answer in text only, as item 1 leaves it
typed    a typed question answered aloud or in text, two typed turns, and mostly speech alone: any
         sentence follows any question, and only the codes are trained

Speech alone is the cure against answers learnt by heart: where the text is random, nothing but the
text predicts the sound. Held-out questions, and answers that only they have, never occur.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deeptalk_edge.model.prompt import Heard, Segment, Template, Typed
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.items import (
    Batch,
    Item,
    corrupt_codes,
    joined_segments,
    pad_items,
    spoken_item,
    text_segment,
    written_item,
)
from deeptalk_edge.training.losses import IGNORE
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.domain import (
    Split,
    answers_never_trained,
    random_answer,
    random_words,
)
from deeptalk_edge.training.tiny.shape import SPEAKER, SYSTEM_PROMPT
from deeptalk_edge.training.tiny.units import UnitVoice


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """What a step trains on."""

    num_heard: int = 16
    """Items that hear their question."""

    num_typed: int = 16
    """Items without audio."""

    dialogue_every: int = 8
    """One step in so many has two heard turns in every item, and half as many items."""

    aloud_every: int = 4
    """One heard item in so many is answered aloud, the others in text only: what is said follows
    from the text, so it is the text that needs the practice."""

    max_lead_cut: int = 25
    max_trail_cut: int = 50
    """Encoder frames of remembered silence that may be cut away before and after an utterance."""

    swapped_share: float = 0.3
    """Heard questions answered aloud with another sentence, of which only the codes are trained."""

    speech_only_share: float = 0.5
    """Of the typed items: those of which only the codes are trained."""

    two_turn_share: float = 0.3
    """Of the other typed items: those with an earlier turn."""

    ordered_share: float = 0.6
    """Of random sentences: those that are well formed; the others are words in no order."""

    corrupted_codes: float = 0.15
    """Largest share of wrong codes in what the model is fed, never in what it must predict."""

    pad_text_share: float = 0.3
    """Of the PAD_T between words: those that it must predict. With all of them they drown the
    words."""

    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_heard // 2, self.num_typed) < 2:
            raise ValueError(
                f"num_heard = {self.num_heard}, num_typed = {self.num_typed}: a step is worked on "
                "in halves, so it needs 4 heard items, for a dialogue, and 2 typed ones"
            )


HARD_INTENTS = {"room": 2.2}
"""Drawn so much more often: of all words three digits in a row are the hardest to copy."""


class UtterancePool:
    """The training utterances, to draw from; an intent weighs as the square root of its size, and
    more if it is hard."""

    def __init__(self, corpus: Corpus, lengths: npt.NDArray[np.int64]) -> None:
        """`lengths` are those of all utterances of `corpus`, in any unit."""
        self.members = np.array(corpus.select(Split.TRAIN, is_test=False))
        self._lengths = lengths
        self._shares = _balanced([corpus.utterances[i].intent for i in self.members])

    def draw(
        self, rng: np.random.Generator, count: int, *, pool_of: int = 1
    ) -> npt.NDArray[np.int64]:
        """Some utterances; of `pool_of` times as many, ones of like length."""
        pool = rng.choice(self.members, count * pool_of, p=self._shares)
        pool = pool[np.argsort(self._lengths[pool], kind="stable")]
        first = int(rng.integers(pool_of)) * count
        return pool[first : first + count]


class ItemWriter:
    """Writes conversations as items, for one checkpoint's vocabulary and answer voice."""

    def __init__(self, spec: ModelSpec, template: Template, units: UnitVoice) -> None:
        self._spec, self._template, self._units = spec, template, units

    def prompt(self, turns: Sequence[tuple[Heard | Typed, str]], last: Heard | Typed) -> Segment:
        """Earlier turns with their answers in text only, then the question."""
        segments = []
        for i, (user, answer) in enumerate(turns):
            segments.append(self._user(user, is_first=i == 0))
            segments.append(text_segment(self._template.vocabulary, self.text_ids(answer)))
        return joined_segments([*segments, self._user(last, is_first=not turns)])

    def text_ids(self, answer: str) -> list[int]:
        """BOS, the words, EOS; with `word` alignment each in the row in which its sound begins."""
        ids = self._template.answer(answer)
        if self._spec.text_alignment == "ahead":
            return ids
        codes, starts = self._units.answer_codes(answer)
        placed = [self._template.vocabulary.bos]
        for word, start in zip(ids[1:-1], starts, strict=True):
            placed += [self._template.vocabulary.pad_text] * (start - len(placed))
            placed.append(word)
        placed += [self._template.vocabulary.pad_text] * (len(codes) + 1 - len(placed))
        return [*placed, self._template.vocabulary.eos]

    def spoken(self, prompt: Segment, answer: str, frames: Ids, *, train_text: bool = True) -> Item:
        """The answer in text and codes. Without `train_text` the question does not tell the
        answer, so the first code, which is said before any text, is not predicted either."""
        return spoken_item(
            self._template.vocabulary,
            prompt,
            self.text_ids(answer),
            self._units.answer_codes(answer)[0],
            frames,
            speaker=SPEAKER,
            train_text=train_text,
        )

    def written(self, prompt: Segment, answer: str, frames: Ids) -> Item:
        """The answer in text only: what the second item of batch-parallel decoding sees."""
        return written_item(self._template.vocabulary, prompt, self.text_ids(answer), frames)

    def _user(self, user: Heard | Typed, *, is_first: bool) -> Segment:
        if is_first:
            return self._template.opening(SYSTEM_PROMPT, user)
        return self._template.next_turn(user)


class TinyBatches:
    """Draws the batches of a step, from (seed, step) alone."""

    def __init__(
        self,
        corpus: Corpus,
        pool: UtterancePool,
        writer: ItemWriter,
        spec: ModelSpec,
        settings: DatasetSettings,
        device: str = "cpu",
    ) -> None:
        self._corpus, self._pool, self._writer = corpus, pool, writer
        self._spec, self._settings, self._device = spec, settings, device
        self._words = sorted({w for u in corpus.utterances for w in u.answer.split()})
        self._banned = answers_never_trained()

    def heard(self, step: int, spans: Mapping[int, tuple[int, int]]) -> Batch:
        """Spoken questions; `spans` says where each utterance's frames begin, and how many they
        are."""
        s, (rng, draw) = self._settings, self._random(step, "heard")
        is_dialogue = step % s.dialogue_every == s.dialogue_every - 1
        count = s.num_heard // 2 if is_dialogue else s.num_heard
        chosen = self._pool.draw(rng, count, pool_of=4).tolist()
        spans = {utterance: self._cut(spans[utterance], draw) for utterance in chosen}
        items = []
        for i, utterance in enumerate(chosen):
            answer = self._corpus.utterances[utterance].answer
            order, turns = [utterance], []
            if is_dialogue:
                before = chosen[i - 1]
                order = [before, utterance]
                turns = [(_heard(spans, before), self._corpus.utterances[before].answer)]
            prompt = self._writer.prompt(turns, _heard(spans, utterance))
            frames = np.concatenate([np.arange(spans[u][1]) + spans[u][0] for u in order])
            if i % s.aloud_every:
                items.append(self._writer.written(prompt, answer, frames))
                continue
            swapped = draw.random() < s.swapped_share
            said = self.random_sentence(draw) if swapped else answer
            items.append(self._writer.spoken(prompt, said, frames, train_text=not swapped))
        return self._batch(items, rng)

    def typed(self, step: int) -> Batch:
        """Questions without sound."""
        s, (rng, draw) = self._settings, self._random(step, "typed")
        asked, earlier = (
            [self._corpus.utterances[i] for i in self._pool.draw(rng, s.num_typed)]
            for _ in range(2)
        )
        items, none = [], np.zeros(0, np.int64)
        for now, before in zip(asked, earlier, strict=True):
            turns = []
            speech_only = draw.random() < s.speech_only_share
            if not speech_only and draw.random() < s.two_turn_share:
                turns = [(Typed(text=before.question), before.answer)]
            prompt = self._writer.prompt(turns, Typed(text=now.question))
            if speech_only:
                said = self.random_sentence(draw)
                items.append(self._writer.spoken(prompt, said, none, train_text=False))
            elif draw.random() < 0.5:
                items.append(self._writer.spoken(prompt, now.answer, none))
            else:
                items.append(self._writer.written(prompt, now.answer, none))
        return self._batch(items, rng)

    def random_sentence(self, draw: random.Random) -> str:
        """Any sentence but the answers that are held out."""
        while True:
            if draw.random() < self._settings.ordered_share:
                sentence = random_answer(draw)
            else:
                sentence = random_words(draw, self._words)
            if sentence not in self._banned:
                return sentence

    def _cut(self, span: tuple[int, int], draw: random.Random) -> tuple[int, int]:
        """Leave out some of the silence at both ends of an utterance: first frame and their
        number."""
        first, count = span
        lead = draw.randint(0, self._settings.max_lead_cut)
        trail = draw.randint(0, self._settings.max_trail_cut)
        return first + lead, max(1, count - lead - trail)

    def _random(self, step: int, kind: str) -> tuple[np.random.Generator, random.Random]:
        draw = random.Random(f"{self._settings.seed}|{kind}|{step}")
        return np.random.default_rng(draw.getrandbits(64)), draw

    def _batch(self, items: Sequence[Item], rng: np.random.Generator) -> Batch:
        padded = pad_items(items, self._spec)
        corrupt_codes(padded.rows, self._spec.vocabulary, self._settings.corrupted_codes, rng)
        text = padded.targets[..., -1]
        spare = rng.random(text.shape) >= self._settings.pad_text_share
        text[(text == self._spec.vocabulary.pad_text) & spare] = IGNORE
        return padded.batch(device=self._device)


def _heard(spans: Mapping[int, tuple[int, int]], utterance: int) -> Heard:
    return Heard(num_frames=spans[utterance][1])


def _balanced(intents: Sequence[str]) -> npt.NDArray[np.float64]:
    """Sampling shares: an intent weighs as the square root of its number of utterances."""
    counts = Counter(intents)
    weights = np.array([HARD_INTENTS.get(i, 1.0) * counts[i] ** -0.5 for i in intents])
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares
