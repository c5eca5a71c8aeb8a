"""The shipped checkpoint in the loop on a virtual clock: its answers do not depend on timing."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.understanding import HEADER
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.end_of_turn import (
    AdaptiveHangover,
    EndOfTurn,
    HangoverSettings,
    MeaningHangover,
)
from deeptalk_edge.runtime.audio.vad import WebRtcDetector
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.events import AudioChunk, Interrupted, LiveEvent, TurnDone
from deeptalk_edge.runtime.lm.text import TextTokenizer
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.simulation import Simulation
from deeptalk_edge.runtime.understanding import UnderstandingSettings
from deeptalk_edge.sound.wav import read_wav
from tests.places import TINY

Array = NDArray[np.float32]

CHECKPOINT = TINY
QUESTIONS = sorted((CHECKPOINT / "questions").glob("*.wav"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(CHECKPOINT, place, ExportSettings())
    return Bundle.open(place)


def silence(seconds: float) -> Array:
    return np.zeros(int(seconds * RATE_HZ), np.float32)


def question(number: int, *, pause_s: float = 0.0) -> Array:
    """A recorded question at 16 kHz, with a pause in its middle."""
    sound = read_wav(QUESTIONS[number])
    assert sound.rate_hz == RATE_HZ
    middle = len(sound.pcm) // 2
    return np.concatenate([sound.pcm[:middle], silence(pause_s), sound.pcm[middle:]])


def talk(
    bundle: Bundle,
    microphone: Array,
    settings: LoopSettings,
    *,
    step_ms: float = 5.0,
    end_of_turn: EndOfTurn | None = None,
) -> tuple[list[LiveEvent], Conversation]:
    """Run the loop on this sound with a full history; returns all events."""
    events: list[LiveEvent] = []
    conversation = Conversation(bundle, replace(ConversationSettings.of(bundle), max_turns=None))
    simulation = Simulation(
        conversation,
        VirtualPort(recording(microphone)),
        detector=WebRtcDetector(),
        settings=settings,
        end_of_turn=end_of_turn,
        step_ms=lambda: step_ms,
        emit=events.append,
    )
    simulation.run(len(microphone) / RATE_HZ)
    return events, conversation


def said(events: list[LiveEvent]) -> tuple[list[str], Array]:
    """The texts of all turns, and all their sound."""
    sound = [event.pcm for event in events if isinstance(event, AudioChunk)]
    return [event.text for event in events if isinstance(event, TurnDone)], np.concatenate(sound)


def test_a_speculative_answer_is_the_same_to_the_last_sample(tiny: Bundle) -> None:
    microphone = np.concatenate(
        [silence(0.5), question(0), silence(6), question(1, pause_s=0.3), silence(7)]
    )
    texts, sounds = [], []
    for is_speculating, step_ms in [(False, 5.0), (True, 5.0), (True, 25.0)]:
        settings = LoopSettings(is_speculating=is_speculating)
        events, conversation = talk(tiny, microphone, settings, step_ms=step_ms)
        turns = [event for event in events if isinstance(event, TurnDone)]
        assert [turn.voice is not None and turn.voice.was_speculative for turn in turns] == [
            is_speculating
        ] * 2
        if is_speculating:
            assert turns[1].voice is not None
            assert turns[1].voice.num_discarded > 0
        text, sound = said(events)
        texts.append(text)
        sounds.append(sound)
        conversation.close()
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 2
    for sound in sounds[1:]:
        np.testing.assert_array_equal(sound, sounds[0])


class Undecided:
    """A cue that ignores the sound."""

    def p_complete(self, utterance: Array) -> float:
        return 0.5


@pytest.fixture(scope="module")
def unjudged(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle, without what tells whole questions from parts."""
    place = tmp_path_factory.mktemp("unjudged") / "bundle"
    shutil.copytree(tiny.path, place)
    (place / HEADER).unlink()
    return Bundle(place, tiny.manifest)


