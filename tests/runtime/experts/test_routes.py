"""A recording is read back unchanged, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.devices.replay.locality import locality
from deeptalk_edge.devices.replay.synthetic import DialogueShape, synthetic_routes
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import Call, Modality, Pass, RouteRecorder, Routes

SHAPE = DialogueShape(
    num_layers=3,
    num_experts=8,
    top_k=2,
    num_turns=2,
    question_s=0.4,
    answer_s=2.0,
    num_audio_experts=3,
)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    routes = synthetic_routes("mid", SHAPE, seed=1)
    routes.save(tmp_path / "routes.npz")
    again = Routes.load(tmp_path / "routes.npz")
    assert (again.layers, again.top_k, again.source) == (routes.layers, 2, routes.source)
    assert len(again.passes) == len(routes.passes)
    for one, other in zip(routes.passes, again.passes, strict=True):
        assert (one.phase, one.turn, one.num_rows) == (other.phase, other.turn, other.num_rows)
        for call, same in zip(one.calls, other.calls, strict=True):
            assert call.layer == same.layer
            for field in ("ids", "weights", "modality", "predicted"):
                np.testing.assert_array_equal(getattr(call, field), getattr(same, field))


def test_an_empty_recording_is_valid(tmp_path: Path) -> None:
    empty = Routes(
        layers=(1,), num_experts=4, top_k=2, record_bytes=4096, passes=[], source="nobody"
    )
    empty.save(tmp_path / "routes.npz")
    assert Routes.load(tmp_path / "routes.npz").passes == []
    assert locality(empty)["overlap_with_previous_row"]["spoken"] is None


def test_a_call_with_fewer_rows_belongs_to_the_last_rows_of_its_pass() -> None:
    recorder = RouteRecorder()
    recorder.begin(Phase.LISTENING, np.empty(0, np.uint8))
    recorder.begin(Phase.THINKING, np.array([0, 1, 1], np.uint8))
    weights = np.ones((1, 2), np.float32)
    recorder.routed(4, np.array([[1, 2]]), weights, None)
    (call,) = recorder.passes[-1].calls
    assert call.modality.tolist() == [Modality.HEARD]
    assert recorder.passes[-1].turn == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routes.npz"
    synthetic_routes("mid", SHAPE).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(str(arrays["header"])) | {"format": 9}
    np.savez(path, **(arrays | {"header": np.array(json.dumps(header))}))
    with pytest.raises(ArtifactError, match="routes of format 9, this version reads 1"):
        Routes.load(path)


@pytest.mark.parametrize("content", [b"", b"no routes", b"PK\x03\x04broken"])
def test_a_file_that_is_not_a_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routes.npz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a recording of routes"):
        Routes.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        Routes.load(tmp_path / "routes.npz")


def spoken(turn: int, *rows: tuple[int, ...], predicted: tuple[int, ...] | None = None) -> Pass:
    calls = []
    for layer, ids in enumerate(rows, 1):
        guess = np.array([predicted]) if predicted and layer == 1 else np.empty((0, 2))
        calls.append(
            Call(layer, np.array([ids]), np.ones((1, 2), np.float32),
                 np.array([Modality.SPOKEN], np.uint8), guess.astype(np.int64))
        )  # fmt: skip
    return Pass(Phase.SPEAKING, turn, 1, calls)


def test_locality_counts_repeated_experts() -> None:
    routes = Routes(
        layers=(1, 2),
        num_experts=4,
        top_k=2,
        record_bytes=4096,
        source="by hand",
        passes=[
            spoken(1, (0, 1), (2, 3), predicted=(2, 0)),
            spoken(1, (1, 2), (2, 3), predicted=(2, 3)),
            spoken(2, (3, 0), (0, 1)),
        ],
    )
    found = locality(routes)
    # Layer 1 keeps one of two and layer 2 both of two; the new turn is no neighbour.
    assert found["overlap_with_previous_row"]["spoken"] == pytest.approx(0.75)
    assert found["look_ahead_recall_by_layer"] == {"2": pytest.approx(0.75)}
    assert found["decode_steps"] == 3
    assert found["lru_hits"]["16%"] == 0  # two slots, four experts per step: none stays for a step
    assert found["lru_hits"]["42%"] == pytest.approx(2 / 12)
    assert found["same_experts_by_modality"]["heard and spoken"] is None


def test_a_more_local_router_hits_more() -> None:
    shape = DialogueShape(num_layers=2, num_turns=2, question_s=0.2)
    hits = [
        locality(synthetic_routes(preset, shape))["lru_hits_per_layer"]["32%"]
        for preset in ("flat", "mid", "local")
    ]
    assert hits == sorted(hits)
    assert hits[0] < hits[2] - 0.1
