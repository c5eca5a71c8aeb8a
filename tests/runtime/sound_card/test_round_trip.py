"""The probe's clicks through PyAudio and a real daemon."""

from __future__ import annotations

import pytest

from deeptalk_edge.devices.round_trip import sound_round_trip_ms
from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort
from tests.runtime.sound_card.conftest import Card
from tests.runtime.sound_card.trials import on_a_steady_machine


@pytest.fixture
def card(stopped_card: Card) -> Card:
    """Its microphone hears its loudspeaker."""
    stopped_card.start(echo_ms=40)
    return stopped_card


@on_a_steady_machine
def test_a_card_that_hears_itself_has_a_round_trip(card: Card, port: PyAudioPort) -> None:
    found = sound_round_trip_ms(port)
    assert found.value is not None, found.why
    assert 40 < found.value < 1000


def test_a_card_that_does_not_hear_itself_has_none(stopped_card: Card, port: PyAudioPort) -> None:
    stopped_card.start()
    found = sound_round_trip_ms(port)
    assert found.value is None
    assert "of 3 clicks" in str(found.why)
