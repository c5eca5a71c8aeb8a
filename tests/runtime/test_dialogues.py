"""In dialogues of four turns, every row has the logits of the torch reference.

The reference has no cache, window or engine. For each answer it encodes every question again and
runs over all rows of the conversation at once, from the system prompt to the answer's last row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.model.prompt import Heard, Segment, Template, Typed, speak_as
from deeptalk_edge.model.rows import Ids, text_rows
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.runtime.lm.text import TextTokenizer
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.model import DeepTalk
from tests.runtime.fed import copied
from tests.runtime.sounds import voice
from tests.runtime.speaking_checkpoint import SPEC
from tests.runtime.test_conversation import Script, history_ids, script, take, talk

__all__ = ["Script", "script"]  # a fixture and its type

TOLERANCE = 1e-4  # float32 on logits of some tens; summation order alone differs
ANSWERS = [("one", 9), ("a longer text", 3), ("two", 6), ("three", 5)]
DIALOGUES: dict[str, list[Any]] = {
    "typed": ["Why?", "And then?", "Who was it?", "Really?"],
    "spoken": [voice(0.5), voice(0.9), voice(0.3), voice(0.7)],
    "typed and spoken": [voice(0.5), "And then?", voice(0.9), "Really?"],
}
CONTEXT_ROWS = {"typed": 200, "spoken": 290, "typed and spoken": 240}


class Step(NamedTuple):
    """Rows fed to one item of an engine, and the logits of the next row."""

    row: Ids
    text: Any
    codes: Any


@dataclass(slots=True)
class Steps:
    """Every step of one answer."""

    num_before: int
    """Rows cached before it."""
    items: tuple[list[Step], list[Step]] = field(default_factory=lambda: ([], []))

    def add(self, rows: Ids, logits: Logits) -> None:
        for item, row, text, codes in zip(self.items, rows, *logits, strict=False):
            item.append(Step(row, text, codes))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """The steps of every answer: a prompt comes before each."""
    seen: list[Steps] = []
    prefill, decode_step = OrtEngine.prefill, OrtEngine.decode_step

    def spy_prompt(self: OrtEngine, *arguments: Any) -> None:
        prefill(self, *arguments)
        if not seen or seen[-1].items[0]:
            seen.append(Steps(0))
        seen[-1].num_before = self.num_rows

    def spy_step(self: OrtEngine, rows: Ids) -> Logits:
        logits = decode_step(self, rows)
        seen[-1].add(rows.copy(), copied(logits))
        return logits

    monkeypatch.setattr(OrtEngine, "prefill", spy_prompt)
    monkeypatch.setattr(OrtEngine, "decode_step", spy_step)
    return seen


class Reference:
    """The torch model on a conversation, given only questions and answers."""

    def __init__(self, bundle: Bundle, questions: Sequence[Any]) -> None:
        self._model: DeepTalk = load_model(bundle.path.parent / "checkpoint").eval()
        tokenizer = TextTokenizer(bundle.file("tokenizer.json"), SPEC.vocabulary)
        self._template: Template = tokenizer.template
        self._system = bundle.manifest.generation.system
        self._questions = questions

    def prompt(self, first: int, turn: int) -> list[Segment]:
        """The questions from `first` to `turn`."""
        users = [
            Typed(text=asked)
            if isinstance(asked, str)
            else Heard(num_frames=num_frames(len(asked)))
            for asked in self._questions[first : turn + 1]
        ]
        opening = self._template.opening(self._system, users[0])
        return [opening, *map(self._template.next_turn, users[1:])]

    def rows(self, first: int, turn: int) -> tuple[Ids, Any]:
        """The whole prompt (T, K + 1) and the mask of its rows of speech (T,)."""
        rows, masks = [], []
        for number, segment in enumerate(self.prompt(first, turn), first):
            rows.append(segment.rows)
            masks.append(segment.audio_mask)
            if number < turn:
                rows.append(text_rows(SPEC.vocabulary, history_ids(ANSWERS[number][0])))
                masks.append(np.zeros(len(rows[-1]), np.bool_))
        return np.concatenate(rows), np.concatenate(masks)

    def num_dropped(self, turn: int, num_before: int) -> int:
        """Number of dropped turns before a prompt of this many rows and one more."""
        sizes = [len(self.rows(first, turn)[0]) for first in range(turn + 1)]
        return sizes.index(num_before + 1)

    def logits(self, first: int, turn: int, fed: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits after each of the rows (S, K + 1) that end the prompt and make the answer."""
        prompt, mask = self.rows(first, turn)
        rows = np.concatenate([prompt[:-1], fed])
        heard = np.pad(mask, (0, len(rows) - len(mask)))
        features = torch.zeros(len(rows), SPEC.decoder.width)
        spoken = [q for q in self._questions[first : turn + 1] if not isinstance(q, str)]
        if spoken:
            features[heard] = torch.cat([self._encode(pcm) for pcm in spoken])
        hidden = self._model(
            torch.from_numpy(rows)[None], features[None], torch.from_numpy(heard)[None]
        )
        last = hidden[0, -len(fed) :]
        return self._model.text_logits(last), self._model.code_logits(last)

    def _encode(self, pcm: Any) -> torch.Tensor:
        mel = torch.from_numpy(log_mel(pcm, SPEC.encoder))
        return self._model.encode(mel[None])[0, : num_frames(len(pcm))]