def test_a_whole_question_is_answered_sooner_than_half_of_one_and_with_the_same_words(
    tiny: Bundle, unjudged: Bundle
) -> None:
    asked = question(3)  # about a room, which needs its number
    whole = np.concatenate([silence(0.5), asked, silence(6)])
    half = np.concatenate([silence(0.5), asked[: len(asked) // 2], silence(6)])
    by_confidence = AdaptiveHangover(Undecided(), HangoverSettings(confident_log_p=-0.001))
    by_sound = AdaptiveHangover(Undecided(), HangoverSettings(confident_log_p=None))
    cases: list[tuple[Bundle, Array, EndOfTurn]] = [
        (tiny, whole, MeaningHangover()),
        (tiny, half, MeaningHangover()),
        (unjudged, whole, by_confidence),
        (unjudged, half, by_confidence),
        (unjudged, whole, by_sound),
    ]
    hangover_ms, texts = [], []
    for bundle, microphone, rule in cases:
        events, conversation = talk(
            bundle, microphone, LoopSettings(), step_ms=2.0, end_of_turn=rule
        )
        (done,) = (event for event in events if isinstance(event, TurnDone))
        assert done.voice is not None
        hangover_ms.append(done.voice.hangover_ms)
        texts.append(said(events)[0])
        conversation.close()
    assert hangover_ms == [200, 1500, 200, 500, 500]
    assert texts[0] == texts[2] == texts[4]


def test_only_a_bundle_with_a_score_for_whole_questions_recognises_them(
    tiny: Bundle, unjudged: Bundle
) -> None:
    for bundle, knows_whole in ((tiny, True), (unjudged, False)):
        with Conversation(bundle, ConversationSettings.of(bundle)) as conversation:
            assert conversation.knows_whole == knows_whole
            answer = conversation.begin(question(3))
            while answer.text_log_p is None and answer.advance() is not None:
                pass
            assert answer.is_whole is (True if knows_whole else None)


def test_the_model_is_more_confident_for_a_whole_question(tiny: Bundle) -> None:
    answer_all = UnderstandingSettings(refuses=False)
    settings = replace(
        ConversationSettings.of(tiny, mode="text"), max_rows=20, understanding=answer_all
    )
    num_surer = 0
    with Conversation(tiny, settings) as conversation:
        for number in range(12):
            pcm = question(number)
            log_ps = []
            for heard in (pcm, pcm[: len(pcm) // 2]):
                answer = conversation.begin(heard)
                while answer.advance() is not None:
                    pass
                log_p = answer.text_log_p
                assert log_p is not None
                assert log_p <= 0
                log_ps.append(log_p)
                answer.discard()
            num_surer += log_ps[0] > log_ps[1]
    assert num_surer >= 9


def test_an_answer_of_a_few_rows_has_no_confidence(tiny: Bundle) -> None:
    settings = replace(ConversationSettings.of(tiny, mode="text"), max_rows=19)
    with Conversation(tiny, settings) as conversation:
        done = list(conversation.ask(question(0)))[-1]
    assert isinstance(done, TurnDone)
    assert done.metrics.text_log_p is None


def test_the_shipped_checkpoint_answers_utterances_cut_by_the_loop(tiny: Bundle) -> None:
    num_right = 0
    for number in range(4):
        microphone = np.concatenate([silence(0.5), question(number), silence(9)])
        events, conversation = talk(tiny, microphone, LoopSettings())
        wanted = QUESTIONS[number].with_suffix(".txt").read_text(encoding="utf-8").splitlines()[-1]
        num_right += said(events)[0] == [wanted]
        conversation.close()
    assert num_right >= 3  # it sometimes mishears a room number


def test_an_interrupted_answer_keeps_the_heard_words_and_the_next_one_is_right(
    tiny: Bundle,
) -> None:
    start = np.concatenate([silence(0.5), question(0), silence(2.2)])
    events, conversation = talk(
        tiny, np.concatenate([start, question(1), silence(7)]), LoopSettings()
    )
    cut, second = (event for event in events if isinstance(event, TurnDone))
    assert any(isinstance(event, Interrupted) for event in events)
    whole = said(talk(tiny, np.concatenate([start, silence(5)]), LoopSettings())[0])[0][0]
    assert whole.startswith(cut.text)
    assert 0 < len(cut.text.split()) < len(whole.split())
    assert second.text
    tokenizer = TextTokenizer(tiny.file("tokenizer.json"), tiny.manifest.model.vocabulary)
    ids = conversation.history.past[0].answer
    assert tokenizer.decode(ids.tolist()).strip() == cut.text
