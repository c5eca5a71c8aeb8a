"""The counts of an hour of noise; a quiet room has none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deeptalk_edge.bench import noise_hour
from deeptalk_edge.bench.harness import spoken_questions
from deeptalk_edge.bench.noise_hour import MINUTE, Listener, Minutes, Span, Tally, make_minutes
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.sound.wav import read_wav, resample

ASKED = (10 * RATE_HZ, 12 * RATE_HZ)


@pytest.mark.parametrize(("second", "num_false"), [(5.0, 1), (9.95, 0), (11.0, 0), (12.1, 1)])
def test_a_start_or_a_stop_without_a_question_is_false(second: float, num_false: int) -> None:
    moment = round(second * RATE_HZ)
    tally = Minutes(starts=[moment], stops=[moment, moment]).tally([ASKED])
    assert (tally.false_starts, tally.false_stops) == (num_false, 2 * num_false)


@pytest.mark.parametrize(
    ("utterances", "num_missed"),
    [
        ([], 1),
        ([(10.3, 12.2)], 0),
        ([(10.6, 12.0)], 1),  # its first word is cut
        ([(8.0, 12.0)], 1),  # joined with earlier sound
        ([(10.0, 11.0), (11.2, 12.0)], 1),  # asked in two
        ([(5.0, 6.0), (10.0, 12.0)], 0),
    ],
)
def test_a_question_counts_as_missed_unless_the_model_gets_all_of_it_alone(
    utterances: list[tuple[float, float]], num_missed: int
) -> None:
    spans: list[Span] = [(round(a * RATE_HZ), round(b * RATE_HZ)) for a, b in utterances]
    assert Minutes(utterances=spans).tally([ASKED]).missed == num_missed


def test_figures_are_scaled_to_an_hour() -> None:
    total = Tally()
    for _ in range(3):
        total += Tally(minutes=2, questions=6, false_starts=1, false_stops=2, missed=0)
    assert total.questions == 18
    assert total.an_hour() == {"false_starts": 30, "false_stops": 60, "missed": 0, "false_words": 0}


def test_a_quiet_room_has_no_false_starts_or_stops() -> None:
    recordings = [resample(read_wav(path), RATE_HZ).pcm for path in spoken_questions()]
    (minute,) = make_minutes(recordings, 1, seed=0, kinds=["door"])
    quiet = Listener("webrtc", None).listen(minute)
    assert quiet == Tally(minutes=1, questions=3)
    loud = Listener("webrtc", 0.0).listen(minute)
    assert loud.false_starts > 0


def test_the_noise_of_a_minute_is_as_loud_as_the_questions() -> None:
    recordings = [resample(read_wav(spoken_questions()[0]), RATE_HZ).pcm]
    first, second = make_minutes(recordings, 2, seed=3, kinds=["rain", "tap"])
    assert (first.kind, second.kind) == ("rain", "tap")
    assert all(MINUTE < start < end < 2 * MINUTE for start, end in second.questions)
    assert len(first.noise) == len(first.speech) == MINUTE
    assert not np.array_equal(first.noise, second.noise)


def test_the_last_line_says_that_it_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--minutes", "1", "--kinds", "door", "--levels", "0", "--detectors", "webrtc"]
    assert noise_hour.main(flags) == 0
    out = capsys.readouterr().out
    quiet, loud = json.loads(out.splitlines()[-1])["figures"]["simulated"]
    assert (quiet["below_db"], loud["below_db"]) == (None, 0)
    assert loud["by_kind"]["door"]["false_starts"] * 60 == loud["an_hour"]["false_starts"]
    assert "simulated: 1 min, 3 questions" in out
