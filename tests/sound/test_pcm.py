"""PCM of every scale and channel count is converted for the model, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.level import warn_if_quiet
from deeptalk_edge.runtime.conversation import Conversation, TurnDone
from deeptalk_edge.sound.pcm import Downmix, as_int16, as_pcm, within_scale
from tests.runtime.sounds import voice

INT16 = np.rint(voice(0.5) * 2**15).astype(np.int16)


def test_16_bit_pcm_gets_the_answer_of_the_same_floats(bundle: Bundle) -> None:
    texts = []
    for pcm in (INT16, INT16.astype(np.float32) / 2**15):
        with Conversation(bundle) as talk:
            *_, done = talk.ask(pcm)
            assert isinstance(done, TurnDone)
            texts.append(done.text)
            talk.begin(pcm).discard()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "f2", "f4", "f8"])
def test_every_type_of_pcm_becomes_float32_of_full_scale_1(dtype: str) -> None:
    given = INT16.astype(dtype) if dtype.endswith("i2") else (INT16 / 2**15).astype(dtype)
    found = as_pcm(given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, INT16 / 2**15, atol=3e-4 if dtype == "f2" else 1e-7)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "i8", "?", "c8", "O"])
def test_pcm_of_another_type_is_refused_by_its_name(dtype: str, bundle: Bundle) -> None:
    wrong = np.ones(100).astype(dtype)
    with Conversation(bundle) as talk:
        for ask in (talk.ask, talk.begin):
            with pytest.raises(AudioError, match=f"found an array of {wrong.dtype}"):
                ask(wrong)


@pytest.mark.parametrize("wrong", [np.zeros((2, 100), np.float32), np.zeros(0, np.int16)])
def test_pcm_that_is_not_mono_or_empty_is_refused(wrong: NDArray[np.generic]) -> None:
    with pytest.raises(AudioError, match=r"mono PCM .* found shape"):
        as_pcm(wrong)


def test_pcm_that_is_not_an_array_is_refused_with_the_way_out() -> None:
    with pytest.raises(AudioError, match=r"found list; numpy\.asarray"):
        as_pcm([0.1, 0.2])


@pytest.mark.parametrize("peak", [4.01, 32767.0, 1e30])
def test_floats_far_beyond_full_scale_are_refused_with_their_value(peak: float) -> None:
    with pytest.raises(
        AudioError, match=rf"the PCM: float samples reach {peak:g}".replace("+", r"\+")
    ):
        as_pcm(np.array([0.1, -peak], np.float32))


@pytest.mark.parametrize("peak", [1.01, 4.0])
def test_floats_a_little_beyond_full_scale_are_clipped_with_a_warning(
    peak: float, caplog: pytest.LogCaptureFixture
) -> None:
    samples = np.array([0.5, peak, -peak], np.float32)
    np.testing.assert_array_equal(within_scale(samples, "a.wav"), [0.5, 1, -1])
    assert f"a.wav: samples reach {peak:.2f}" in caplog.text
    assert samples[1] == np.float32(peak)  # the caller's array is unchanged


def test_full_scale_itself_is_not_changed(caplog: pytest.LogCaptureFixture) -> None:
    samples = np.tile(np.array([1, -1], np.float32), 200)
    assert as_pcm(samples) is samples
    assert not caplog.records


def test_16_bit_values_never_wrap() -> None:
    pcm = np.array([[0.5, 1.0, 1.001, 3.0], [-0.5, -1.0, -1.001, -3.0]], np.float32)
    expected = [[16384, 32767, 32767, 32767], [-16384, -32767, -32767, -32767]]
    np.testing.assert_array_equal(as_int16(pcm), expected)


@pytest.mark.parametrize(("dbfs", "warns"), [(-30, False), (-45, True), (-60, True)])
def test_pcm_too_quiet_for_the_model_is_answered_with_a_warning(
    dbfs: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_quiet(np.full(16000, 10 ** (dbfs / 20), np.float32))
    assert (f"the speech is at {dbfs} dBFS" in caplog.text) is warns


@pytest.mark.parametrize(
    ("channels", "chosen"),
    [
        ([0.8, -0.8], 0),  # a balanced line
        ([0.5, -0.8], 1),
        ([0.0, 0.7, -0.7], 1),
        ([0.8, 0.8], None),
        ([0.8, 0.0], None),
        ([0.8, 0.3, 0.1, 0.0, 0.0, 0.0], None),
        ([0.8, -0.1], None),  # some crosstalk with a minus
    ],
)
def test_channels_that_cancel_each_other_do_not_vanish(
    channels: list[float], chosen: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    wide = voice(0.3)[:, None] * np.array(channels, np.float32)
    whole = Downmix("a.wav").push(wide)
    expected = wide.mean(axis=1) if chosen is None else wide[:, chosen]
    np.testing.assert_allclose(whole, expected, atol=1e-7)
    by_blocks = Downmix("vmic")
    found = np.concatenate([by_blocks.push(block) for block in np.split(wide, 15)])
    np.testing.assert_allclose(found, expected, atol=1e-7)
    words = f"vmic: the channels cancel each other; channel {(chosen or 0) + 1} of"
    assert caplog.text.count(words) == (chosen is not None)


def test_channels_with_different_sounds_are_averaged() -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((4000, 2)).astype(np.float32)
    np.testing.assert_allclose(Downmix("a.wav").push(wide), wide.mean(axis=1), atol=1e-6)


def test_a_constant_in_each_channel_is_not_cancelling_sound() -> None:
    wide = 0.01 * voice(0.3)[:, None] + np.array([0.2, -0.2], np.float32)
    np.testing.assert_allclose(Downmix("a.wav").push(wide), 0.01 * voice(0.3), atol=1e-6)


def test_a_channel_once_chosen_stays() -> None:
    downmix, block = Downmix("vmic"), voice(0.02)
    downmix.push(np.stack([block, -block], axis=1))
    together = np.stack([block, 0.5 * block], axis=1)
    np.testing.assert_array_equal(downmix.push(together), block)
