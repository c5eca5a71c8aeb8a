"""What stays of a turn: what was heard of it, nothing of what was discarded, the newest turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.rows import Ids, text_rows
from deeptalk_edge.runtime.answer import Answer
from deeptalk_edge.runtime.backends.ort import OrtEngine
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation
from deeptalk_edge.runtime.experts.policy import Phase
from tests.runtime.models import SPEC
from tests.runtime.sounds import voice
from tests.runtime.test_conversation import (
    MODES,
    Script,
    frames,
    history_ids,
    listen,
    script,
    take,
    talk,
)

__all__ = ["Script", "frames", "script"]  # fixtures and what they hand out

VOCABULARY = SPEC.vocabulary
FRAME = 2048  # samples


def aligned(bundle: Bundle, alignment: str) -> Bundle:
    """The same bundle, said to align its text so."""
    model = dataclasses.replace(bundle.manifest.model, text_alignment=alignment)  # type: ignore[arg-type]
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, model=model))


def advance_until(answer: Answer, num_samples: int) -> int:
    """Go on until that much sound was made, or all; returns how much it was."""
    made = 0
    while made < num_samples and (pieces := answer.advance()) is not None:
        made += sum(piece.pcm.size for piece in pieces if isinstance(piece, AudioChunk))
    return made


def cached_rows(conversation: Conversation) -> int:
    return conversation._engine.num_rows + len(conversation._history.owed)


def assert_cache_is_history(
    conversation: Conversation, question: Any, answer_ids: list[int]
) -> None:
    """The cache and what is owed are a fresh prefill of the question and this answer."""
    history, engine = conversation._history, conversation._engine
    assert isinstance(engine, OrtEngine)
    past, history._past = history._past, type(history._past)()
    features, segment = listen(conversation, question)
    history._past = past
    whole = np.concatenate([segment.rows, text_rows(VOCABULARY, answer_ids)])
    assert cached_rows(conversation) == len(whole)
    np.testing.assert_array_equal(history.owed, whole[engine.num_rows :])
    fresh = OrtEngine(conversation.bundle, context_rows=400)
    mask = np.pad(segment.audio_mask, (0, len(answer_ids)))
    fresh.prefill(whole[: engine.num_rows], features, mask[: engine.num_rows])
    for layer in range(SPEC.decoder.num_layers):
        np.testing.assert_allclose(engine._cache.past(layer), fresh._cache.past(layer), atol=1e-4)
    fresh.close()


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("made_frames", [4, 100], ids=["cut while made", "cut after all was made"])
@pytest.mark.parametrize(
    ("heard_samples", "kept"),
    [(0, ""), (FRAME - 1, ""), (2 * FRAME, "a"), (4 * FRAME + 99, "abc")],
)
def test_a_cut_answer_leaves_the_words_whose_frames_were_heard(
    bundle: Bundle, script: Any, mode: Any, made_frames: int, heard_samples: int, kept: str
) -> None:
    script(("abcdefgh", 12), ("on", 2))
    with talk(aligned(bundle, "word"), mode=mode, max_rows=100) as conversation:
        answer = conversation.begin(voice(0.5))
        advance_until(answer, made_frames * FRAME)
        assert answer.settle(heard_samples) == kept
        assert_cache_is_history(conversation, voice(0.5), history_ids(kept))
        assert take(conversation.ask("Go on."))[0] == "on"


def test_an_answer_heard_to_its_end_stays_whole(bundle: Bundle, script: Any) -> None:
    script(("more text than speech", 2))
    with talk(aligned(bundle, "word"), max_rows=100) as conversation:
        answer = conversation.begin("Why?")
        made = advance_until(answer, 10**9)
        assert answer.settle(made) == "more text than speech"


def test_text_that_runs_ahead_is_kept_in_proportion_to_the_speech(
    bundle: Bundle, script: Any
) -> None:
    script(("abcdefgh", 12), ("abcdefgh", 40))
    with talk(aligned(bundle, "ahead"), max_rows=100) as conversation:
        answer = conversation.begin("Why?")
        made = advance_until(answer, 10**9)
        assert answer.settle(made // 2) == "abcd"  # BOS and EOS are two of the ten ids
        answer = conversation.begin("Why?")
        advance_until(answer, 20 * FRAME)
        # The length is not known yet: 1.2 s of slow speech are three ids, BOS one of them.
        assert answer.settle(int(1.2 * 24000)) == "ab"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 9, 500])
def test_a_discarded_answer_leaves_no_trace(
    bundle: Bundle, frames: list[Ids], mode: Any, num_steps: int
) -> None:
    def said(conversation: Conversation) -> tuple[str, list[list[int]]]:
        frames.clear()
        return take(conversation.ask(voice(0.6)))[0], [frame.tolist() for frame in frames]

    with talk(bundle, mode=mode) as plain:
        take(plain.ask("Why?"))
        expected = said(plain)
    with talk(bundle, mode=mode) as conversation:
        take(conversation.ask("Why?"))
        before = cached_rows(conversation)
        answer = conversation.begin(voice(0.4))
        for _ in range(num_steps):
            answer.advance()
        answer.discard()
        assert cached_rows(conversation) == before
        assert said(conversation) == expected


def test_a_discard_behind_an_end_changes_nothing(bundle: Bundle, script: Any) -> None:
    script(("one", 3))
    with talk(bundle) as conversation:
        answer = conversation.begin("Why?")
        advance_until(answer, 10**9)
        answer.settle()
        rows = cached_rows(conversation)
        answer.discard()
        assert answer.settle() == ""
        assert answer.advance() is None
        assert cached_rows(conversation) == rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_idle", [True, False], ids=["while idle", "with the next question"])
def test_a_full_context_keeps_the_newest_whole_turns(
    bundle: Bundle, script: Any, mode: Any, is_idle: bool
) -> None:
    script(*[("abc", 2)] * 6)
    with talk(bundle, mode=mode, context_rows=250) as conversation:
        history = conversation._history
        history._reserve_rows = 120
        num_dropped = []
        for turn in range(6):
            if is_idle:
                num_dropped.append(conversation.make_room())
            take(conversation.ask(f"Question {turn}?"))
        left = len(history._past)
        assert 2 < left < 6
        assert history.num_turns == 6
        if is_idle:
            assert sum(num_dropped) == 6 - left
        rows, engine = cached_rows(conversation), conversation._engine
        history._drop(0)  # feeds all that is left anew
        assert cached_rows(conversation) == rows
        assert [turn.user.text[9] for turn in history._past] == [  # type: ignore[union-attr]
            str(turn) for turn in range(6 - left, 6)
        ]
        assert engine.num_rows <= 250


def test_a_question_that_never_fits_is_refused_and_nothing_is_lost(
    bundle: Bundle, script: Any
) -> None:
    script(("abc", 2), ("on", 2))
    with talk(bundle, context_rows=100) as conversation:
        take(conversation.ask("Why?"))
        with pytest.raises(DoesNotFit, match="the context holds 100"):
            take(conversation.ask("x" * 200))
        assert take(conversation.ask("Go on."))[0] == "on"


def test_room_is_made_for_a_question_of_unusual_length(bundle: Bundle, script: Any) -> None:
    script(("abc", 2), ("on", 2))
    with talk(bundle, context_rows=200) as conversation:
        take(conversation.ask("Why?"))
        assert take(conversation.ask("x" * 130))[0] == "on"
        assert len(conversation._history._past) == 1


def test_while_nobody_talks_the_experts_know_it(bundle: Bundle) -> None:
    """Else free slots are filled when the user speaks, beside the encoder, and not before."""
    with talk(bundle) as conversation:
        phases = [phase_of(conversation)]
        for step in (conversation.make_room, conversation.expect_question):
            step()
            phases.append(phase_of(conversation))
        take(conversation.ask("Why?"))
        phases.append(phase_of(conversation))
    assert phases == [Phase.IDLE, Phase.IDLE, Phase.LISTENING, Phase.IDLE]


def phase_of(conversation: Conversation) -> Phase:
    return conversation._experts._pager.residency.phase
