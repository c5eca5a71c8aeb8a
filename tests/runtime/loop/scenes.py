"""Scenes for the voice loop: who speaks when, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.audio.stop_words import WordSpotter
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.events import LiveEvent
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.simulation import Simulation
from deeptalk_edge.runtime.loop.states import State

Array = NDArray[np.float32]


class LoudnessDetector:
    """A detector that takes loud sound for a voice."""

    def is_voiced(self, frame: Array) -> bool:
        return bool(np.abs(frame).max() > 0.05)


class Stage:
    """A fake talker, a virtual port, and a user who speaks as the script says."""

    def __init__(
        self,
        *script: tuple[float, float],
        settings: LoopSettings | None = None,
        num_frames: Callable[[int], int] = lambda turn: 24,
        step_ms: Callable[[], float] | None = None,
        spotter: WordSpotter | None = None,
        device_ms: int = 40,
    ) -> None:
        """`script` holds the spans of speech, (from, to) in seconds."""
        self.script = list(script)
        self.events: list[tuple[float, LiveEvent]] = []
        self.played: list[Array] = []
        """Blocks of 20 ms that the loudspeaker got."""
        self.talker = FakeTalker(num_frames)
        self.port = VirtualPort(self._hear, device_ms=device_ms, on_played=self.played.append)
        self.simulation = Simulation(
            self.talker,
            self.port,
            detector=LoudnessDetector(),
            settings=settings,
            spotter=spotter,
            step_ms=step_ms or self.talker.step_ms,
            emit=lambda event: self.events.append((self.simulation.seconds, event)),
        )
        self.loop = self.simulation.loop

    def _hear(self, start: int) -> Array:
        middle_s = (start + FRAME_SAMPLES / 2) / 16000
        voiced = any(first <= middle_s < last for first, last in self.script)
        return np.full(FRAME_SAMPLES, 0.1 if voiced else 0.001, np.float32)

    def run_until(self, seconds: float) -> None:
        self.simulation.run(seconds - self.simulation.seconds)

    def state(self) -> State:
        return self.loop.loop.state

    def of(self, kind: type[Any]) -> list[Any]:
        """The events of a kind."""
        return [event for _, event in self.events if isinstance(event, kind)]

    def when(self, kind: type[Any]) -> list[float]:
        """When events of a kind came, in seconds."""
        return [second for second, event in self.events if isinstance(event, kind)]

    def played_between(self, first_s: float, last_s: float) -> Array:
        return np.concatenate(self.played[round(first_s * 50) : round(last_s * 50)])
