"""The parts of `make tiny` are made in order, and none twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deeptalk_edge.training.tiny import __main__ as program
from deeptalk_edge.training.tiny import make
from deeptalk_edge.training.tiny.make import MakePlan
from deeptalk_edge.training.tiny.train import TrainSettings


class Parts:
    """Replaces the parts, which take an hour: each records its name and writes its file."""

    def __init__(self, plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        work = plan.work
        monkeypatch.setattr(MakePlan, "workshop", lambda plan: self)
        stand_ins: dict[str, Any] = {
            "load_corpus": lambda place: self,
            "UnitVoice": self,
            "Tokeniser": self,
            "synthesise": self.part(plan.corpus / "corpus.json"),
            "train_tokens": lambda *args, **more: (self, []),
            "build_units": lambda *args: self,
            "train_decoder": lambda *args, **more: (self, []),
            "save_snac": lambda codec, place: self.save(place),
            "learn_to_hear": self.part(work / "ear"),
            "learn_to_speak": self.part(work / "speaking"),
            "remember_questions": self.part(work / "heard"),
            "learn_to_answer": self.part(work / "answering"),
            "read_split": lambda work: [],
            "publish": self.part(work / "published"),
            "_run_side_by_side": self._run_in_turn,
        }
        for name, part in stand_ins.items():
            monkeypatch.setattr(make, name, part)
        self.answers = self.tokenizer = None

    def part(self, place: Path) -> Callable[..., None]:
        return lambda *args, **more: self.save(place)

    def save(self, place: Path) -> None:
        place.parent.mkdir(exist_ok=True)
        place.touch()
        self.made.append(place.stem)

    def load(self, place: Path) -> Parts:
        assert place.exists()
        return self

    def cpu(self) -> Parts:
        return self

    @staticmethod
    def _run_in_turn(plan: MakePlan, *jobs: Any) -> None:
        for job in jobs:
            job[0](plan)


@pytest.fixture
def plan(tmp_path: Path) -> MakePlan:
    settings = TrainSettings()
    return MakePlan(
        work=tmp_path / "work", device="cpu", settings=settings, codec_steps=4, workers=1
    )


def test_parts_are_made_in_the_order_of_their_needs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(plan, monkeypatch)
    make.make(plan, tmp_path / "out")
    codes = ["corpus", "tokeniser", "units"]
    assert parts.made == [
        *codes, "ear", "snac", "speaking", "heard", "answering", "published"
    ]  # fmt: skip


def test_an_existing_part_is_not_made_again(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(plan, monkeypatch)
    make.make(plan, tmp_path / "out")
    parts.made.clear()
    make.make(plan, tmp_path / "out")
    assert not {"corpus", "tokeniser", "units", "snac"} & set(parts.made)


def test_only_a_cpu_shares_a_step_between_processes(plan: MakePlan) -> None:
    on_a_card = MakePlan(
        work=plan.work, device="cuda", settings=plan.settings, codec_steps=4, workers=1
    )
    assert (plan.ranks, on_a_card.ranks) == (2, 1)


def test_parts_are_kept_beside_the_checkpoint_unless_another_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[MakePlan, Path]] = []
    monkeypatch.setattr(program, "make", lambda plan, out: made.append((plan, out)))
    out = tmp_path / "tiny"
    for more in ([], ["--work", str(tmp_path / "parts"), "--steps-scale", "0.5"]):
        monkeypatch.setattr("sys.argv", ["tiny", "--out", str(out), *more])
        program.main()
    (beside, _), (named, place) = made
    assert (beside.work, named.work, place) == (tmp_path / "tiny.work", tmp_path / "parts", out)
    assert named.codec_steps == round(beside.codec_steps / 2)
    assert named.settings.speaking_steps == beside.settings.speaking_steps / 2


@pytest.mark.parametrize(
    ("flags", "found"), [("avx2 avx512_bf16", True), ("avx2", False), (None, False)]
)
def test_bfloat16_is_the_default_where_the_processor_has_it(
    flags: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[MakePlan] = []
    cpu = tmp_path / "cpuinfo"
    if flags is not None:
        cpu.write_text(f"flags : {flags}")
    monkeypatch.setattr(
        program, "Path", lambda place: cpu if place == "/proc/cpuinfo" else Path(place)
    )
    monkeypatch.setattr(program, "make", lambda plan, out: made.append(plan))
    monkeypatch.setattr("sys.argv", ["tiny", "--out", str(tmp_path / "tiny")])
    program.main()
    assert made[0].settings.losses.bfloat16 is found


def test_a_side_process_computes_with_one_thread(plan: MakePlan, tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        make._take_part(
            lambda plan: seen.append(torch.get_num_threads()), plan, 0, 1, tmp_path / "m"
        )
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
