"""Ids depend only on seed, turn and logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.errors import BackendError, SettingsError
from deeptalk_edge.runtime.lm.sampler import Penalty, Sampler, SamplerSettings
from tests.specs import VOCABULARY

Array = NDArray[np.float32]

K, V_TEXT, V_CODE = 7, VOCABULARY.text_size, VOCABULARY.codebook_block


def logits(seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return (
        random.normal(size=V_TEXT).astype(np.float32),
        random.normal(size=(K, V_CODE)).astype(np.float32),
    )


def sampler(turn: int = 0, **settings: Any) -> Sampler:
    return Sampler(VOCABULARY, SamplerSettings(**settings), turn=turn)


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 4))
def test_an_id_is_among_the_best_of_its_stream(
    seed: int, text_top_k: int, audio_top_k: int, temperature: float
) -> None:
    text, codes = logits(seed)
    chooser = sampler(
        seed=seed, text_top_k=text_top_k, audio_top_k=audio_top_k, temperature=temperature
    )
    text_id, code_ids = chooser.sample(text, codes)
    assert (text > text[text_id]).sum() < text_top_k
    for stream, code in zip(codes, code_ids, strict=True):
        assert (stream > stream[code]).sum() < audio_top_k


@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=12, max_size=12))
def test_the_same_seed_gives_the_same_ids_whatever_streams_were_skipped(
    seed: int, skipped: list[bool]
) -> None:
    one, other = (sampler(seed=seed, text_top_k=9, audio_top_k=9) for _ in range(2))
    for row, skip in enumerate(skipped):
        text, codes = logits(row)
        both = one.sample(text, codes)
        if skip:
            np.testing.assert_array_equal(other.sample(None, codes)[1], both[1])
        else:
            assert other.sample(text, None)[0] == both[0]


def test_turns_draw_different_numbers() -> None:
    def ids(turn: int) -> list[int]:
        chooser = sampler(turn, text_top_k=20)
        return [chooser.sample(logits(row)[0], None)[0] for row in range(20)]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


@pytest.mark.parametrize(
    ("temperature", "offset"), [(0.5, 0), (1.0, 0), (2.0, 0), (1.0, 800), (1.0, -800)]
)
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(
    temperature: float, offset: float
) -> None:
    text = np.full(V_TEXT, offset - 9, np.float32)
    text[[3, 5, 8]] = np.log([0.5, 0.3, 0.2]) + offset
    codes = np.tile(text[:V_CODE], (K, 1))
    chooser = sampler(text_top_k=3, audio_top_k=3, temperature=temperature)
    drawn = [np.append(*chooser.sample(text, codes)) for _ in range(4000)]
    likely = np.array([0.5, 0.3, 0.2]) ** (1 / temperature)
    for ids in np.array(drawn).T:
        shares = [np.mean(ids == i) for i in (3, 5, 8)]
        np.testing.assert_allclose(shares, likely / likely.sum(), atol=0.03)


def test_the_logits_are_never_written_to() -> None:
    text, codes = logits(0)
    text.setflags(write=False)
    codes.setflags(write=False)
    for penalty in Penalty:
        chooser = sampler(repetition_penalty=1.5, penalty=penalty)
        for _ in range(3):
            chooser.sample(text, codes)


def say_twice(penalty: Penalty, values: dict[int, float], factor: float = 2.0) -> list[int]:
    """The first ids chosen greedily from these logits, which never change."""
    text = np.full(V_TEXT, -50, np.float32)
    for text_id, value in values.items():
        text[text_id] = value
    chooser = sampler(repetition_penalty=factor, penalty=penalty)
    return [chooser.sample(text, None)[0] for _ in range(5)]


def test_a_repeated_id_is_penalised_once() -> None:
    # 8 falls to 4 and not lower, so 3 stays below it.
    assert say_twice(Penalty.ONCE, {1: 8.0, 2: 3.0}) == [1, 1, 1, 1, 1]


def test_as_released_an_id_is_penalised_once_per_occurrence() -> None:
    # 8, 4, 2: below 3, which falls to 1.5; then 2 again.
    assert say_twice(Penalty.AS_RELEASED, {1: 8.0, 2: 3.0}) == [1, 1, 2, 1, 2]


def test_the_penalty_lowers_negative_logits() -> None:
    assert say_twice(Penalty.ONCE, {1: -1.0, 2: -1.5}) == [1, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["PAD_T", "EOT"])
def test_ids_that_structure_the_grid_are_never_penalised(name: str) -> None:
    pad = VOCABULARY.text_specials[name]
    assert say_twice(Penalty.ONCE, {pad: 8.0, 2: 6.0}) == [pad] * 5
    assert say_twice(Penalty.AS_RELEASED, {pad: 8.0, 2: 6.0})[1] == 2


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("top_k", [1, 4])
def test_logits_that_are_not_finite_name_their_stream(broken: float, top_k: int) -> None:
    chooser = sampler(text_top_k=top_k, audio_top_k=top_k)
    text, codes = logits(0)
    text[7] = broken
    with pytest.raises(BackendError, match="logits of text are not finite"):
        chooser.sample(text, codes)
    codes[2, 5] = codes[6, 0] = broken
    with pytest.raises(BackendError, match="logits of codebook 2, codebook 6 are not finite"):
        chooser.sample(None, codes)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"text_top_k": 0},
        {"audio_top_k": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"repetition_penalty": 0.0},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        sampler(**settings)