def hold(bundle: Bundle, questions: Sequence[Any], answers: list[Steps], **settings: Any) -> None:
    with talk(bundle, max_rows=100, **settings) as conversation:
        answers.clear()  # drops the golden check's rows
        for question, (text, _) in zip(questions, ANSWERS, strict=True):
            assert take(conversation.ask(question))[0] == text
    if not answers[-1].items[0]:
        answers.pop()  # drops a refill for a question that is not asked


@torch.inference_mode()
def assert_every_row_is_the_references(reference: Reference, answers: Sequence[Steps]) -> list[int]:
    """Returns how many turns were dropped before each answer."""
    dropped = []
    for turn, steps in enumerate(answers):
        first = reference.num_dropped(turn, steps.num_before)
        dropped.append(first)
        asked = reference.rows(first, turn)[0][-1:]
        openings = (speak_as(SPEC.vocabulary, asked, "ANS_A"), asked)
        for item, opening in zip(steps.items, openings, strict=True):
            if not item:
                continue
            np.testing.assert_array_equal(item[0].row, opening[0])
            expected = reference.logits(first, turn, np.stack([step.row for step in item]))
            found = [np.stack([step.text for step in item]), np.stack([s.codes for s in item])]
            for mine, theirs in zip(found, expected, strict=True):
                assert theirs.abs().max() > 1
                np.testing.assert_allclose(mine, theirs.numpy(), atol=TOLERANCE, rtol=0)
    return dropped


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_every_row_of_a_dialogue_equals_a_full_forward_of_the_reference(
    bundle: Bundle, script: Callable[..., None], answers: list[Steps], dialogue: str, mode: str
) -> None:
    script(*ANSWERS)
    hold(bundle, DIALOGUES[dialogue], answers, mode=mode)
    dropped = assert_every_row_is_the_references(Reference(bundle, DIALOGUES[dialogue]), answers)
    assert dropped == [0, 0, 0, 0]
    num_items = 2 if mode == "batch-parallel" else 1
    assert all(all(steps.items[:num_items]) for steps in answers)


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_after_a_dropped_turn_rows_equal_a_full_forward_of_the_others(
    bundle: Bundle, script: Callable[..., None], answers: list[Steps], dialogue: str, mode: str
) -> None:
    """The oldest turns are dropped, and a later turn becomes the first and is fed again there."""
    script(*ANSWERS)
    hold(bundle, DIALOGUES[dialogue], answers, mode=mode, context_rows=CONTEXT_ROWS[dialogue])
    dropped = assert_every_row_is_the_references(Reference(bundle, DIALOGUES[dialogue]), answers)
    assert sorted(dropped) == dropped
    turns = zip(range(1, len(dropped)), dropped, dropped[1:], strict=False)
    assert any(before < now < turn for turn, before, now in turns)


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_with_a_window_of_turns_rows_equal_a_full_forward_of_those_turns(
    bundle: Bundle, script: Callable[..., None], answers: list[Steps], dialogue: str, mode: str
) -> None:
    script(*ANSWERS)
    hold(bundle, DIALOGUES[dialogue], answers, mode=mode, max_turns=2)
    dropped = assert_every_row_is_the_references(Reference(bundle, DIALOGUES[dialogue]), answers)
    assert dropped == [0, 0, 1, 2]
