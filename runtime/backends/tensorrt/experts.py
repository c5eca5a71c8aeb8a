"""Routed experts that are all on the device: a conversation has nothing to tell them."""

from __future__ import annotations

from typing import Any

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.routes import RouteRecorder


class ResidentExperts:
    """See `Experts`. Nothing is read after loading, so nothing is counted."""

    @property
    def recorder(self) -> RouteRecorder | None:
        return None

    @recorder.setter
    def recorder(self, recorder: RouteRecorder | None) -> None:
        if recorder is not None:
            raise SettingsError(
                "routes are not recorded on engines; record them with a bundle for the backend ort "
                "of the same checkpoint"
            )

    def user_started_speaking(self) -> None:
        """All of them are there."""

    def idle(self) -> None:
        """All of them are there."""

    def end_turn(self) -> dict[str, Any]:
        """Every pass had all of them."""
        nothing: dict[str, int] = {}
        return {
            "all_resident_passes": 0,
            "hits": 0,
            "misses": 0,
            "moved_bytes": nothing,
            "stall_ms": nothing,
        }
