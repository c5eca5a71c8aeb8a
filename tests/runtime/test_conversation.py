"""A conversation gives the model's answers, keeps its history, and ends cleanly."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import (
    ArtifactError,
    AudioError,
    BackendError,
    DoesNotFit,
    ExpertUnavailable,
    SettingsError,
    UsageError,
)
from deeptalk_edge.model.features import num_frames
from deeptalk_edge.model.prompt import Heard, Segment, Typed
from deeptalk_edge.model.rows import Ids, text_rows
from deeptalk_edge.runtime import decoding
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.conversation import (
    AudioChunk,
    Conversation,
    ConversationSettings,
    TextPiece,
    TurnDone,
)
from deeptalk_edge.runtime.lm.codec_stream import StreamingCodec
from deeptalk_edge.runtime.lm.encoder import SILENT_FRAMES, Encoder
from deeptalk_edge.runtime.lm.engine import Engine
from deeptalk_edge.runtime.lm.text import TextStream, TextTokenizer
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.generate import generate
from tests.manifests import edit_manifest
from tests.runtime.fed import own_experts
from tests.runtime.sounds import voice
from tests.runtime.speaking_checkpoint import SPEC

VOCABULARY = SPEC.vocabulary
MODES = ["batch-parallel", "single", "text"]


class Tapped(Conversation):
    """A conversation that shows its engine to tests."""

    engine: Engine

    def __init__(self, bundle: Bundle, settings: ConversationSettings) -> None:
        super().__init__(bundle, settings, tap=self._take)

    def _take(self, engine: Engine) -> Engine:
        self.engine = engine
        return engine

    def __enter__(self) -> Tapped:
        super().__enter__()
        return self


def talk(bundle: Bundle, **changes: Any) -> Tapped:
    return Tapped(bundle, dataclasses.replace(ConversationSettings.of(bundle), **changes))


def opened(bundle: Bundle) -> closing[Backend]:
    """The parts of a conversation by themselves."""
    return closing(open_backend(bundle, "ort", ConversationSettings.of(bundle).for_backend()))


class Script:
    """Replaces the sampler: gives fixed texts, each with a number of codec frames."""

    def __init__(self, *turns: tuple[str, int]) -> None:
        self._turns = turns

    def __call__(self, vocabulary: object, settings: object, *, turn: int) -> Script:
        text, num_frames = self._turns[turn]
        self._text = [VOCABULARY.bos, *text.encode(), VOCABULARY.eos]
        self._num_frames, self._row = num_frames, 0
        return self

    def sample(self, text: object, codes: object) -> tuple[int, Ids]:
        row, self._row = self._row, self._row + 1
        ids = np.arange(7) * 3 + row % 11
        if row == self._num_frames + 1:
            ids[0] = VOCABULARY.end_audio
        return self._text[row] if row < len(self._text) else 0, ids


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def play(*turns: tuple[str, int]) -> None:
        monkeypatch.setattr(decoding, "Sampler", Script(*turns))

    return play


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[Ids]:
    """Records every frame that the codec gets."""
    heard: list[Ids] = []
    push = StreamingCodec.push

    def spy(self: StreamingCodec, frames: Ids) -> NDArray[np.float32]:
        heard.extend(frames)
        return push(self, frames)

    monkeypatch.setattr(StreamingCodec, "push", spy)
    return heard


@pytest.fixture
def text_ids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records every text id that is shown."""
    shown: list[int] = []
    push = TextStream.push

    def spy(self: TextStream, text_id: int) -> str:
        shown.append(text_id)
        return push(self, text_id)

    monkeypatch.setattr(TextStream, "push", spy)
    return shown


def take(events: Iterator[Any]) -> tuple[str, NDArray[np.float32], TurnDone]:
    """All text, all sound and the last event."""
    *pieces, done = events
    text = "".join(event.text for event in pieces if isinstance(event, TextPiece))
    sound = [event.pcm for event in pieces if isinstance(event, AudioChunk)]
    assert isinstance(done, TurnDone)
    return text, np.concatenate([np.empty(0, np.float32), *sound]), done


def listen(conversation: Conversation, question: Any) -> tuple[NDArray[np.float32], Segment]:
    """A question's features (n, C) and its prompt."""
    history = conversation.history
    if isinstance(question, str):
        return history.no_features, history.segment(Typed(text=question))
    answer = conversation.begin(question)
    while (features := answer.features) is None:
        answer.advance()
    answer.discard()
    return features, history.segment(Heard(num_frames=num_frames(len(question))))


