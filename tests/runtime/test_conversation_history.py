"""The history keeps the heard part of turns, nothing of discarded ones, and the newest turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import DoesNotFit, UsageError
from deeptalk_edge.model.features import num_frames
from deeptalk_edge.model.prompt import Heard
from deeptalk_edge.model.rows import Ids, text_rows
from deeptalk_edge.runtime.answer import Answer
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.conversation import AudioChunk, TextPiece, TurnDone
from deeptalk_edge.runtime.experts.paged import PagedExperts
from deeptalk_edge.runtime.experts.policy import Phase
from tests.runtime.fed import own_experts
from tests.runtime.loop.test_opening import fed
from tests.runtime.sounds import voice
from tests.runtime.speaking_checkpoint import SPEC
from tests.runtime.test_conversation import (
    MODES,
    Script,
    Tapped,
    frames,
    history_ids,
    listen,
    opening,
    script,
    take,
    talk,
)

__all__ = ["Script", "fed", "frames", "script"]  # fixtures and their types

VOCABULARY = SPEC.vocabulary
FRAME = 2048  # samples


def aligned(bundle: Bundle, alignment: str) -> Bundle:
    """The same bundle with this alignment of the text."""
    model = dataclasses.replace(bundle.manifest.model, text_alignment=alignment)  # type: ignore[arg-type]
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, model=model))


def advance_until(answer: Answer, num_samples: int) -> int:
    """Advance until `samples` of sound are made, or all; returns their number."""
    made = 0
    while made < num_samples and (pieces := answer.advance()) is not None:
        made += sum(piece.pcm.size for piece in pieces if isinstance(piece, AudioChunk))
    return made


def cached_rows(conversation: Tapped) -> int:
    return conversation.engine.num_rows + len(conversation.history.pending_rows)


def feed_again(conversation: Tapped) -> None:
    """Feed all turns, as after a drop: no caller needs that by itself."""
    conversation.history._drop(0)


def assert_cache_is_history(conversation: Tapped, question: Any, answer_ids: list[int]) -> None:
    """The cache and the pending rows are a fresh prefill of the question and this answer."""
    history, engine = conversation.history, conversation.engine
    assert isinstance(engine, OrtEngine)
    features, _ = listen(conversation, question)
    segment = opening(conversation, Heard(num_frames=num_frames(len(question))))
    whole = np.concatenate([segment.rows, text_rows(VOCABULARY, answer_ids)])
    assert cached_rows(conversation) == len(whole)
    np.testing.assert_array_equal(history.pending_rows, whole[engine.num_rows :])
    fresh = OrtEngine(
        conversation.bundle, context_rows=400, open_experts=own_experts(conversation.bundle)
    )
    mask = np.pad(segment.audio_mask, (0, len(answer_ids)))
    fresh.prefill(whole[: engine.num_rows], features, mask[: engine.num_rows])
    for layer in range(SPEC.decoder.num_layers):
        np.testing.assert_allclose(engine.latents(layer), fresh.latents(layer), atol=1e-4)
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
        assert answer.finish(heard_samples) == kept
        assert_cache_is_history(conversation, voice(0.5), history_ids(kept))
        assert take(conversation.ask("Go on."))[0] == "on"


def test_an_answer_heard_to_its_end_stays_whole(bundle: Bundle, script: Any) -> None:
    script(("more text than speech", 2))
    with talk(aligned(bundle, "word"), max_rows=100) as conversation:
        answer = conversation.begin("Why?")
        made = advance_until(answer, 10**9)
        assert answer.finish(made) == "more text than speech"


def test_text_that_runs_ahead_is_kept_in_proportion_to_the_speech(
    bundle: Bundle, script: Any
) -> None:
    script(("abcdefgh", 12), ("abcdefgh", 40))
    with talk(aligned(bundle, "ahead"), max_rows=100) as conversation:
        answer = conversation.begin("Why?")
        made = advance_until(answer, 10**9)
        assert answer.finish(made // 2) == "abcd"  # BOS and EOS are two of the ten ids
        answer = conversation.begin("Why?")
        advance_until(answer, 20 * FRAME)
        # The length is not known yet: 1.2 s of slow speech have three ids, BOS included.
        assert answer.finish(int(1.2 * 24000)) == "ab"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 9, 500])
def test_a_discarded_answer_leaves_no_trace(
    bundle: Bundle, frames: list[Ids], mode: Any, num_steps: int
) -> None:
    def said(conversation: Tapped) -> tuple[str, list[list[int]]]:
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


def test_a_discard_after_the_end_changes_nothing(bundle: Bundle, script: Any) -> None:
    script(("one", 3))
    with talk(bundle) as conversation:
        answer = conversation.begin("Why?")
        advance_until(answer, 10**9)
        answer.finish()
        rows = cached_rows(conversation)
        answer.discard()
        assert answer.finish() == ""
        assert answer.advance() is None
        assert cached_rows(conversation) == rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_idle", [True, False], ids=["while idle", "with the next question"])
def test_a_full_context_keeps_the_newest_whole_turns(
    bundle: Bundle, script: Any, mode: Any, is_idle: bool
) -> None:
    script(*[("abc", 2)] * 6)
    with talk(bundle, mode=mode, context_rows=250) as conversation:
        history = conversation.history
        for turn in range(6):
            events = conversation.ask(f"Question {turn}?")
            while not isinstance(next(events), TurnDone):
                pass
            if is_idle:
                assert next(events, None) is None
                assert conversation.idle() == 0
        conversation.trim_history()
        left = len(history.past)
        assert 2 < left < 6
        assert history.num_turns == 6
        rows, engine = cached_rows(conversation), conversation.engine
        feed_again(conversation)
        assert cached_rows(conversation) == rows
        assert [turn.user.text[9] for turn in history.past] == [  # type: ignore[union-attr]
            str(turn) for turn in range(6 - left, 6)
        ]
        assert engine.num_rows <= 250


def test_a_question_that_never_fits_is_refused_and_the_history_stays(
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
        answer = conversation.begin("x" * 130)
        advance_until(answer, 10**9)
        assert answer.finish() == "on"
        assert len(conversation.history.past) == 1


MIXED: list[Any] = ["Why?", voice(0.5), voice(0.8), "And then?", voice(0.3)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_turns", [1, 3])
def test_dropped_turns_have_no_effect_on_later_answers(
    bundle: Bundle, mode: Any, max_turns: int
) -> None:
    settings = {"mode": mode, "max_turns": max_turns, "max_rows": 12, "context_rows": 900}
    with talk(bundle, **settings) as kept, talk(bundle, **settings) as fresh:
        for number, question in enumerate(MIXED, 1):
            take(kept.ask(question))
            past = list(kept.history.past)
            assert len(past) == min(number, max_turns - 1)
            fresh.reset()
            fresh.history.past.extend(past)
            if past:
                feed_again(fresh)
            else:
                fresh.idle()
            assert cached_rows(kept) == cached_rows(fresh)
            num_rows = min(t.engine.num_rows for t in (kept, fresh))  # the rest is pending
            for layer in range(SPEC.decoder.num_layers):
                ours, theirs = (t.engine.latents(layer) for t in (kept, fresh))  # type: ignore[attr-defined]
                np.testing.assert_allclose(ours[:num_rows], theirs[:num_rows], atol=1e-4)
            fresh.history.num_turns = number  # it seeds the sampler
            said, sound, _ = take(fresh.ask("So?"))
            answer = kept.begin("So?")
            made = [piece for pieces in iter(answer.advance, None) for piece in pieces]
            answer.discard()
            assert said == "".join(p.text for p in made if isinstance(p, TextPiece))
            pcm = [p.pcm for p in made if isinstance(p, AudioChunk)]
            np.testing.assert_array_equal(sound, np.concatenate([sound[:0], *pcm]))


@pytest.mark.parametrize("mode", MODES)
def test_old_turns_are_dropped_before_the_next_question(
    bundle: Bundle, fed: list[int], mode: Any
) -> None:
    with talk(bundle, mode=mode, max_turns=2, max_rows=12) as conversation:
        conversation.idle()
        prompt_rows = []
        for _ in range(4):
            fed.clear()
            for event in conversation.ask(voice(0.5)):
                if isinstance(event, TurnDone):
                    assert len(fed) == 1  # the question: nothing was fed again before its answer
                    prompt_rows.append(event.metrics.num_prompt_rows)
        assert prompt_rows[2] == prompt_rows[3] <= prompt_rows[1]  # pending rows and the question


def test_a_caller_that_stops_at_the_last_event_gets_the_same_answers(bundle: Bundle) -> None:
    said: list[list[str]] = []
    for is_exhausted in (True, False):
        with talk(bundle, max_turns=2, max_rows=12) as conversation:
            said.append([])
            for question in MIXED:
                events = conversation.ask(question)
                while not isinstance(event := next(events), TurnDone):
                    pass
                said[-1].append(event.text)
                if is_exhausted:
                    assert next(events, None) is None
    assert said[0] == said[1]


def test_no_turn_is_dropped_during_an_answer(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with talk(bundle, max_turns=1) as conversation:
        said, sound, _ = take(conversation.ask("Why?"))
        late = conversation.ask("Why?")
        while not isinstance(next(late), TurnDone):
            pass
        answer = conversation.begin("Why?")
        answer.advance()
        answer.advance()
        assert next(late, None) is None  # the end drops no turns now
        assert not caplog.records
        for idle in (conversation.idle, conversation.trim_history):
            with pytest.raises(UsageError, match="the last answer is not finished"):
                idle()
        made = [piece for pieces in iter(answer.advance, None) for piece in pieces]
        assert answer.text == said
        pcm = [piece.pcm for piece in made if isinstance(piece, AudioChunk)]
        np.testing.assert_array_equal(np.concatenate(pcm), sound)


def test_idle_reaches_the_experts(bundle: Bundle) -> None:
    """Otherwise free slots would be filled only while the user speaks, concurrently with the
    encoder."""
    with talk(bundle) as conversation:
        phases = [phase_of(conversation)]
        for step in (conversation.idle, conversation.user_started_speaking):
            step()
            phases.append(phase_of(conversation))
        take(conversation.ask("Why?"))
        phases.append(phase_of(conversation))
    assert phases == [Phase.IDLE, Phase.IDLE, Phase.LISTENING, Phase.IDLE]


def phase_of(conversation: Tapped) -> Phase:
    assert isinstance(conversation.engine, OrtEngine)
    experts = conversation.engine.experts
    assert isinstance(experts, PagedExperts)
    return experts._pager.residency.phase
