"""The row grid: the generation loop inverts the layout of `delay`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.model.rows import AnswerRows, Ids, codec_columns, delay, text_rows
from tests.specs import VOCABULARY

K = VOCABULARY.num_codebooks
PAD_A = codec_columns(VOCABULARY, VOCABULARY.pad_audio)
TEXT = st.lists(st.integers(0, 29), max_size=30).map(lambda ids: [30, *ids, VOCABULARY.eos])
FRAMES = st.integers(0, 20).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, VOCABULARY.codebook_size - 1), min_size=K, max_size=K),
        min_size=n,
        max_size=n,
    )
)


def _frames(num_frames: int) -> Ids:
    return np.arange(num_frames * K).reshape(num_frames, K) % VOCABULARY.codebook_size


def _text(num_ids: int) -> list[int]:
    return [*(i % 30 for i in range(num_ids - 1)), VOCABULARY.eos]


def _play(rows: Ids) -> tuple[list[Ids], Ids]:
    """Sample the rows of a grid in turn, noise where it is fixed: frames, and rows to feed."""
    answer = AnswerRows(VOCABULARY)
    noise = np.random.default_rng(0)
    frames, fed = [], []
    for row in rows:
        codes = row[:-1] - codec_columns(VOCABULARY, 0)
        fixed = codes == VOCABULARY.pad_audio
        codes = np.where(fixed, noise.integers(0, VOCABULARY.codebook_size, K), codes)
        text_id = 5 if answer.is_text_done else int(row[-1])
        next_row, frame = answer.push(text_id, codes)
        fed.append(next_row)
        if frame is not None:
            frames.append(frame)
    assert answer.is_done
    assert answer.num_clamped == 0
    return frames, np.array(fed)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("num_ids", [1, 3, 40])
def test_laying_an_answer_out_and_playing_it_returns_its_codes(
    num_frames: int, num_ids: int
) -> None:
    codes = _frames(num_frames)
    rows = delay(VOCABULARY, codes, _text(num_ids))
    frames, fed = _play(rows)
    np.testing.assert_array_equal(np.array(frames, np.int64).reshape(-1, K), codes)
    np.testing.assert_array_equal(fed, rows)


@given(frames=FRAMES, text_ids=TEXT)
def test_any_answer_is_fed_as_it_was_laid_out(frames: list[list[int]], text_ids: list[int]) -> None:
    codes = np.array(frames, np.int64).reshape(-1, K)
    rows = delay(VOCABULARY, codes, text_ids)
    played, fed = _play(rows)
    np.testing.assert_array_equal(np.array(played, np.int64).reshape(-1, K), codes)
    np.testing.assert_array_equal(fed, rows)


def test_codebook_i_lags_the_text_by_i_plus_1_rows() -> None:
    rows = delay(VOCABULARY, _frames(2), _text(3))
    local = rows[:, :-1] - codec_columns(VOCABULARY, 0)
    eoa, pad = VOCABULARY.end_audio, VOCABULARY.pad_audio
    assert local[:, 0].tolist() == [pad, 0, 7, eoa, pad, pad, pad, pad, pad, pad]
    assert local[:, 6].tolist() == [pad] * 7 + [6, 13, eoa]
    assert rows[:5, -1].tolist() == [0, 1, VOCABULARY.eos, VOCABULARY.eot, VOCABULARY.pad_text]


@pytest.mark.parametrize(("num_frames", "num_rows"), [(0, 8), (1, 9), (8, 16)])
def test_an_answer_takes_one_row_for_the_end_and_k_for_the_delay(
    num_frames: int, num_rows: int
) -> None:
    assert len(delay(VOCABULARY, _frames(num_frames), _text(2))) == num_rows


def test_a_text_longer_than_its_speech_is_kept_whole() -> None:
    rows = delay(VOCABULARY, _frames(1), _text(40))
    assert rows[:, -1].tolist() == [*_text(40), VOCABULARY.eot]
    np.testing.assert_array_equal(rows[9:, :-1], np.tile(PAD_A, (len(rows) - 9, 1)))


def test_the_first_frame_is_complete_k_rows_after_the_first_text() -> None:
    answer = AnswerRows(VOCABULARY)
    done = [answer.push(1, np.full(K, 3))[1] is not None for _ in range(K + 2)]
    assert done == [False] * K + [True, True]


def test_the_first_row_is_only_text_whatever_was_sampled() -> None:
    row, frame = AnswerRows(VOCABULARY).push(4, np.full(K, VOCABULARY.end_audio))
    assert frame is None
    np.testing.assert_array_equal(row, text_rows(VOCABULARY, [4])[0])


def test_an_end_of_audio_sampled_in_the_first_row_ends_nothing() -> None:
    answer = AnswerRows(VOCABULARY)
    answer.push(4, np.full(K, VOCABULARY.end_audio))
    for row in range(1, K + 5):
        assert not answer.is_speech_done
        fed, frame = answer.push(4, np.full(K, 3))
        assert (frame is not None) is (row >= K)
        np.testing.assert_array_equal(
            fed[:-1], np.where(np.arange(K) < row, codec_columns(VOCABULARY, 3), PAD_A)
        )


def test_the_text_column_shows_eot_once_then_padding() -> None:
    answer = AnswerRows(VOCABULARY)
    sampled = [4, VOCABULARY.eos, 6, 7, VOCABULARY.eos]
    shown = [int(answer.push(text_id, np.zeros(K, np.int64))[0][-1]) for text_id in sampled]
    pad = VOCABULARY.pad_text
    assert shown == [4, VOCABULARY.eos, VOCABULARY.eot, pad, pad]


def test_an_answer_continues_as_text_after_its_speech() -> None:
    answer = AnswerRows(VOCABULARY)
    for row in delay(VOCABULARY, _frames(1), _text(40))[:20]:
        answer.push(int(row[-1]), row[:-1] - codec_columns(VOCABULARY, 0))
    assert answer.is_speech_done
    assert not answer.is_done


def test_a_typed_answer_is_done_with_its_text_and_never_sounds() -> None:
    answer = AnswerRows(VOCABULARY, speech=False)
    for text_id in [*range(12), VOCABULARY.eos]:
        assert not answer.is_done
        row, frame = answer.push(text_id, np.full(K, 3))
        assert frame is None
        np.testing.assert_array_equal(row[:-1], PAD_A)
    assert answer.is_done


@pytest.mark.parametrize("special", [VOCABULARY.codebook_size, VOCABULARY.begin_audio])
def test_a_special_id_inside_a_frame_is_code_0_and_counted(special: int) -> None:
    answer = AnswerRows(VOCABULARY)
    codes = np.full(K, 3)
    codes[2] = special
    frames = [answer.push(1, codes)[1] for _ in range(K + 1)]
    assert frames[-1] is not None
    assert frames[-1].tolist() == [3, 3, 0, 3, 3, 3, 3]
    assert answer.num_clamped == 1