def opening(conversation: Conversation, user: Heard) -> Segment:
    """The rows of a question that begins the conversation."""
    path = conversation.bundle.file("tokenizer.json")
    template = TextTokenizer(path, VOCABULARY).template
    return template.opening(conversation.settings.system, user)


def history_ids(text: str) -> list[int]:
    """The ids of an answer in the history; the test's tokenizer gives bytes."""
    return [VOCABULARY.bos, *text.encode(), VOCABULARY.eos]


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize("question", ["Why?", voice(0.9)], ids=["typed", "heard"])
def test_an_answer_equals_the_torch_models_id_for_id(
    bundle: Bundle, frames: list[Ids], text_ids: list[int], mode: Any, question: Any
) -> None:
    with talk(bundle, mode=mode) as conversation:
        features, segment = listen(conversation, question)
        take(conversation.ask(question))
    spread = np.zeros((len(segment.rows), SPEC.decoder.width), np.float32)
    spread[segment.audio_mask] = features
    torch.set_num_threads(1)
    answer = generate(
        load_model(bundle.path.parent / "checkpoint"),
        segment.rows[None],
        torch.from_numpy(spread)[None],
        torch.from_numpy(segment.audio_mask)[None],
        speaker="ANS_A",
        mode=mode,
        max_rows=24,
    )[0]
    assert text_ids == answer.text_ids
    np.testing.assert_array_equal(np.stack(frames), answer.frames)
    assert len(frames) == 24 - 7


@pytest.mark.parametrize("mode", MODES)
def test_a_kept_cache_equals_a_full_prefill_of_the_whole_conversation(
    bundle: Bundle, script: Any, mode: Any
) -> None:
    answers = [("one", 9), ("a longer text", 3), ("", 0)]
    questions: list[Any] = ["Why?", voice(0.5), "And then?"]
    script(*answers)
    with talk(bundle, mode=mode) as conversation:
        rows, features, masks = [], [], []
        for turn, question in enumerate(questions):
            heard, segment = listen(conversation, question)
            rows += [segment.rows, text_rows(VOCABULARY, history_ids(answers[turn][0]))]
            masks += [segment.audio_mask, np.zeros(len(rows[-1]), np.bool_)]
            features.append(heard)
            take(conversation.ask(question))
        kept, pending = conversation.engine, conversation.history.pending_rows
        assert isinstance(kept, OrtEngine)
        whole, mask = np.concatenate(rows), np.concatenate(masks)
        assert kept.num_items == 1
        assert kept.num_rows + len(pending) == len(whole)
        np.testing.assert_array_equal(pending, whole[kept.num_rows :])
        fresh = OrtEngine(bundle, context_rows=400, open_experts=own_experts(bundle))
        fresh.prefill(whole[: kept.num_rows], np.concatenate(features), mask[: kept.num_rows])
        for layer in range(SPEC.decoder.num_layers):
            np.testing.assert_allclose(kept.latents(layer), fresh.latents(layer), atol=1e-4)
        fresh.close()


def test_batch_parallel_has_no_pending_rows(bundle: Bundle, script: Any) -> None:
    script(("one", 9))
    with talk(bundle) as conversation:
        take(conversation.ask("Why?"))
        assert len(conversation.history.pending_rows) == 0


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
@pytest.mark.parametrize(("text", "num_frames"), [("hi", 12), ("much more text than speech", 2)])
def test_all_text_and_all_sound_arrive(
    bundle: Bundle, script: Any, mode: Any, text: str, num_frames: int
) -> None:
    script((text, num_frames))
    with talk(bundle, mode=mode, max_rows=100) as conversation:
        said, sound, done = take(conversation.ask("Why?"))
    assert said == done.text == text
    assert sound.shape == (num_frames * 2048,)
    assert np.isfinite(sound).all()
    metrics = done.metrics
    assert metrics.stopped == "end"
    assert metrics.num_rows == max(num_frames + 8, len(text) + 2)
    assert metrics.audio_s == num_frames * 2048 / 24000
    assert metrics.real_time_factor == metrics.compute_s / metrics.audio_s


def test_sound_equals_the_codecs_for_any_chunks(
    bundle: Bundle, script: Any, frames: list[Ids]
) -> None:
    script(("hi", 14))
    with talk(bundle) as conversation:
        chunks = [e.pcm for e in conversation.ask("Why?") if isinstance(e, AudioChunk)]
    with opened(bundle) as backend:
        codec = StreamingCodec(backend.codec, bundle.manifest.codec)
        whole = np.concatenate([codec.push(np.stack(frames[:14])), codec.finish()])
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert len(chunks[0]) == 3 * 2048 - bundle.manifest.codec.delay_samples
    assert len(chunks) > 4


