"""Dialogues of several turns, beside the torch model that reads each of them whole.

Every row of every answer has the logits of one forward pass over all that the model may see: the
system prompt, the turns that are left, the question and the answer so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.rows import Ids, text_rows
from deeptalk_edge.runtime.backends.ort import OrtEngine
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.history import PastTurn
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.model import DeepTalk
from tests.runtime.fed import copied
from tests.runtime.models import SPEC
from tests.runtime.sounds import voice
from tests.runtime.test_conversation import listen, take, talk

Array = NDArray[np.float32]
ROOM = {"max_rows": 16, "context_rows": 800}

Steps = list[tuple[Ids, Logits]]

SPOKEN: list[Any] = [voice(0.5), voice(0.9), voice(0.3), voice(0.7)]
TYPED: list[Any] = ["Why?", "And then?", "No.", "So what?"]
DIALOGUES = {
    "spoken": SPOKEN,
    "typed": TYPED,
    "mixed": [SPOKEN[0], TYPED[1], TYPED[2], SPOKEN[3]],
    "mixed otherwise": [TYPED[0], SPOKEN[1], SPOKEN[2], TYPED[3]],
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The rows (B, K + 1) of every decoding step, and what the engine said behind them."""
    taken: Steps = []
    decode_step = OrtEngine.decode_step

    def spy(self: OrtEngine, rows: Ids) -> Logits:
        logits = decode_step(self, rows)
        taken.append((rows.copy(), copied(logits)))
        return logits

    monkeypatch.setattr(OrtEngine, "decode_step", spy)
    return taken


def prompt_of(conversation: Conversation, past: list[PastTurn], question: Any) -> tuple[Any, ...]:
    """The whole prompt: rows (T, K + 1), audio mask (T,) and the features (n, C) of all turns."""
    template, system = conversation._tokenizer.template, conversation.settings.system
    heard, segment = listen(conversation, question)
    rows, masks, features = [], [], [*(turn.features for turn in past), heard]
    for number, turn in enumerate(past):
        asked = template.next_turn(turn.user) if number else template.opening(system, turn.user)
        rows += [asked.rows, text_rows(SPEC.vocabulary, turn.answer)]
        masks += [asked.audio_mask, np.zeros(len(turn.answer), np.bool_)]
    return (
        np.concatenate([*rows, segment.rows]),
        np.concatenate([*masks, segment.audio_mask]),
        np.concatenate(features),
    )


@torch.inference_mode()
def assert_is_a_full_forward(
    model: DeepTalk, prompt: tuple[Any, ...], steps: Steps, *, item: int
) -> None:
    """What the engine said of an item is what the model says of all of its rows at once."""
    rows, mask, features = prompt
    fed = [(rows[item], logits) for rows, logits in steps if item < len(rows)]
    whole = np.concatenate([rows[:-1], np.stack([row for row, _ in fed])])
    heard = np.pad(mask, (0, len(fed) - 1))
    spread = np.zeros((len(whole), SPEC.decoder.width), np.float32)
    spread[heard] = features
    hidden = model(
        torch.from_numpy(whole)[None], torch.from_numpy(spread)[None], torch.from_numpy(heard)[None]
    )[0, len(rows) - 1 :]
    text = np.stack([logits.text[item] for _, logits in fed])
    codes = np.stack([logits.codes[item] for _, logits in fed])
    np.testing.assert_allclose(text, model.text_logits(hidden).numpy(), atol=1e-4)
    np.testing.assert_allclose(codes, model.code_logits(hidden).numpy(), atol=1e-4)


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("max_turns", [None, 2], ids=["all turns", "two turns"])
@pytest.mark.parametrize("kind", DIALOGUES)
def test_every_row_of_a_dialogue_is_a_full_forward_of_the_torch_model(
    bundle: Bundle, steps: Steps, mode: Any, max_turns: int | None, kind: str
) -> None:
    model = load_model(bundle.path.parent / "checkpoint")
    with talk(bundle, mode=mode, max_turns=max_turns, **ROOM) as conversation:
        for number, question in enumerate(DIALOGUES[kind]):
            past = list(conversation._history._past)
            assert len(past) == (min(number, max_turns - 1) if max_turns else number)
            prompt = prompt_of(conversation, past, question)
            steps.clear()
            take(conversation.ask(question))
            assert len(steps) == 16
            for item in range(len(steps[0][0])):
                assert_is_a_full_forward(model, prompt, steps, item=item)
