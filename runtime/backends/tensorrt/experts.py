"""Routed experts of engines: all of them stay in device memory."""

from __future__ import annotations

from typing import Any

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.routes import RouteRecorder


class ResidentExperts:
    """See `Experts`. No expert is read after loading, so there is nothing to count."""

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
        """Nothing to do: all experts are resident."""

    def idle(self) -> None:
        """Nothing to do: all experts are resident."""

    def end_turn(self) -> dict[str, Any]:
        """No pass missed an expert, so all counters are 0."""
        nothing: dict[str, int] = {}
        return {
            "all_resident_passes": 0,
            "hits": 0,
            "misses": 0,
            "moved_bytes": nothing,
            "stall_ms": nothing,
        }