def test_the_first_sound_comes_before_the_text_is_over(bundle: Bundle, script: Any) -> None:
    script(("a text of some length", 15))
    with talk(bundle, max_rows=100) as conversation:
        kinds = [type(event) for event in conversation.ask("Why?")]
    # The third frame completes with row 9; rows 1 to 9 show a letter each before.
    assert kinds.index(AudioChunk) == 9


def test_a_text_answer_is_silent(bundle: Bundle, script: Any) -> None:
    script(("just text", 5))
    with talk(bundle, mode="text") as conversation:
        said, sound, done = take(conversation.ask("Why?"))
    assert (said, sound.size) == ("just text", 0)
    assert done.metrics.num_rows == len("just text") + 2
    assert done.metrics.first_sample_ms is done.metrics.first_frame_ms is None
    assert done.metrics.real_time_factor is None


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_answer_stays_in_the_history_up_to_its_last_row(
    bundle: Bundle, script: Any, mode: Any
) -> None:
    script(("abcdef", 9), ("on", 2))
    with talk(bundle, mode=mode) as conversation:
        opening = listen(conversation, "Why?")[1].rows
        events = conversation.ask("Why?")
        assert [next(events), next(events)] == [TextPiece("a"), TextPiece("b")]
        events.close()
        cached, pending = conversation.engine.num_rows, conversation.history.pending_rows
        expected = np.concatenate([opening, text_rows(VOCABULARY, history_ids("ab"))])
        assert cached + len(pending) == len(expected)
        np.testing.assert_array_equal(pending, expected[cached:])
        assert take(conversation.ask("Go on."))[0] == "on"


def test_a_dropped_iterator_counts_as_closed(bundle: Bundle, script: Any) -> None:
    script(("abcdef", 9), ("on", 2))
    with talk(bundle) as conversation:
        for _ in conversation.ask("Why?"):
            break
        assert take(conversation.ask("Go on."))[0] == "on"


def test_two_answers_at_once_are_refused(bundle: Bundle) -> None:
    with talk(bundle) as conversation:
        events = conversation.ask("Why?")
        next(events)
        with pytest.raises(UsageError, match="the last answer is not finished"):
            next(conversation.ask("And?"))


