"""Settings of a conversation: the checkpoint's defaults, and a user's changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.lm.sampler import Penalty
from deeptalk_edge.runtime.settings import MOST_THREADS, ConversationSettings

SHARED = ("system", "speaker", "mode", "max_rows", "context_rows", "max_turns", "fold_typed")
SAMPLING = ("text_top_k", "audio_top_k", "temperature", "repetition_penalty")


def test_the_checkpoints_own_settings_are_the_defaults(bundle: Bundle) -> None:
    own, settings = bundle.manifest.generation, ConversationSettings.of(bundle)
    assert {name: getattr(settings, name) for name in SHARED} == {
        name: getattr(own, name) for name in SHARED
    }
    assert {name: getattr(settings.sampler, name) for name in SAMPLING} == {
        name: getattr(own, name) for name in SAMPLING
    }
    assert (settings.sampler.penalty, settings.ends_with_speech) == (Penalty.ONCE, False)


def test_a_user_changes_the_mode_the_seed_and_the_threads(bundle: Bundle) -> None:
    settings = ConversationSettings.of(bundle, mode="text", seed=7, threads=2)
    assert (settings.mode, settings.sampler.seed, settings.threads) == ("text", 7, 2)


def test_the_released_loop_counts_a_penalty_as_it_did_and_ends_with_speech(bundle: Bundle) -> None:
    settings = ConversationSettings.of(bundle, as_released=True)
    assert (settings.sampler.penalty, settings.ends_with_speech) == (Penalty.AS_RELEASED, True)


@pytest.mark.parametrize("name", ["max_rows", "context_rows", "max_turns"])
def test_the_smallest_valid_setting_is_1(bundle: Bundle, name: str) -> None:
    settings = ConversationSettings.of(bundle)
    assert getattr(replace(settings, **{name: 1}), name) == 1  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=f"{name} = 0"):
        replace(settings, **{name: 0})  # type: ignore[arg-type]


def test_the_number_of_threads_has_limits(bundle: Bundle) -> None:
    settings = ConversationSettings.of(bundle)
    for threads in (1, MOST_THREADS):
        assert replace(settings, threads=threads).threads == threads
    for threads in (0, MOST_THREADS + 1):
        with pytest.raises(SettingsError, match=f"threads = {threads}"):
            replace(settings, threads=threads)
