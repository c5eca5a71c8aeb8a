"""Processes that train one model together, as one process would."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from deeptalk_edge.training.loop import LoopSettings, StateFile, train
from deeptalk_edge.training.ranks import is_first, joined, num_ranks, share

SETTINGS = LoopSettings(num_steps=6, learning_rate=0.1, warmup_steps=2, save_every=3)
RANKS = 2


def _batches(step: int) -> list[Tensor]:
    """Two batches; in every other step one alone."""
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, generator=draw) for _ in range(1 + step % 2)]


def _trained(state_path: Path | None = None) -> nn.Linear:
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    train(
        model,
        _batches,
        lambda batch: {"square": (model(batch) - 1).square().mean()},
        SETTINGS,
        keeper=StateFile(state_path) if state_path else None,
    )
    return model


def _train_joined(rank: int, place: Path) -> None:
    torch.set_num_threads(1)
    with joined(rank, RANKS, place / "meeting"):
        model = _trained(place / f"{rank}.state")
        torch.save(model.state_dict(), place / f"{rank}.weights")


def _leave_early(rank: int, place: Path) -> None:
    with joined(rank, RANKS, place / "meeting"):
        if rank == 0:
            _trained()


def _run(target: object, place: Path) -> list[int | None]:
    context = get_context("spawn")
    processes = [context.Process(target=target, args=(i, place)) for i in range(RANKS)]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def test_joined_processes_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    alone = _trained().state_dict()
    assert _run(_train_joined, tmp_path) == [0, 0]
    first, other = (torch.load(tmp_path / f"{i}.weights", weights_only=True) for i in range(RANKS))
    for name, weights in alone.items():
        torch.testing.assert_close(first[name], weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(first[name], other[name])
    assert (tmp_path / "0.state").exists()
    assert not (tmp_path / "1.state").exists()  # only the first one saves


def test_a_process_that_leaves_is_an_error_and_not_an_endless_wait(tmp_path: Path) -> None:
    waiting, _ = _run(_leave_early, tmp_path)
    assert waiting == 1


def test_a_single_process_does_all_the_work_without_a_group(tmp_path: Path) -> None:
    with joined(0, 1, tmp_path / "meeting"):
        assert not torch.distributed.is_initialized()
        assert is_first()
        assert share([1, 2, 3], *num_ranks()) == [1, 2, 3]


def test_only_the_first_process_gets_a_single_batch(tmp_path: Path) -> None:
    assert _run(_write_shares, tmp_path) == [0, 0]
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(RANKS)] == ["[7] [1, 3]", "[] [2]"]


def _write_shares(rank: int, place: Path) -> None:
    with joined(rank, RANKS, place / "meeting"):
        (place / f"{rank}.txt").write_text(
            f"{share([7], *num_ranks())} {share([1, 2, 3], *num_ranks())}"
        )
