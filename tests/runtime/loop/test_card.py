"""The whole loop on a real sound system: PyAudio, and a virtual card with recorded speakers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bench.noise import make_noise
from deeptalk_edge.bench.voice_wait import Monitor
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.understanding import LINE
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import open_detector
from deeptalk_edge.runtime.audio.echo import NoCanceller, open_canceller
from deeptalk_edge.runtime.audio.end_of_turn import FixedHangover
from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    AudioChunk,
    Interrupted,
    LiveEvent,
    Pieces,
    SoundLost,
    SoundRestored,
    TurnDone,
)
from deeptalk_edge.runtime.loop.fake_talker import FRAME_SAMPLES, FakeAnswer, FakeTalker
from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.voices import Voice, need_synthesisers, speak
from tests.runtime.loop.scenes import LoudnessDetector
from tests.runtime.loop.test_speculation import QUESTIONS, tiny
from tests.runtime.sound_card.conftest import (
    Card,
    _card_place,
    _come_first,
    _watchdog,
    card,
    port,
    stopped_card,
)
from tests.runtime.sound_card.warbles import find
from tests.runtime.sounds import voice

__all__ = ["_card_place", "_come_first", "_watchdog", "card", "port", "stopped_card", "tiny"]

Array = NDArray[np.float32]

NUM_FRAMES = 60  # length of a fake answer: 5.1 s
QUARTER = 6000  # samples in a quarter of a second
LOUD_TURN = 200  # sounds at a fifth of full scale


class Visit:
    """A live conversation, with its events in a queue."""

    def __init__(self, live: LiveConversation) -> None:
        self._events: queue.Queue[LiveEvent] = queue.Queue()
        self.seen: list[LiveEvent] = []
        self._reader = threading.Thread(target=self._read, args=(live,), daemon=True)
        self._reader.start()

    def wait_for(self, kind: type[Any] | tuple[type[Any], ...], timeout_s: float = 20.0) -> Any:
        """The next event of a kind, or of one of several."""
        end_s = time.monotonic() + timeout_s
        while True:
            event = self._events.get(timeout=max(end_s - time.monotonic(), 0.01))
            self.seen.append(event)
            if isinstance(event, kind):
                return event

    def ask(self, card: Card, pcm: Array, kind: type[Any] = AudioChunk) -> Any:
        """Speak and wait for an event; asks again if a busy machine lost the card."""
        for _ in range(3):
            self.seen.clear()
            card.say(pcm)
            event = self.wait_for((kind, SoundLost))
            if not isinstance(event, SoundLost):
                return event
            self.wait_for(SoundRestored)
        raise AssertionError("the card was lost three times")

    def _read(self, live: LiveConversation) -> None:
        for event in live:
            self._events.put(event)


def fake_talker() -> FakeTalker:
    talker = FakeTalker(lambda turn: NUM_FRAMES)
    talker.num_turns = LOUD_TURN
    return talker


@pytest.fixture
def monitor(card: Card) -> Iterator[Callable[[str], Monitor]]:
    """Listens at a monitor of the card until the test is over."""
    monitors: list[Monitor] = []

    def listen(device: str) -> Monitor:
        monitors.append(Monitor(device))
        return monitors[-1]

    yield listen
    for each in monitors:
        each.close()


@pytest.fixture
def visit(card: Card, port: PyAudioPort) -> Iterator[Visit]:
    """A fake talker that has begun an answer."""
    hearing = Hearing(
        detector=LoudnessDetector(), canceller=NoCanceller(), end_of_turn=FixedHangover(500)
    )
    with LiveConversation(fake_talker(), port, hearing=hearing) as live:
        yield Visit(live)


def test_a_spoken_question_gets_the_right_spoken_answer(
    card: Card, port: PyAudioPort, tiny: Bundle
) -> None:
    heard = card.listen()
    with Conversation(tiny) as talk, talk.listen(port) as live:
        events = Visit(live)
        time.sleep(0.5)
        done = events.ask(card, read_wav(QUESTIONS[0]).pcm, TurnDone)
        wanted = QUESTIONS[0].with_suffix(".txt").read_text(encoding="utf-8").splitlines()[-1]
        assert done.text == wanted
        assert done.voice is not None
        assert done.voice.heard_s == pytest.approx(done.metrics.audio_s)
        assert not [event for event in events.seen if isinstance(event, Interrupted)]
        time.sleep(0.3)
    sound = np.concatenate([e.pcm for e in events.seen if isinstance(e, AudioChunk)])
    pcm = heard.stop()
    place = find(sound, pcm)[0]
    # By quarters of a second, near their places: a busy sound server drops some milliseconds.
    starts = range(0, len(sound) - QUARTER, QUARTER)
    alike = [
        find(sound[i : i + QUARTER], pcm[place + i - 1200 : place + i + QUARTER + 1200])[1]
        for i in starts
    ]
    assert np.mean(np.array(alike) >= 0.99) >= 0.8, alike


def french() -> Array:
    """Skips where no synthesiser speaks it."""
    try:
        need_synthesisers()
    except SettingsError as error:
        pytest.skip(str(error))
    voice = Voice(program="espeak-ng", name="fr-fr+m3")
    return as_samples(speak("Bonjour, comment allez-vous?", voice, rate_hz=RATE_HZ))


@pytest.mark.parametrize(
    "make",
    [lambda: make_noise("cough", 5, 5.0), lambda: make_noise("music", 1, 3.0), french],
    ids=["a cough", "music", "French"],
)
def test_other_sounds_get_the_spoken_line_and_add_no_turn(
    card: Card, port: PyAudioPort, tiny: Bundle, make: Callable[[], Array]
) -> None:
    line = read_wav(tiny.file(LINE)).pcm
    sound = make()
    # Silero does not even open for the cough and the music.
    hearing = Hearing(detector=open_detector("webrtc"))
    with Conversation(tiny) as talk, talk.listen(port, hearing=hearing) as live:
        events = Visit(live)
        time.sleep(0.5)
        done = events.ask(card, sound, TurnDone)
        assert (done.text, done.metrics.stopped) == ("", "not_understood")
        said = np.concatenate([e.pcm for e in events.seen if isinstance(e, AudioChunk)])
        np.testing.assert_array_equal(said, line)
        done = events.ask(card, read_wav(QUESTIONS[0]).pcm, TurnDone)
        assert done.text
        assert done.metrics.num_prompt_rows < 200  # a first turn's


@pytest.mark.parametrize("offset_s", [0.3, 1.0, 2.2])
def test_a_barge_in_silences_within_450_ms_and_the_heard_position_is_exact(
    card: Card, visit: Visit, monitor: Callable[[str], Monitor], offset_s: float
) -> None:
    air, speaker, recorded = monitor("vair.monitor"), monitor("vspk.monitor"), card.listen()
    time.sleep(0.3)
    visit.ask(card, voice(0.8))
    time.sleep(offset_s)
    asked_s = time.perf_counter()
    card.say(voice(1.0))
    visit.wait_for(Interrupted)
    cut = visit.wait_for(TurnDone)
    onset_s, silent_s = air.first_sound(asked_s), speaker.last_sound()
    pcm = recorded.stop()
    assert onset_s is not None
    assert silent_s is not None
    assert 0.1 < silent_s - onset_s < 0.45
    level = np.abs(pcm).max()
    played = np.count_nonzero(np.abs(pcm) > level / 64)  # ducked to a quarter, faded to nothing
    assert abs(played - cut.voice.heard_s * 24000) <= 48


def test_a_false_alarm_stops_the_answer_for_a_while_only(card: Card, visit: Visit) -> None:
    time.sleep(0.3)
    visit.ask(card, voice(0.8))
    time.sleep(1.0)
    card.say(voice(0.34))
    visit.wait_for(Interrupted)
    visit.wait_for(AnswerResumed)
    done = visit.wait_for(TurnDone)
    assert done.voice.heard_s == pytest.approx(NUM_FRAMES * FRAME_SAMPLES / 24000)
    assert len(done.text.split()) == NUM_FRAMES // 4


class Lecturer(FakeTalker):
    """Answers with ten seconds of recorded speech."""

    def begin(self, question: Array | str) -> FakeAnswer:
        answer = super().begin(question)
        spoken = [resample(read_wav(path), 24000).pcm for path in QUESTIONS]
        speech = np.resize(np.concatenate(spoken), (118, FRAME_SAMPLES))

        def speak() -> Generator[Pieces, None, None]:
            for frame in speech:
                answer._made_frames += 1
                yield (AudioChunk(frame),)

        answer._steps = speak()
        return answer


@pytest.mark.parametrize("mode", ["software", "none"])
def test_an_answer_does_not_interrupt_itself_if_echo_is_cancelled(
    stopped_card: Card, port: PyAudioPort, mode: Any
) -> None:
    stopped_card.start(echo_ms=40)
    hearing = Hearing(canceller=open_canceller(mode), end_of_turn=FixedHangover(500))
    with LiveConversation(Lecturer(), port, hearing=hearing) as live:
        visit = Visit(live)
        time.sleep(0.3)
        visit.ask(stopped_card, read_wav(QUESTIONS[0]).pcm)
        event = visit.wait_for((Interrupted, TurnDone))
    assert isinstance(event, TurnDone if mode == "software" else Interrupted)


def test_the_loop_recovers_from_a_killed_sound_daemon(card: Card, visit: Visit) -> None:
    time.sleep(0.3)
    visit.ask(card, voice(0.8))
    time.sleep(0.5)
    card.kill_daemon()
    visit.wait_for(SoundLost)
    cut = visit.wait_for(TurnDone)
    assert 0 < len(cut.text.split()) < NUM_FRAMES // 4
    card.start()
    started_s = time.monotonic()
    visit.wait_for(SoundRestored)
    assert time.monotonic() - started_s < 5.0
    time.sleep(0.3)
    visit.ask(card, voice(0.8))  # and the next answer sounds
