"""Answers never depend on which experts were resident."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.replay.simulator import ReplaySettings, replay
from deeptalk_edge.errors import BackendError, ExpertUnavailable
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.backends.ort.graph import OrtBinding
from deeptalk_edge.runtime.experts.look_ahead import LookAhead
from deeptalk_edge.runtime.experts.open import recorded_routes
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase
from deeptalk_edge.runtime.experts.routes import Modality, RouteRecorder
from deeptalk_edge.runtime.lm.engine import Engine
from tests.runtime.experts.paged_engine import open_bundle_pager, open_engine
from tests.runtime.experts.records import Fault, sleepy
from tests.runtime.fed import own_experts
from tests.runtime.speaking_checkpoint import SPEC

NUM_RECORDS = len(SPEC.decoder.moe_layers) * SPEC.decoder.num_experts
MINIMUM = 2
random = np.random.default_rng(7)
PROMPT: Ids = random.integers(0, SPEC.vocabulary.size, (12, 8))
FEATURES = random.normal(size=(5, SPEC.decoder.width)).astype(np.float32)
MASK = np.isin(np.arange(12), [4, 5, 6, 7, 11])


def answer(engine: Engine, between: Callable[[], None] = lambda: None) -> NDArray[np.float32]:
    """Greedy rows of two items, and the logits that chose them, down to the bit."""
    engine.reset()
    engine.prefill(PROMPT, FEATURES, MASK)
    engine.fork()
    rows = np.stack([PROMPT[-1], PROMPT[0]])
    said = []
    for _ in range(12):
        logits = engine.decode_step(rows)
        said.append(np.concatenate([logits.text.ravel(), logits.codes.ravel()]))
        rows[:, -1] = logits.text.argmax(1)
        rows[:, :-1] = logits.codes.argmax(2)
        between()
    return np.stack(said)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> NDArray[np.float32]:
    engine = OrtEngine(bundle, context_rows=32, open_experts=own_experts(bundle))
    said = answer(engine)
    engine.close()
    return said


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [1.0, 0.65, 0.42, 0.25, None])
def test_answers_are_the_same_for_any_pool_and_policy(
    bundle: Bundle, expected: NDArray[np.float32], policy: str, share: float | None
) -> None:
    num_slots = MINIMUM if share is None else max(round(NUM_RECORDS * share), MINIMUM)
    with open_bundle_pager(bundle, num_slots, policy=policy, poison=True) as pager:
        said = answer(open_engine(bundle, pager))
        np.testing.assert_array_equal(said, expected)
        assert pager.num_leased == 0


@pytest.mark.parametrize("seed", range(4))
def test_hints_phases_and_slow_disks_change_no_bit(
    bundle: Bundle, expected: NDArray[np.float32], seed: int
) -> None:
    fuzz = Random(seed)

    def between() -> None:
        for _ in range(3):
            layer = fuzz.choice(list(SPEC.decoder.moe_layers))
            pager.hint(layer, fuzz.sample(range(SPEC.decoder.num_experts), 2))
        if fuzz.random() < 0.3:
            pager.enter(fuzz.choice(list(Phase)))

    fault = sleepy(0.002, seed)
    num_slots = 3 + seed
    with open_bundle_pager(bundle, num_slots, poison=True, fault=fault) as pager:
        np.testing.assert_array_equal(answer(open_engine(bundle, pager), between), expected)


def flaky(seed: int) -> Fault:
    """Short reads and errors, but never two errors in a row."""
    fuzz, failed = Random(seed), [False]

    def fault(offset: int, buffer: memoryview) -> int | None:
        failed[0] = not failed[0] and fuzz.random() < 0.2
        if failed[0]:
            raise OSError(errno.EIO, "Input/output error")
        return 4096 if fuzz.random() < 0.5 else None

    return fault


def test_a_disk_that_stutters_changes_no_bit(bundle: Bundle, expected: NDArray[np.float32]) -> None:
    with open_bundle_pager(bundle, 4, fault=flaky(1), readers=1, paranoid=True) as pager:
        np.testing.assert_array_equal(answer(open_engine(bundle, pager)), expected)
        assert pager.report()["retries"] > 0


def test_a_read_error_that_is_corrected_changes_no_bit(
    bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    starts = {record.offset for record in bundle.manifest.experts.records}
    damaged: set[int] = set()

    def every_other_time(offset: int) -> bool:
        damaged.symmetric_difference_update({offset} & starts)
        return offset in damaged

    with open_bundle_pager(bundle, 4, damages=every_other_time, paranoid=True) as pager:
        np.testing.assert_array_equal(answer(open_engine(bundle, pager)), expected)
        report = pager.report()
        assert report["retries"] == sum(report["loads"].values()) > 0


def test_a_disk_that_fails_ends_the_answer_and_not_the_engine(
    bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    broken = [False]

    def fault(offset: int, buffer: memoryview) -> None:
        if broken[0]:
            raise OSError(errno.EIO, "Input/output error")

    with open_bundle_pager(bundle, 3, fault=fault) as pager:
        engine = open_engine(bundle, pager)
        engine.prefill(PROMPT, FEATURES, MASK)
        broken[0] = True
        with pytest.raises(ExpertUnavailable, match=r"experts\.bin: layer \d, expert \d cannot"):
            step_on(engine)
        assert pager.num_leased == 0
        broken[0] = False
        np.testing.assert_array_equal(answer(engine), expected)


def test_a_kernel_that_fails_leaves_no_lease(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OrtBinding) -> None:
        raise BackendError("expert.onnx: failed to run")

    with open_bundle_pager(bundle, 4) as pager:
        engine = open_engine(bundle, pager)
        binding = engine._experts._binding
        monkeypatch.setattr(binding, "run", fail.__get__(binding))
        with pytest.raises(BackendError) as caught:
            engine.prefill(PROMPT, FEATURES, MASK)
        assert pager.num_leased == 0
        assert caught.tb is not None  # the traceback still holds the frames that held the leases


def step_on(engine: Engine) -> None:
    for row in PROMPT:
        engine.decode_step(row[None])


def test_two_sessions_of_one_pager_answer_as_each_does_alone(
    bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    with open_bundle_pager(bundle, 3, poison=True) as pager:
        one, other = open_engine(bundle, pager), open_engine(bundle, pager)
        np.testing.assert_array_equal(answer(one, lambda: interrupt(other)), expected)


def interrupt(engine: Engine) -> None:
    """Another session's step in between."""
    if engine.num_rows > 20:
        engine.reset()
    engine.decode_step(PROMPT[engine.num_rows % 12][None])


