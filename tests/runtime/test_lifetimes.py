"""On both backends, closed parts refuse calls, and a failed opening leaves nothing open."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import AudioError, BackendError, EdgeError, SettingsError, UsageError
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.answer import Answer
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.runtime.backends.cpu.library import CpuContext
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.conversation import (
    Conversation,
    ConversationSettings,
    TextPiece,
    TurnDone,
)
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.experts.paged import PagedExperts
from deeptalk_edge.runtime.experts.routes import Routes
from deeptalk_edge.runtime.lm.codec_stream import StreamingCodec
from deeptalk_edge.runtime.lm.encoder import Encoder
from deeptalk_edge.runtime.settings import BackendChoice
from tests.native.cpu import built
from tests.runtime.sounds import voice

BACKENDS: tuple[BackendChoice, ...] = ("cpu", "ort")
ROWS: Ids = np.zeros((1, 8), np.int64)


Readers = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def readers() -> Readers:
    """The live threads of pagers that this test has started."""
    before = set(threading.enumerate())

    def alive() -> list[str]:
        names = [thread.name for thread in threading.enumerate() if thread not in before]
        return [name for name in names if name.startswith("expert-reader")]

    return alive


@pytest.fixture(params=BACKENDS)
def settings(
    request: pytest.FixtureRequest, int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> ConversationSettings:
    """Of a short conversation on each backend; some experts have to be read."""
    if request.param == "cpu":
        built.install(monkeypatch)
    return dataclasses.replace(
        ConversationSettings.of(int8_bundle),
        backend=request.param,
        max_rows=12,
        paging=PagingSettings(pool="8"),
    )


@pytest.fixture
def talk(int8_bundle: Bundle, settings: ConversationSettings) -> Iterator[Conversation]:
    with Conversation(int8_bundle, settings) as talk:
        yield talk


USES: dict[str, Callable[[Conversation], object]] = {
    "ask": lambda talk: talk.ask("Why?"),
    "ask by voice": lambda talk: talk.ask(voice(0.5)),
    "begin": lambda talk: talk.begin("Why?"),
    "user_started_speaking": Conversation.user_started_speaking,
    "listen": Conversation.listen,
    "idle": Conversation.idle,
    "record_routes": lambda talk: talk.record_routes(Path("routes.npz")).__enter__(),
    "reset": Conversation.reset,
    "enter": Conversation.__enter__,
}


def test_a_closed_conversation_refuses_every_call(talk: Conversation) -> None:
    list(talk.ask("Why?"))
    talk.close()
    talk.close()
    for name, use in USES.items():
        with pytest.raises(UsageError, match="the conversation is closed"):
            pytest.fail(f"{name}: {use(talk)}")


def test_a_kept_iterator_ends_with_its_conversation(talk: Conversation) -> None:
    unused, begun = talk.ask("Why?"), talk.ask("Why?")
    next(begun)
    talk.close()
    for events in (begun, unused):
        with pytest.raises(UsageError, match="the conversation is closed"):
            next(events)
    with pytest.raises(StopIteration):
        next(begun)


def test_no_event_comes_after_a_close(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "advance", lambda self: (TextPiece("one"), TextPiece("two")))
    events = talk.ask("Why?")
    assert next(events) == TextPiece("one")
    talk.close()
    with pytest.raises(UsageError, match="the conversation is closed"):
        next(events)


def test_a_kept_iterator_can_be_closed_after_its_conversation(talk: Conversation) -> None:
    events = talk.ask("Why?")
    next(events)
    talk.close()
    events.close()


def test_a_kept_answer_ends_with_its_conversation(talk: Conversation) -> None:
    answer = talk.begin("Why?")
    for _ in range(3):
        answer.advance()
    talk.close()
    for use in (answer.advance, answer.finish, answer.discard, answer.metrics):
        with pytest.raises(UsageError, match="the conversation is closed"):
            use()


def test_the_figures_of_an_answer_that_was_not_begun_are_refused(talk: Conversation) -> None:
    with pytest.raises(UsageError, match="the question is not fed yet"):
        talk.begin("Why?").metrics()


def test_a_close_by_another_thread_during_a_step_takes_effect_after_the_step(
    int8_bundle: Bundle,
    talk: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    readers: Readers,
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    push = StreamingCodec.push

    def held(self: StreamingCodec, frames: Ids) -> NDArray[np.float32]:
        inside.set()
        assert go_on.wait(20)
        return push(self, frames)

    monkeypatch.setattr(StreamingCodec, "push", held)
    caught: list[EdgeError] = []

    def listen() -> None:
        try:
            list(talk.ask("Why?"))
        except EdgeError as error:
            caught.append(error)

    asking = threading.Thread(target=listen)
    asking.start()
    assert inside.wait(20)
    with pytest.raises(UsageError, match="busy"):
        talk.idle()
    talk.close()
    go_on.set()
    asking.join(20)
    assert not asking.is_alive()
    assert "the conversation is closed" in str(caught[0])
    assert readers() == []


@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("backends.{}.backend", "Codec"),
        ("backends.{}.backend", "Engine"),
        ("backends.open", "check_golden"),
        ("conversation", "History"),
    ],
)
def test_a_failed_opening_leaves_nothing_open(
    int8_bundle: Bundle,
    settings: ConversationSettings,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    broken: str,
    readers: Readers,
) -> None:
    closed: list[str] = []
    close = Encoder.close

    def noted(self: Encoder) -> None:
        closed.append("encoder")
        close(self)

    def fail(*args: object, **kwargs: object) -> None:
        raise BackendError("no")

    monkeypatch.setattr(Encoder, "close", noted)
    if broken in ("Codec", "Engine"):
        broken = {"cpu": "Cpu", "ort": "Ort"}[settings.backend] + broken
    place = f"deeptalk_edge.runtime.{where.format(settings.backend)}.{broken}"
    monkeypatch.setattr(place, fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BackendError, match="no"):
        Conversation(int8_bundle, settings)
    assert closed == ["encoder"]
    assert readers() == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def backend_of(bundle: Bundle, settings: ConversationSettings) -> Backend:
    return open_backend(bundle, settings.backend, settings.for_backend())


def test_a_closed_engine_refuses_every_call(
    int8_bundle: Bundle, settings: ConversationSettings
) -> None:
    backend = backend_of(int8_bundle, settings)
    engine, experts = backend.engine, backend.experts
    assert isinstance(experts, PagedExperts)
    engine.decode_step(ROWS)
    engine.close()
    engine.close()
    no_features = np.empty((0, int8_bundle.manifest.model.decoder.width), np.float32)
    uses: list[Callable[[], object]] = [
        lambda: engine.prefill(ROWS, no_features, np.zeros(1, np.bool_)),
        lambda: engine.decode_step(ROWS),
        lambda: engine.keep(0),
        lambda: engine.trim(0),
        engine.logits,
        engine.fork,
        engine.recall,
        engine.reset,
        experts.user_started_speaking,
        experts.idle,
        experts.end_turn,
        experts.all_resident,
        lambda: experts.addresses(1),
        lambda: experts.begin_step(1),
        lambda: next(experts.tables(1, ROWS, ROWS.astype(np.float32), no_features)),
        lambda: next(experts.waves(1, ROWS, ROWS.astype(np.float32), no_features)),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="is closed"):
            use()
    experts.close()


def test_an_engine_whose_experts_do_not_open_leaves_nothing_open(
    int8_bundle: Bundle, settings: ConversationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[CpuContext] = []
    monkeypatch.setattr(CpuContext, "close", lambda self: closed.append(self))
    wrong = dataclasses.replace(settings, paging=PagingSettings(pool="0"))
    with pytest.raises(SettingsError, match="pool '0'"):
        backend_of(int8_bundle, wrong)
    assert len(closed) == 2 * (settings.backend == "cpu")  # the codec's and the decoder's


def test_a_closed_codec_and_a_closed_encoder_refuse_every_call(
    int8_bundle: Bundle, settings: ConversationSettings
) -> None:
    manifest = int8_bundle.manifest
    backend = backend_of(int8_bundle, settings)
    codec, encoder = backend.codec, backend.encoder
    stream = StreamingCodec(codec, manifest.codec)
    frames = np.zeros((4, manifest.codec.spec.frame_codes), np.int64)
    stream.push(frames)
    for part in (codec, encoder):
        part.close()
        part.close()
    uses: list[Callable[[], object]] = [
        lambda: stream.push(frames),
        stream.finish,
        lambda: encoder.hear(voice(0.5)),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="closed"):
            use()


def test_a_dropped_kernel_context_ends_its_threads(
    int8_bundle: Bundle,
    settings: ConversationSettings,
    readers: Readers,
) -> None:
    if settings.backend != "cpu":
        pytest.skip("ONNX Runtime keeps its threads itself")
    before = len(os.listdir("/proc/self/task"))
    context = CpuContext(native_library.CpuLibrary(), threads=3)
    assert len(os.listdir("/proc/self/task")) == before + 2
    del context
    assert len(os.listdir("/proc/self/task")) == before
    backend_of(int8_bundle, dataclasses.replace(settings, threads=3)).close()
    assert len(os.listdir("/proc/self/task")) == before
    assert readers() == []


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ([0.0, 0.1], AudioError),
        (None, AudioError),
        (b"RIFF", AudioError),
        (np.zeros(16000, np.int32), AudioError),
        (np.zeros((2, 16000), np.float32), AudioError),
        ("half a surrogate: \ud83d", SettingsError),
    ],
    ids=["list", "None", "bytes", "int32", "stereo", "surrogate"],
)
def test_a_question_of_another_kind_is_refused_and_the_next_one_answered(
    talk: Conversation, question: Any, error: type[EdgeError]
) -> None:
    for ask in (lambda: list(talk.ask(question)), lambda: talk.begin(question).advance()):
        with pytest.raises(error):
            ask()
        talk.reset()
    assert isinstance(list(talk.ask("Why?"))[-1], TurnDone)


def test_a_second_question_is_refused_until_the_first_is_answered(talk: Conversation) -> None:
    events = talk.ask("Why?")
    next(events)
    for ask in (talk.ask, talk.begin):
        with pytest.raises(UsageError, match="the last answer is not finished"):
            ask("And?")
    assert isinstance(list(events)[-1], TurnDone)
    assert isinstance(list(talk.ask("And?"))[-1], TurnDone)


def test_routes_are_recorded_once_at_a_time_and_written_after_a_close(
    talk: Conversation, tmp_path: Path
) -> None:
    with talk.record_routes(tmp_path / "routes.npz"):
        list(talk.ask("Why?"))
        with pytest.raises(UsageError, match="another recording"):
            talk.record_routes(tmp_path / "more.npz").__enter__()
        talk.close()
    assert Routes.load(tmp_path / "routes.npz").passes


@pytest.mark.parametrize("threads", [0, 1025])
def test_an_absurd_number_of_threads_is_refused(int8_bundle: Bundle, threads: int) -> None:
    with pytest.raises(SettingsError, match=f"threads = {threads}: expected"):
        ConversationSettings.of(int8_bundle, threads=threads)
