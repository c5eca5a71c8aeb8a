"""A live conversation works only while entered, and raises a thread's error to its caller."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import BackendError, DeviceLost, EdgeError, UsageError
from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.commands import live as live_command
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.live import LiveConversation
from deeptalk_edge.runtime.loop.recorder import Recorder
from deeptalk_edge.runtime.loop.settings import LoopSettings, ReplyPolicy
from tests.runtime.loop.test_live import HEARING
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]

SPEECH = np.concatenate([silence(0.3), voice(0.7), silence(0.7)])


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def live_on(port: VirtualPort | None = None, talker: FakeTalker | None = None) -> LiveConversation:
    port = port or VirtualPort(recording(silence(1)))
    return LiveConversation(talker or FakeTalker(), port, hearing=HEARING)


USES: dict[str, Callable[[LiveConversation], object]] = {
    "iterate": iter,
    "press": LiveConversation.press,
    "release": LiveConversation.release,
    "interrupt": LiveConversation.interrupt,
    "run_beside": lambda live: live.run_beside("nothing", lambda: None),
}


@pytest.mark.parametrize("name", USES)
def test_use_before_entering_and_after_leaving_is_refused(name: str) -> None:
    live = live_on()
    with pytest.raises(UsageError, match="not entered"):
        USES[name](live)
    with live:
        pass
    with pytest.raises(UsageError, match="the live conversation is closed"):
        USES[name](live)


def test_it_is_entered_once_and_may_be_stopped_at_any_time() -> None:
    live = live_on()
    live.set_policy(ReplyPolicy())
    live.stop()
    with live, pytest.raises(UsageError, match="entered before"):
        live.__enter__()
    live.stop()
    with pytest.raises(UsageError, match="is closed"):
        live.__enter__()
    with pytest.raises(UsageError, match="is closed"):
        live.set_policy(ReplyPolicy())


def test_a_kept_iterator_ends_after_the_remaining_events() -> None:
    live = live_on()
    with live:
        events = iter(live)
    assert list(events) == []


class BrokenAtTheEnd(VirtualPort):
    """A port whose `close` fails."""

    def close(self) -> None:
        raise ZeroDivisionError("in close")


class BrokenInTheMiddle(VirtualPort):
    """A port whose `read` fails."""

    def read(self, timeout_s: float) -> MicFrame | None:
        raise ZeroDivisionError("in read")


class BrokenFromTheStart(VirtualPort):
    """A port whose `open` fails."""

    def open(self) -> None:
        raise ZeroDivisionError("in open")


@pytest.mark.parametrize("port", [BrokenAtTheEnd, BrokenInTheMiddle, BrokenFromTheStart])
def test_an_error_of_the_port_ends_the_conversation_and_is_raised(port: type[VirtualPort]) -> None:
    before = threading.active_count()
    live = live_on(port(recording(silence(1))))
    live.stop()
    with (
        pytest.raises(EdgeError, match="ZeroDivisionError: in") as told,
        live,
    ):
        list(live)
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert threading.active_count() == before


def test_an_error_is_raised_on_exit_without_iterating() -> None:
    live = live_on(BrokenInTheMiddle(recording(silence(1)))).__enter__()
    with pytest.raises(EdgeError, match="ZeroDivisionError: in read"):
        live.__exit__(None, None, None)


def test_an_error_of_the_caller_is_not_replaced() -> None:
    with pytest.raises(KeyError), live_on(BrokenInTheMiddle(recording(silence(1)))):
        raise KeyError("mine")


def test_a_lost_device_is_raised_once() -> None:
    port = VirtualPort(recording(silence(1)))
    port.lose("no such device: 'Anna'")
    with live_on(port) as live, pytest.raises(DeviceLost, match="Anna"):
        list(live)


def test_an_error_of_the_recorder_ends_the_conversation_and_is_raised(tmp_path: Path) -> None:
    class Broken(Recorder):
        def push(self, frame: MicFrame) -> None:
            raise OSError("the disk is gone")

    with Broken(tmp_path) as recorder:
        port = VirtualPort(recording(silence(1)))
        live = LiveConversation(FakeTalker(), port, hearing=HEARING, recorder=recorder)
        with live, pytest.raises(EdgeError, match="the disk is gone"):
            list(live)


def test_closing_the_conversation_ends_the_live_one() -> None:
    class Closed(FakeTalker):
        def user_started_speaking(self) -> None:
            raise UsageError("the conversation is closed")

    with (
        live_on(VirtualPort(recording(SPEECH)), Closed()) as live,
        pytest.raises(UsageError, match="the conversation is closed"),
    ):
        list(live)


def test_an_error_of_the_spotter_ends_the_conversation_and_is_raised() -> None:
    class Broken:
        def begin(self) -> None:
            raise ZeroDivisionError("in the spotter")

        def hears(self, pcm: Array) -> bool:
            return False

    settings = LoopSettings(stop_words=("stop",))
    hearing = replace(HEARING, spotter=lambda words: Broken())
    live = LiveConversation(FakeTalker(), VirtualPort(recording(silence(1))), settings, hearing)
    listener = live._loop.microphone.stop_listener
    assert listener is not None
    with live:
        listener.begin(0)
        listener.wake.set()
        with pytest.raises(EdgeError, match="in the spotter"):
            list(live)


def test_an_error_in_run_beside_ends_the_conversation_and_is_raised() -> None:
    def work() -> None:
        raise ZeroDivisionError("beside")

    with live_on() as live:
        live.run_beside("keys", work)
        with pytest.raises(EdgeError, match="ZeroDivisionError: beside"):
            list(live)


def test_push_to_talk_without_a_keyboard_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with live_on() as live:
        live.run_beside("keys", lambda: live_command._press_with_enter(live))
        with pytest.raises(EdgeError, match="TypeError"):
            list(live)


@pytest.mark.parametrize("num_given", [0, 1])
def test_a_refused_thread_leaves_no_other_running(
    monkeypatch: pytest.MonkeyPatch, num_given: int
) -> None:
    before, start, given = threading.active_count(), host.start_thread, list[threading.Thread]()

    def refuse(thread: threading.Thread) -> None:
        if len(given) == num_given:
            raise BackendError("the system refuses to start the thread")
        given.append(thread)
        start(thread)

    monkeypatch.setattr(host, "start_thread", refuse)
    live = live_on()
    with pytest.raises(BackendError, match="refuses"):
        live.__enter__()
    assert threading.active_count() == before
    with pytest.raises(UsageError, match="is closed"):
        iter(live)