def test_a_recorder_gets_every_routing_and_changes_none(
    bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    decoder = SPEC.decoder
    with open_bundle_pager(bundle, 4) as pager:
        engine = open_engine(bundle, pager)
        recorder = engine.experts.recorder = RouteRecorder()
        engine.experts.user_started_speaking()
        np.testing.assert_array_equal(answer(engine), expected)
        phases = [each.phase for each in recorder.passes]
        assert phases == [Phase.LISTENING, Phase.THINKING] + [Phase.SPEAKING] * 12
        prefill, step = recorder.passes[1].calls, recorder.passes[-1].calls
        assert [call.layer for call in step] == list(decoder.moe_layers)
        # The prompt's last router belongs to the tail, which a prefill does not run.
        assert [call.layer for call in prefill] == list(decoder.moe_layers)[:-1]
        assert prefill[0].ids.shape == (12, decoder.top_k)
        assert (prefill[0].modality == Modality.HEARD).tolist() == MASK.tolist()
        assert step[0].modality.tolist() == [Modality.SPOKEN, Modality.WRITTEN]
        report = pager.report()
        routes = recorded_routes(bundle, recorder)
        residency = replay(
            routes, lambda n, e: POLICIES["phased"](n, e, None), ReplaySettings(num_slots=4)
        )
        assert report["hits_by_layer"] == residency.hits.tolist()
        assert report["misses_by_layer"] == residency.misses.tolist()


def test_looking_ahead_guesses_the_next_layer_and_changes_no_bit(
    bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    first, second = SPEC.decoder.moe_layers
    gate = np.eye(SPEC.decoder.num_experts, SPEC.decoder.width, dtype=np.float32)
    with open_bundle_pager(bundle, 4) as pager:
        engine = open_engine(bundle, pager)
        engine.experts = type(engine.experts)(
            pager,
            engine.experts._read_record,
            look_ahead=LookAhead({first: gate}, SPEC.decoder.top_k),
            recorder=(recorder := RouteRecorder()),
        )
        engine._experts._experts = engine.experts
        np.testing.assert_array_equal(answer(engine), expected)
        assert pager.report()["loads"]["hint"] > 0
        for each in recorder.passes:
            for call in each.calls:
                assert len(call.predicted) == (len(call.ids) if call.layer == first else 0)
                assert call.layer in (first, second)


def test_tables_hold_the_addresses_of_a_group_and_nothing_else(bundle: Bundle) -> None:
    layer = SPEC.decoder.moe_layers[0]
    with open_bundle_pager(bundle, 4, wave_experts=2) as pager:
        experts = open_engine(bundle, pager).experts
        ids, weights = np.array([[0, 3], [4, 3]]), np.ones((2, 2), np.float32)
        normed = np.zeros((2, SPEC.decoder.width), np.float32)
        groups = []
        for table in experts.tables(layer, ids, weights, normed):
            group = np.flatnonzero(table).tolist()
            np.testing.assert_array_equal(table[group], pager.addresses(layer)[group])
            groups.append(group)
        assert groups == [[0, 3], [4]]
        assert pager.num_leased == 0
