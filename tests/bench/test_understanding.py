"""`bench understanding`: its clips are new to the bundle, its tables count correctly."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from deeptalk_edge.bench.understanding import ENGLISH, NEAR, Outcome, clips, reliability, report
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.tiny import others
from deeptalk_edge.training.tiny.domain import questions
from deeptalk_edge.training.tiny.voices import need_synthesisers


def outcome(
    set_name: str, understood_p: float, *, right: bool, said: str | None = "a b"
) -> Outcome:
    p = understood_p
    return Outcome(set_name, "some", "a b", said, p < 0.5, p, p, right)


HEARD = [
    *[outcome("good", 0.97, right=True)] * 8,
    outcome("good", 0.2, right=True, said="a c"),
    outcome("good", 0.97, right=False),
    outcome("noisy", 0.6, right=True),
    outcome("unlike", 0.6, right=True, said=None),
    outcome("near", 0.9, right=False),
    *[outcome("noise", 0.01, right=False)] * 3,
    outcome("foreign", 0.01, right=False),
    outcome("english", 0.8, right=False),
]


def test_the_tables_count_refusals_words_and_certainty() -> None:
    lines = "\n".join(report(HEARD)).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["good"] == ["10", "9", "10.0%", "11.1%", "5.0%"]
    assert rows["unlike"] == ["1", "1", "0.0%", "0.0%", "100.0%"]
    assert rows["english"] == ["1", "0", "0.0%"]
    assert "others accepted: 20.0% of 5" in lines
    assert "wrong answers accepted: 100.0% of 1" in lines
    assert "sure (0.9) and wrong: 8.3% of 12 questions" in lines


def test_each_bin_has_its_mean_and_its_share_of_right_answers() -> None:
    bins = {
        (low, high): (count, mean, right)
        for low, high, count, mean, right in reliability(
            [(one.right_p, one.is_right) for one in HEARD]
        )
    }
    assert bins[0.97, 1.001] == pytest.approx((9, 0.97, 8 / 9))
    assert bins[0.0, 0.05] == pytest.approx((4, 0.01, 0.0))
    assert sum(count for count, *_ in bins.values()) == len(HEARD)


@pytest.fixture(scope="module")
def synthesisers() -> None:
    try:
        need_synthesisers()
    except SettingsError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("synthesisers")
def test_no_question_was_in_training_and_no_sentence_in_the_fit() -> None:
    known = {question.text: question for question in questions()}
    drawn = list(islice(clips(random.Random(3), 0.03), 6))
    assert drawn
    assert all(known[clip.text].is_held_out for clip in drawn)
    assert not {*NEAR, *ENGLISH} & {*known, *others.ENGLISH}


@pytest.mark.usefixtures("synthesisers")
def test_equal_seeds_make_equal_clips() -> None:
    first, again = (list(islice(clips(random.Random(3), 0.03), 3)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert (one.set_name, one.text) == (other.set_name, other.text)
        np.testing.assert_array_equal(one.pcm, other.pcm)
