"""The loop on a model of three weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deeptalk_edge.errors import ArtifactError, TrainingFailed
from deeptalk_edge.training.loop import LoopSettings, StateFile, train
from deeptalk_edge.training.losses import Losses

SETTINGS = LoopSettings(num_steps=8, learning_rate=0.1, warmup_steps=2, save_every=3)


def _model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(3, 1, bias=False)


def _batch(step: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def _batches(step: int) -> list[Tensor]:
    return [_batch(step)]


def _run(
    model: nn.Linear,
    settings: LoopSettings,
    state_path: Path | None = None,
    *,
    dies_at: int | None = None,
) -> list[int]:
    """Train; returns the steps that were done."""
    done = []

    def batches_at(step: int) -> list[Tensor]:
        if step == dies_at:
            raise KeyboardInterrupt
        done.append(step)
        return _batches(step)

    def losses_of(batch: Tensor) -> Losses:
        noise = torch.rand(())  # the loss may draw; the draw belongs to the step
        return {"square": (model(batch) - noise).square().mean()}

    keeper = StateFile(state_path) if state_path else None
    train(model, batches_at, losses_of, settings, keeper=keeper)
    return done


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = _model()
    _run(whole, SETTINGS)
    cut = _model()
    with pytest.raises(KeyboardInterrupt):
        _run(cut, SETTINGS, tmp_path / "state", dies_at=5)
    resumed = _model()
    assert _run(resumed, SETTINGS, tmp_path / "state") == [3, 4, 5, 6, 7]
    assert torch.equal(whole.weight, resumed.weight)
    assert not torch.equal(cut.weight, resumed.weight)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first, second = _model(), _model()
    _run(first, SETTINGS, tmp_path / "state")
    assert _run(second, SETTINGS, tmp_path / "state") == []
    assert torch.equal(first.weight, second.weight)


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    _run(_model(), SETTINGS, tmp_path / "state")
    with pytest.raises(ArtifactError, match="remove it"):
        _run(_model(), replace(SETTINGS, seed=1), tmp_path / "state")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._place,)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"step": Trap(tmp_path / "made")}, tmp_path / "state")
    with pytest.raises(pickle.UnpicklingError):
        _run(_model(), SETTINGS, tmp_path / "state")
    assert not (tmp_path / "made").exists()


def test_a_state_is_written_atomically(tmp_path: Path) -> None:
    _run(_model(), SETTINGS, tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_rate_warms_up_then_falls_along_a_cosine() -> None:
    settings = LoopSettings(num_steps=102, learning_rate=1.0, warmup_steps=2, final_rate=0.1)
    rates = [settings.rate_at(step) for step in (0, 1, 2, 52, 102)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_tensors_without_a_gradient_do_not_change() -> None:
    frozen, free = _model(), nn.Linear(1, 1)
    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, free)
    before = frozen.weight.clone(), free.weight.clone()
    train(model, _batches, lambda batch: {"sum": model(batch).sum()}, SETTINGS)
    assert torch.equal(before[0], frozen.weight)
    assert not torch.equal(before[1], free.weight)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    model = _model()
    settings = replace(SETTINGS, num_steps=50)
    with pytest.raises(TrainingFailed, match="lower the rate"):
        train(model, _batches, lambda batch: {"nan": model(batch).sum() * torch.nan}, settings)


def test_evaluation_comes_every_so_many_steps() -> None:
    seen: list[int] = []
    model = _model()
    train(
        model,
        _batches,
        lambda batch: {"sum": model(batch).sum()},
        replace(SETTINGS, evaluate_every=3),
        evaluate=seen.append,
    )
    assert seen == [3, 6]


def test_batches_of_one_step_add_up_to_one_larger_batch() -> None:
    together, summed = _model(), _model()

    def square(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss

    train(
        together,
        lambda step: [_batch(step), _batch(step + 100)],
        lambda batch: {"square": square(together, batch)},
        SETTINGS,
    )
    train(
        summed,
        lambda step: [step],
        lambda step: {
            "one": square(summed, _batch(step)),
            "other": square(summed, _batch(step + 100)),
        },
        SETTINGS,
    )
    torch.testing.assert_close(together.weight, summed.weight, rtol=1e-6, atol=1e-7)
