"""The accuracy gate's figures, on a model of random weights beside itself and on known logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.gate import interval, kl_divergence, run_gate
from deeptalk_edge.devices.profile import GateLimits
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.conversation import Conversation, TextPiece


def test_a_model_beside_itself_differs_in_nothing(bundle: Bundle) -> None:
    with Conversation(bundle) as talk:
        said = "".join(e.text for e in talk.ask("hello") if isinstance(e, TextPiece))
    right = Utterance(
        name="right", modality="typed", language="en", turns=("hello",), answers=(said,)
    )
    wrong = replace(right, name="wrong", answers=(f"{said} and more",))
    gate = run_gate(bundle, bundle, [right, wrong], GateLimits())
    found = {name: measure.value for name, measure in gate.measures.items()}
    assert (found["text_kl"], found["code_kl"]) == (0, 0)
    assert (found["text_agreement"], found["code_agreement"], found["router_agreement"]) == (
        1,
        1,
        1,
    )
    assert (found["same_text"], found["text_accuracy"], found["text_accuracy_float"]) == (
        1,
        0.5,
        0.5,
    )
    assert found["text_accuracy_drop"] == 0
    assert (gate.utterances, gate.passed) == (2, True)


def test_nothing_held_out_is_refused(bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="held out"):
        run_gate(bundle, bundle, [], GateLimits())


def test_divergence_and_intervals_are_what_they_are_called() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25]], np.float32)) + 7
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert kl_divergence(logits, other)[0] == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(logits, logits + 3)[0] == pytest.approx(0, abs=1e-6)
    low, high = interval([0.0] * 50 + [1.0] * 50, seed=0)
    assert low < 0.5 < high
    assert high - low == pytest.approx(0.2, abs=0.04)
    assert (low, high) == interval([0.0] * 50 + [1.0] * 50, seed=0)
