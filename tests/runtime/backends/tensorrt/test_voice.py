"""The tests of the conversation and the voice loop, run on emulated engines of their
checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

import pytest

from deeptalk_edge.bundle.reader import Bundle
from tests.runtime import test_conversation
from tests.runtime.backends.tensorrt.emulation import export_engines, gpu, profile, tensorrt_module
from tests.runtime.loop import test_live, test_opening, test_speculation

pytestmark = pytest.mark.slow  # 40 s in all

LENT = {
    test_conversation: [
        "frames",
        "script",
        "text_ids",
        "test_a_closed_answer_stays_in_the_history_up_to_its_last_row",
        "test_a_dropped_iterator_counts_as_closed",
        "test_a_full_context_ends_the_answer_and_the_next_question_begins_anew",
        "test_a_limit_on_rows_is_kept_and_reported",
        "test_a_prompt_that_fails_half_way_is_removed",
        "test_a_prompt_without_room_for_an_answer_is_refused",
        "test_all_text_and_all_sound_arrive",
        "test_an_answer_equals_the_torch_models_id_for_id",
        "test_batch_parallel_has_no_pending_rows",
        "test_compute_s_is_the_time_within_the_answers_steps_and_nothing_else",
        "test_equal_seeds_give_equal_answers",
    ],
    test_live: [
        "question",
        "test_a_spoken_question_gets_a_spoken_answer_in_real_time",
    ],
    test_opening: [
        "test_no_answer_depends_on_when_the_opening_was_fed",
    ],
}
"""Fixtures and tests of other modules, which use the bundles of this module."""

LENT_SLOW = {
    test_speculation: [
        "test_an_interrupted_answer_keeps_the_heard_words_and_the_next_one_is_right",
        "test_a_speculative_answer_is_the_same_to_the_last_sample",
    ],
}
"""Tests that take half a minute."""


def _slow(test: Callable[..., None]) -> Callable[..., None]:
    """Return a copy, so that the mark does not change the original."""
    assert isinstance(test, FunctionType)
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__)
    copy.__dict__.update(test.__dict__)
    return pytest.mark.slow(copy)


for _module, _names in LENT.items():
    globals().update({name: getattr(_module, name) for name in _names})
for _module, _names in LENT_SLOW.items():
    globals().update({name: _slow(getattr(_module, name)) for name in _names})


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    """Replaces the bundle for ONNX Runtime, with the same checkpoint."""
    checkpoint = bundle_path.parent / "checkpoint"
    place = bundle_path.parent / "tensorrt"
    place.mkdir()
    (place / "checkpoint").symlink_to(checkpoint)  # where the tests look for it
    return export_engines(place, profile("operators", "float32"), checkpoint=checkpoint)


@pytest.fixture(scope="session")
def tiny(exact: Bundle) -> Bundle:
    return exact


@pytest.fixture(autouse=True)
def _emulated(tmp_path: Path) -> Iterator[None]:
    with tensorrt_module(tmp_path), gpu():
        yield