def test_a_failure_during_an_answer_leaves_a_usable_conversation(
    bundle: Bundle, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(("abcdef", 9), ("on", 2))
    with talk(bundle) as conversation:
        step, steps = conversation.engine.decode_step, []

        def failing(rows: Ids) -> Any:
            steps.append(rows)
            if len(steps) == 4:
                raise BackendError("segment_01.onnx: failed to run")
            return step(rows)

        monkeypatch.setattr(conversation.engine, "decode_step", failing)
        with pytest.raises(BackendError, match="segment_01"):
            take(conversation.ask("Why?"))
        assert take(conversation.ask("Go on."))[0] == "on"


@pytest.mark.parametrize("mode", MODES)
def test_a_failing_prompt_leaves_no_trace(
    bundle: Bundle, script: Any, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(("abc", 3), ("on", 2))
    with talk(bundle, mode=mode) as conversation:
        take(conversation.ask("Why?"))
        before, pending = conversation.engine.num_rows, conversation.history.pending_rows
        with monkeypatch.context() as broken:
            broken.setattr(Encoder, "hear", _fail)
            with pytest.raises(BackendError):
                take(conversation.ask(voice(0.4)))
        assert conversation.engine.num_rows == before
        assert conversation.history.pending_rows is pending
        assert take(conversation.ask("Go on."))[0] == "on"


def test_a_prompt_that_fails_half_way_is_removed(
    bundle: Bundle, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(("on", 2))
    with talk(bundle) as conversation:
        engine = conversation.engine
        prefill = engine.prefill

        def half(rows: Ids, features: Any, mask: Any) -> None:
            prefill(rows[:5], features, mask[:5])
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr(engine, "prefill", half)
            with pytest.raises(KeyboardInterrupt):
                take(conversation.ask("Why?"))
        assert engine.num_rows == 0
        assert take(conversation.ask("Why?"))[0] == "on"


def _fail(*_: object) -> None:
    raise BackendError("encoder.onnx: failed to run")


def test_a_limit_on_rows_is_kept_and_reported(bundle: Bundle) -> None:
    with talk(bundle, max_rows=13) as conversation:
        done = take(conversation.ask("Why?"))[2]
    assert (done.metrics.num_rows, done.metrics.stopped) == (13, "max_rows")
    assert done.metrics.audio_s == 6 * 2048 / 24000


def test_a_full_context_ends_the_answer_and_the_next_question_begins_anew(bundle: Bundle) -> None:
    with talk(bundle, context_rows=60, max_rows=1000) as conversation:
        for event in conversation.ask("Why?"):
            if isinstance(event, TurnDone):
                assert event.metrics.stopped == "context"
                assert conversation.engine.num_rows == 60
                said = event.text
        assert take(conversation.ask("Why?"))[2].text == said


def test_a_prompt_without_room_for_an_answer_is_refused(bundle: Bundle) -> None:
    with talk(bundle, context_rows=40) as conversation:
        with pytest.raises(DoesNotFit, match="the context holds 40"):
            take(conversation.ask("a question of more than thirty letters"))
        assert conversation.engine.num_rows == 0


def test_as_released_the_answer_ends_with_its_speech(bundle: Bundle, script: Any) -> None:
    script(("much more text than speech", 2))
    settings = ConversationSettings.of(bundle, as_released=True)
    with Conversation(bundle, settings) as conversation:
        said, _, done = take(conversation.ask("Why?"))
    assert done.metrics.num_rows == 2 + 8
    assert said == "much more"


def test_equal_seeds_give_equal_answers(bundle: Bundle, frames: list[Ids]) -> None:
    def answer(seed: int) -> tuple[str, list[list[int]]]:
        settings = ConversationSettings.of(bundle, seed=seed)
        bold = dataclasses.replace(settings.sampler, text_top_k=20, audio_top_k=20)
        frames.clear()
        with Conversation(bundle, dataclasses.replace(settings, sampler=bold)) as conversation:
            text = take(conversation.ask("Why?"))[0]
        return text, [frame.tolist() for frame in frames]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_sound_longer_than_the_window_is_refused_and_leaves_no_trace(bundle: Bundle) -> None:
    with talk(bundle) as conversation:
        with pytest.raises(AudioError, match="split the utterance"):
            take(conversation.ask(voice(60)))
        assert take(conversation.ask("Why?"))[2].metrics.num_rows > 0


def test_only_the_features_of_the_utterance_are_used(bundle: Bundle) -> None:
    question = voice(0.5)
    with talk(bundle) as conversation:
        features, segment = listen(conversation, question)
        expected = opening(conversation, Heard(num_frames=26))
    with opened(bundle) as backend:
        whole = backend.encoder.hear_window(question, SPEC.encoder.max_frames)
    assert features.shape == (26, SPEC.decoder.width)
    np.testing.assert_array_equal(features, whole)
    np.testing.assert_array_equal(segment.rows, expected.rows)


def test_a_near_window_ends_a_second_after_the_utterance(bundle: Bundle) -> None:
    question = voice(0.5)
    settings = dataclasses.replace(ConversationSettings.of(bundle), encoder_window="near")
    with Conversation(bundle, settings) as conversation:
        features, _ = listen(conversation, question)
        longest, _ = listen(conversation, voice(1.99))
    with opened(bundle) as backend:
        near = backend.encoder.hear_window(question, 26 + SILENT_FRAMES)
        whole = backend.encoder.hear_window(question, SPEC.encoder.max_frames)
    np.testing.assert_array_equal(features, near)
    assert np.abs(features - whole).max() > 1e-6
    assert len(longest) == SPEC.encoder.max_frames  # no window is longer than the encoder's


def test_the_callers_time_is_not_counted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    meter = Meter()
    for _ in range(3):
        meter.resume()
        meter.pause()
        for _ in range(100):
            next(clock)
    assert meter.elapsed_ms() == meter.elapsed_ms() == 3000
    meter.resume()
    assert meter.elapsed_ms() == 4000


@pytest.mark.parametrize("question", ["Why?", voice(0.6)], ids=["typed", "heard"])
@pytest.mark.parametrize("num_steps", [5, 500], ids=["cut", "to its end"])
def test_compute_s_is_the_time_within_the_answers_steps_and_nothing_else(
    bundle: Bundle, question: Any, num_steps: int
) -> None:
    with talk(bundle) as conversation:
        answer, around_s = conversation.begin(question), 0.0
        for _ in range(num_steps):
            start_s = time.perf_counter()
            is_over = answer.advance() is None
            around_s += time.perf_counter() - start_s
            if is_over:
                break
        answer.finish()
        conversation.idle()
        metrics = answer.metrics()
        assert answer.metrics() == metrics
    # Half of the steps take the median or longer.
    steps_ms = (metrics.step_ms_p50 or 0.0) * (metrics.num_rows // 2)
    parts_ms = (metrics.encoder_ms or 0.0) + metrics.prefill_ms + steps_ms
    assert parts_ms <= metrics.compute_s * 1000 <= around_s * 1000
    assert (metrics.first_sample_ms or 0.0) <= metrics.compute_s * 1000


@pytest.mark.parametrize(
    ("fold_typed", "fed"), [(False, "Why, then? "), (True, "why then")], ids=["as it is", "folded"]
)
def test_a_typed_question_is_folded_where_the_settings_say_so(
    bundle: Bundle, fold_typed: bool, fed: str
) -> None:
    with talk(bundle, fold_typed=fold_typed) as conversation:
        take(conversation.ask("Why, then? "))
        assert conversation.history.past[0].user == Typed(text=fed)


@pytest.mark.parametrize(
    ("fold_typed", "question"), [(False, ""), (False, " \n\t"), (True, ""), (True, "?!")]
)
def test_an_empty_question_is_refused_and_changes_nothing(
    bundle: Bundle, fold_typed: bool, question: str
) -> None:
    with talk(bundle, fold_typed=fold_typed) as conversation:
        for ask in (conversation.ask, conversation.begin):
            with pytest.raises(SettingsError, match="the question is empty"):
                ask(question)
        assert conversation.engine.num_rows == 0
        assert take(conversation.ask("Why?"))[2].metrics.num_rows == 24


@pytest.mark.parametrize(
    "wrong", [{"max_rows": 0}, {"context_rows": 0}, {"threads": 0}, {"max_turns": 0}]
)
def test_invalid_settings_are_refused(bundle: Bundle, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        dataclasses.replace(ConversationSettings.of(bundle), **wrong)  # type: ignore[arg-type]


def test_an_unknown_speaker_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ArtifactError, match="this checkpoint has"):
        talk(bundle, speaker="M29")


def rewrite_golden(bundle: Path, **changes: Any) -> Bundle:
    """Change the golden values, with the file's hash."""
    with np.load(bundle / "golden.npz") as file:
        golden = {name: file[name] for name in file.files}
    golden |= changes
    np.savez(bundle / "golden.npz", **{k: v for k, v in golden.items() if v is not None})
    content = (bundle / "golden.npz").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda m: m["files"].update({"golden.npz": entry}))
    return Bundle.open(bundle)


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("near_features", "encoder.onnx"),
        ("text_logits", "segment_00.onnx"),
        ("code_logits", "head.onnx"),
        ("sound", "codec.onnx"),
    ],
)
@pytest.mark.parametrize("error", [0.003, np.nan])
def test_a_device_that_computes_something_else_is_refused_by_graph(
    own_copy: Path, name: str, graph: str, error: float
) -> None:
    with np.load(own_copy / "golden.npz") as file:
        values = file[name]
    values[-1] += error * np.abs(values).max()
    changed = rewrite_golden(own_copy, **{name: values})
    with pytest.raises(BackendError, match=rf"{graph}.*computes something else"):
        Conversation(changed)


def test_an_incomplete_golden_file_is_refused(own_copy: Path) -> None:
    with pytest.raises(ArtifactError, match="sound missing"):
        Conversation(rewrite_golden(own_copy, sound=None))


def test_a_damaged_expert_is_an_error_and_never_replaced(own_copy: Path) -> None:
    content = bytearray((own_copy / "experts.bin").read_bytes())
    for record in Bundle.open(own_copy).manifest.experts.records:
        content[record.offset + 8] ^= 1
    (own_copy / "experts.bin").write_bytes(content)
    with pytest.raises(ExpertUnavailable, match=r"experts\.bin: layer 1, expert \d is damaged"):
        Conversation(Bundle.open(own_copy))


def test_only_a_whole_question_that_is_too_quiet_gives_a_warning(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """The live loop may begin an answer after the first syllable."""
    spoken = voice(0.5)
    with talk(bundle) as conversation:
        conversation.begin(spoken[:800] * np.float32(0.01)).discard()
        take(conversation.ask(spoken))
        assert "the speech is at" not in caplog.text
        take(conversation.ask(spoken * np.float32(0.001)))
    assert "the speech is at" in caplog.text
