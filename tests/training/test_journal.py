"""The journal of a training run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.expert_split import ExpertLoads
from deeptalk_edge.training.experts import Routing
from deeptalk_edge.training.journal import (
    Journal,
    line_chart,
    read_journal,
    router_facts,
    write_report,
)


def _loads() -> ExpertLoads:
    loads = ExpertLoads(num_layers=1, num_experts=4)
    routing = Routing(
        layer=1,
        probabilities=torch.full((1, 2, 4), 0.25),
        expert_ids=torch.tensor([[[0, 1], [2, 2]]]),
    )
    audio = torch.tensor([[True, False]])
    loads.count([routing], audio, ~audio)
    return loads


def test_router_figures_are_given_for_each_modality() -> None:
    text, audio = router_facts(_loads())
    assert (audio["load"], audio["dead"]) == ([0.5, 0.5, 0, 0], [2, 3])
    assert audio["entropy"] == pytest.approx(0.5)
    assert (text["load"], text["dead"], text["entropy"]) == ([0, 0, 1.0, 0], [0, 1, 3], 0.0)


def test_the_page_shows_losses_scores_and_routers_and_loads_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2):
        losses = {"text": 1.0 / step, "code0": 2.0}
        journal.add("step", step, losses=losses, samples_per_s=3.0)
    journal.add("evaluation", 2, score=1.5)
    journal.add("router", 2, facts=router_facts(_loads()))
    write_report(tmp_path, "joint: <runs>")
    page = (tmp_path / "report.html").read_text()
    for said in ("joint: &lt;runs&gt;", "code0", "score", "samples a second", "entropy"):
        assert said in page
    assert "://" not in page
    assert "<script" not in page


def test_a_line_runs_from_the_left_edge_to_the_right_and_from_the_greatest_to_0() -> None:
    chart = line_chart({"loss": [(0, 4.0), (5, 1.0), (10, float("nan")), (20, 0.0)]}).html
    found = re.search(r'points="([^"]+)"', chart)
    assert found is not None
    first, second, last = (tuple(map(float, point.split(","))) for point in found[1].split())
    width, height = last
    assert first == (0.0, 0.0)
    assert second == (width / 4, height * 3 / 4)
    assert f'<svg width="{width + 180:.0f}"' in chart
    assert "0 to step 20; 0 to 4" in chart
    assert "nothing yet" in line_chart({"loss": [(1, None)]}).html


def test_a_resumed_run_drops_the_lines_of_repeated_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.add("step", step, losses={})
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # the line that the kill cut
    Journal(tmp_path).resume(2)
    assert [entry["step"] for entry in read_journal(tmp_path / "journal.jsonl")] == [1, 2]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match="pip install"):
        Journal(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'deeptalk-edge[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path, tensorboard=True)
    journal.add("step", 1, loss={"text": 2.5, "codes": 1.0}, tokens=96, note="warm-up")
    journal.add("step", 2, loss={"text": 2.0, "codes": 0.5}, tokens=128, note="warm-up")
    journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["step/loss/codes", "step/loss/text", "step/tokens"]
    assert [(e.step, e.value) for e in events.Scalars("step/loss/text")] == [(1, 2.5), (2, 2.0)]
