"""A report follows its published schema and gives the reason for a missing figure."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices import report_page
from deeptalk_edge.devices.report import (
    SCHEMA,
    BundleUsed,
    Device,
    Experts,
    Memory,
    Power,
    Report,
    State,
    Workload,
    distribution,
    json_schema,
    read_report,
    report_json,
)
from deeptalk_edge.errors import ArtifactError

STATE = State(
    power_mode=None,
    governor="performance",
    cpu_mhz=2600.0,
    gpu_mhz=None,
    emc_mhz=None,
    hottest_c=48.0,
    throttled=None,
    missing={"power_mode": "no nvpmodel"},
)

REPORT = Report(
    schema=SCHEMA,
    started="2026-11-30T00:00:00+00:00",
    source="measured",
    device=Device(
        profile="cpu-int8",
        kind="cpu",
        model=None,
        processor="a processor",
        num_cores=2,
        memory_bytes=8,
        storage=None,
        gpu=None,
        l4t=None,
        key="0123456789ab",
    ),
    state_start=STATE,
    state_end=STATE,
    bundle=BundleUsed(
        path="b",
        sha256="0" * 64,
        backend="cpu",
        kernel_path=None,
        threads=1,
        mode="single",
        precision={"experts": "int8"},
    ),
    workload=Workload(port="wav", turns=2, warmup_turns=1, cut_s=None, questions=("q.wav 00",)),
    metrics={"v2v_ms": distribution([700.0, 800.0])},
    stages={"encoder_ms": distribution([None, None])},
    underruns=0,
    failed_turns=0,
    experts=Experts(
        hits=None,
        misses=None,
        hit_share=None,
        loaded_bytes=None,
        stall_ms=None,
        slots=None,
        why="x",
    ),
    memory=Memory(peak_resident_mb=None, before_mb=1.0, parts_mb={"encoder": 2.0}),
    power=Power(
        method=None,
        mean_w=None,
        energy_j_per_turn=None,
        hz=5.0,
        overhead_share=0.001,
        hottest_c=None,
        why="no sensor",
    ),
    samples=None,
    warnings=("2 turns",),
)


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report_json(REPORT))
    assert read_report(path) == REPORT


def test_the_published_schema_is_that_of_the_code() -> None:
    place = resources.files("deeptalk_edge.devices") / "schemas" / "profile-1.json"
    assert json.loads(place.read_text(encoding="utf-8")) == json_schema()


def test_the_schema_names_every_field_and_its_null() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {
        field.name for field in dataclasses.fields(Report) if field.name != "warnings"
    }
    state = schema["properties"]["state_start"]["properties"]
    assert state["cpu_mhz"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    assert schema["properties"]["schema"]["pattern"]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("schema", "deeptalk-edge.profile/2", "this version reads deeptalk-edge.profile/1"),
        ("schema", 3, "schema = '3'"),
        ("source", "simulated", "source"),
        ("underruns", -1, "underruns"),
        ("extra", 1, "extra: no such field"),
        ("metrics", {"v2v_ms": {"n": 1}}, "metrics.v2v_ms"),
    ],
)
def test_an_invalid_report_is_refused_by_field(
    field: str, value: object, complaint: str, tmp_path: Path
) -> None:
    content = json.loads(report_json(REPORT))
    content[field] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=complaint.replace(".", r"\.")):
        read_report(path)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), max_size=130))
def test_a_distribution_ignores_missing_values_and_has_p99_from_a_hundred_on(
    values: list[float | None],
) -> None:
    found, known = distribution(values), [value for value in values if value is not None]
    assert found.n == len(known)
    assert (found.p99 is None) is (len(known) < 100)
    assert (found.why_no_p99 is None) is (found.p99 is not None)
    if known:
        assert found.max == max(known)
        assert found.p90 == pytest.approx(float(np.percentile(known, 90)))
    else:
        assert found.p50 is None


def test_the_page_shows_a_missing_figure_as_a_dash_with_its_reason() -> None:
    text = report_page.page(REPORT)
    assert "voice to voice, ms                          2      750" in text
    assert "no sensor" in text
    assert "warning     2 turns" in text


def test_on_a_terminal_rich_draws_the_tables_and_without_it_they_are_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    pytest.importorskip("rich")
    assert "━" in report_page.page(REPORT)
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert "━" not in report_page.page(REPORT)


@pytest.mark.parametrize(("n", "p99"), [(99, None), (100, 98.01)])
def test_p99_is_given_from_a_hundred_turns_on(n: int, p99: float | None) -> None:
    assert distribution([float(value) for value in range(n)]).p99 == p99
