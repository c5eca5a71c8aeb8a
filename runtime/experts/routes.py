"""Recorded routes: the experts that a model chose, pass by pass, as the pager got them.

call      one layer of one pass: N rows, their k experts and weights, and the prediction for the
          next layer, if there was a look-ahead
file      .npz with a versioned header; about 30 bytes per row and layer at top 6
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import write_file
from deeptalk_edge.runtime.experts.policy import Phase

FORMAT = 1
_PHASES = tuple(Phase)

Ids = NDArray[np.int64]


class Modality(IntEnum):
    """Kind of a row of the grid."""

    WRITTEN = 0
    HEARD = 1
    SPOKEN = 2


def union(ids: Ids) -> list[int]:
    """Return the distinct ids, ascending; for the few ids of a step it is 5 times as fast as
    `np.unique`."""
    return sorted(set(ids.ravel().tolist()))


class Call(NamedTuple):
    """One layer's routing in one pass."""

    layer: int
    ids: Ids
    """(N, k)"""
    weights: NDArray[np.float32]
    """(N, k)"""
    modality: NDArray[np.uint8]
    """(N,)"""
    predicted: Ids
    """(N, k) predicted for the next layer; (0, k) without a look-ahead."""

    @property
    def experts(self) -> list[int]:
        """Union of the chosen experts, ascending."""
        return union(self.ids)

    @property
    def hinted(self) -> list[int]:
        """Union of the predictions, ascending."""
        return union(self.predicted)


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the model's layers, or a phase that began without a run."""

    phase: Phase
    turn: int
    num_rows: int
    calls: list[Call] = field(default_factory=list)

    @property
    def num_heard(self) -> int:
        """Number of rows of speech; 0 in a system prompt."""
        return int((self.calls[0].modality == Modality.HEARD).sum()) if self.calls else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The routes of a model over some turns."""

    layers: tuple[int, ...]
    """Layers with routers."""
    num_experts: int
    top_k: int
    record_bytes: int
    passes: list[Pass]
    source: str
    """Origin of the routes; `synthetic ...` if no model made them."""

    @property
    def is_synthetic(self) -> bool:
        return self.source.startswith("synthetic")

    def save(self, path: Path) -> None:
        """Write the file atomically.

        Raises SettingsError if `path` cannot be written, DoesNotFit if the disk is full.
        """
        calls = [call for each in self.passes for call in each.calls]
        header = {
            "format": FORMAT,
            "layers": self.layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "record_bytes": self.record_bytes,
            "source": self.source,
        }
        passes = [(_PHASES.index(p.phase), p.turn, p.num_rows, len(p.calls)) for p in self.passes]
        shapes = [(call.layer, len(call.ids), len(call.predicted)) for call in calls]
        flat = np.empty((0, self.top_k))
        content = io.BytesIO()
        np.savez_compressed(
            content,
            header=np.array(json.dumps(header)),
            passes=np.array(passes, np.int32).reshape(-1, 4),
            calls=np.array(shapes, np.int32).reshape(-1, 3),
            ids=np.concatenate([flat, *(c.ids for c in calls)]).astype(np.uint16),
            weights=np.concatenate([flat, *(c.weights for c in calls)]).astype(np.float32),
            modality=np.concatenate([flat[:, 0], *(c.modality for c in calls)]).astype(np.uint8),
            predicted=np.concatenate([flat, *(c.predicted for c in calls)]).astype(np.uint16),
        )
        write_file(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Routes:
        """Read a file that `save` wrote.

        Raises ArtifactError if it is not such a file or has another format.
        """
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays["header"]))
            if header["format"] != FORMAT:
                raise ArtifactError(
                    f"{path}: routes of format {header['format']}, this version reads {FORMAT}; "
                    "record them again"
                )
            return cls(
                layers=tuple(header["layers"]),
                num_experts=int(header["num_experts"]),
                top_k=int(header["top_k"]),
                record_bytes=int(header["record_bytes"]),
                passes=list(_passes(arrays)),
                source=str(header["source"]),
            )
        except FileNotFoundError:
            raise ArtifactError(f"{path}: no such file; record it with --record-routes") from None
        except ArtifactError:
            raise
        except Exception as error:  # numpy, zipfile and json have no common base
            raise ArtifactError(
                f"{path}: not a recording of routes ({error}); record it with --record-routes"
            ) from error


class RouteRecorder:
    """Records an engine's routing. One per engine; not thread-safe."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self._turn = 0
        self._modality: NDArray[np.uint8] = np.empty(0, np.uint8)

    def begin(self, phase: Phase, modality: NDArray[np.uint8]) -> None:
        """A pass of rows (N,) begins. Listening begins a turn."""
        if phase is Phase.LISTENING:
            self._turn += 1
        self._modality = modality
        self.passes.append(Pass(phase, self._turn, len(modality)))

    def routed(
        self,
        layer: int,
        ids: Ids,
        weights: NDArray[np.float32],
        predicted: Ids | None,
        normed: NDArray[np.float32] | None = None,
    ) -> None:
        """Record a layer's choice (N, k) for all rows of the pass, or for its last N rows.

        `normed` (N, C) is the experts' input; a subclass may use it.
        """
        if predicted is None:
            predicted = np.empty((0, ids.shape[1]), np.int64)
        modality = self._modality[len(self._modality) - len(ids) :]
        self.passes[-1].calls.append(Call(layer, ids.copy(), weights.copy(), modality, predicted))


def _passes(arrays: dict[str, NDArray[np.generic]]) -> Iterator[Pass]:
    """Cut the flat arrays back into passes and calls."""
    calls = iter(arrays["calls"].tolist())
    row = predicted_row = 0
    for phase, turn, num_rows, num_calls in arrays["passes"].tolist():
        each = Pass(_PHASES[phase], turn, num_rows)
        for _ in range(num_calls):
            layer, count, num_predicted = next(calls)
            rows = slice(row, row + count)
            ahead = slice(predicted_row, predicted_row + num_predicted)
            each.calls.append(
                Call(
                    layer,
                    arrays["ids"][rows].astype(np.int64),
                    arrays["weights"][rows].astype(np.float32),
                    arrays["modality"][rows].astype(np.uint8),
                    arrays["predicted"][ahead].astype(np.int64),
                )
            )
            row, predicted_row = rows.stop, ahead.stop
        yield each
