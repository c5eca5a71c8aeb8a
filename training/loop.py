"""The training loop that every stage shares: AdamW, warm-up and cosine, clipping, resuming.

What step n does depends on (seed, n) and the weights alone: `plans_at` is called with step n, and
torch is seeded anew before each step. So a run that was cut off and resumed ends where it would
have ended, bit for bit, whatever the number of data workers.

plan    what one batch of a step is made from; `load` turns it into the batch, in data workers if
        there are any
step    the sum of its batches' losses; processes that have joined (`ranks`) share the plans
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from deeptalk_edge.errors import ArtifactError, TrainingFailed
from deeptalk_edge.model.noise import SEED_LIMIT, check_seed
from deeptalk_edge.progress import progress
from deeptalk_edge.training.losses import Losses, added
from deeptalk_edge.training.ranks import (
    add_up_gradients,
    add_up_losses,
    is_first,
    is_sharded,
    num_ranks,
    share,
)

P = TypeVar("P")  # a plan
B = TypeVar("B")  # a batch

_SEED_STRIDE = 1_000_003
_CALM_STEPS = 50  # whose mean loss says what an explosion is


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How long and how fast to train."""

    num_steps: int
    learning_rate: float
    warmup_steps: int = 100
    final_rate: float = 0.05
    """Share of `learning_rate` at which the cosine ends."""

    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    evaluate_every: int = 0
    """Steps between evaluations; 0 for never."""

    save_every: int = 500
    """Steps between saves of the trainer's state, if it has a keeper."""

    log_every: int = 50
    """Steps between the losses that a watcher is told."""

    explosion: float = 0.0
    """Stop where a step's loss is so many times the mean of the last 50; 0 for never."""

    workers: int = 0
    """Processes that load batches ahead."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps = {self.num_steps}: a stage has at least one step")
        check_seed(self.seed)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


class Keeper(Protocol):
    """Where a run's state is kept."""

    def resume(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, settings: LoopSettings
    ) -> int:
        """Load the newest state, if there is one; returns the first step to do."""

    def save(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        settings: LoopSettings,
        num_done: int,
        score: float | None,
    ) -> None:
        """Keep the state after `num_done` steps; `score` is these weights' evaluation, if there was
        one, less is better. Every process calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step was like; losses are the sums of all processes."""

    num_done: int
    losses: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    seconds: float
    """Since the last report, of `num_steps` steps."""
    num_steps: int


Watcher = Callable[[StepReport], Mapping[str, str] | None]
"""Told of steps; may say what the progress bar is to show besides the losses."""

Evaluator = Callable[[int], float | None]
"""Gets the number of steps done; returns a score, less is better, or None."""


class StopTraining(Exception):
    """An evaluator's wish: the run has become as good as it will."""

    def __init__(self, score: float) -> None:
        super().__init__(score)
        self.score = score


def train(
    model: nn.Module,
    plans_at: Callable[[int], Sequence[P]],
    losses_of: Callable[[Any], Losses],
    settings: LoopSettings,
    *,
    load: Callable[[P], B] | None = None,
    name: str = "train",
    keeper: Keeper | None = None,
    watch: Watcher | None = None,
    evaluate: Evaluator | None = None,
) -> int:
    """Train what of `model` requires a gradient, on whatever device it lies; returns the steps
    done in all.

    The first of joined processes shows the losses and is the one that is watched; all of them
    evaluate and save, for their model may be sharded. With a `keeper` the run resumes.

    Raises ArtifactError if what is kept is of another run, TrainingFailed if a loss or a gradient
    is not finite, or a loss explodes; the state from before the step stays.
    """
    optimiser = make_optimiser(model, settings)
    first = keeper.resume(model, optimiser, settings) if keeper else 0
    bar = progress(
        name=name, unit="step", total=settings.num_steps, first=first, is_shown=is_first()
    )
    guard, best, num_done = _Guard(name, settings.explosion), math.inf, first
    began, since = time.monotonic(), 0
    for step, batches in _stream(plans_at, load, settings, first):
        losses, norm = _take_step(model, optimiser, step, batches, losses_of, settings, guard)
        num_done, since = step + 1, since + 1
        bar.update()
        if num_done % settings.log_every == 0 or num_done == settings.num_steps:
            report = StepReport(
                num_done=num_done,
                losses=add_up_losses(losses),
                learning_rate=settings.rate_at(step),
                gradient_norm=norm,
                seconds=time.monotonic() - began,
                num_steps=since,
            )
            shown = watch(report) if watch and is_first() else None
            spelt = {k: f"{v:.3f}" for k, v in report.losses.items()}
            bar.set_postfix(spelt | dict(shown or {}), refresh=False)
            began, since = time.monotonic(), 0
        score, is_over = _judge(evaluate, settings, num_done)
        is_best = score is not None and score < best
        best = min(best, math.inf if score is None else score)
        if keeper and (num_done % settings.save_every == 0 or is_best or is_over):
            keeper.save(model, optimiser, settings, num_done, score)
        if is_over:
            break
    bar.close()
    return num_done


def _take_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    batches: Sequence[B],
    losses_of: Callable[[B], Losses],
    settings: LoopSettings,
    guard: _Guard,
) -> tuple[Losses, float]:
    """Change the weights; returns this process's losses, and the gradient's norm before it was
    clipped."""
    for group in optimiser.param_groups:
        group["lr"] = settings.rate_at(step)
    torch.manual_seed((settings.seed * _SEED_STRIDE + step) % SEED_LIMIT)
    optimiser.zero_grad()
    losses = _descend(batches, losses_of)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if not is_sharded(model):
        add_up_gradients(parameters)
    norm = _norm(nn.utils.clip_grad_norm_(parameters, settings.clip_norm))
    guard.check(step, losses, norm, batches)
    optimiser.step()
    return losses, norm


def _judge(
    evaluate: Evaluator | None, settings: LoopSettings, num_done: int
) -> tuple[float | None, bool]:
    """The score after a step, if it is due; and whether the run is over."""
    is_last = num_done == settings.num_steps
    if not (evaluate and settings.evaluate_every) or num_done % settings.evaluate_every:
        return None, is_last
    try:
        return evaluate(num_done), is_last
    except StopTraining as stop:
        return stop.score, True


def make_optimiser(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW over what trains. Routers do not decay: a barred row has no gradient, and must not
    change."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    routers = [p for name, p in named if name.endswith("gate.weight")]
    others = [p for name, p in named if not name.endswith("gate.weight")]
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": routers, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )


class _Guard:
    """Stops a run whose losses or gradients have gone wrong, and names the batch."""

    def __init__(self, name: str, explosion: float) -> None:
        self._name, self._explosion = name, explosion
        self._calm: list[float] = []

    def check(
        self, step: int, losses: Mapping[str, Tensor], norm: float, batches: Sequence[object]
    ) -> None:
        values = {key: float(value) for key, value in losses.items()}
        total = sum(values.values())
        where = f"{self._name}, step {step}"
        if not math.isfinite(total):
            raise TrainingFailed(
                f"{where}: the losses are {_spelt(values)}, from the batch {_named(batches)}; the "
                "weights are still those of before: look at these samples, or lower the rate"
            )
        if not math.isfinite(norm):
            raise TrainingFailed(
                f"{where}: the gradient is not finite, the losses of this process's batch "
                f"{_named(batches)} are ({_spelt(values)}); look there, or lower the rate"
            )
        calm = sum(self._calm) / len(self._calm) if self._calm else math.inf
        if self._explosion and len(self._calm) == _CALM_STEPS and total > self._explosion * calm:
            raise TrainingFailed(
                f"{where}: the loss is {total:.3g}, more than {self._explosion:g} times the mean "
                f"of the last {_CALM_STEPS} ({calm:.3g}), from the batch {_named(batches)}; lower "
                "the rate or warm up for longer"
            )
        self._calm = [*self._calm, total][-_CALM_STEPS:]


class StateFile:
    """Keeps a run in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, settings: LoopSettings
    ) -> int:
        """Load the state, if there is one.

        Raises ArtifactError if it is of another run.
        """
        if not self._path.exists():
            return 0
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        found = (state["num_steps"], state["seed"])
        if found != (settings.num_steps, settings.seed):
            raise ArtifactError(
                f"{self._path}: a run of (num_steps, seed) {found}, expected "
                f"{(settings.num_steps, settings.seed)}; remove it to start again"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step: int = state["step"]
        return step

    def save(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        settings: LoopSettings,
        num_done: int,
        score: float | None,
    ) -> None:
        """Write the state, whole or not at all; only the first process does."""
        if not is_first():
            return
        partial = self._path.with_name(self._path.name + ".partial")
        state = {
            "step": num_done,
            "num_steps": settings.num_steps,
            "seed": settings.seed,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(state, partial)
        os.replace(partial, self._path)


class _Steps(Dataset[list[Any]], Generic[P, B]):
    """The batches of each step, by its number; a data worker's copy of what makes them."""

    def __init__(
        self,
        plans_at: Callable[[int], Sequence[P]],
        load: Callable[[P], B] | None,
        rank: int,
        count: int,
    ) -> None:
        self._plans_at, self._load, self._rank, self._count = plans_at, load, rank, count

    def __getitem__(self, step: int) -> list[Any]:
        plans = share(self._plans_at(step), self._rank, self._count)
        return list(plans) if self._load is None else [self._load(plan) for plan in plans]


def _stream(
    plans_at: Callable[[int], Sequence[P]],
    load: Callable[[P], B] | None,
    settings: LoopSettings,
    first: int,
) -> Iterator[tuple[int, list[Any]]]:
    """Steps in order with this process's batches."""
    steps = range(first, settings.num_steps)
    dataset: _Steps[P, B] = _Steps(plans_at, load, *num_ranks())
    if not settings.workers:
        yield from ((step, dataset[step]) for step in steps)
        return
    loader: Iterable[list[Any]] = DataLoader(
        dataset,
        sampler=steps,
        batch_size=None,
        num_workers=settings.workers,
        multiprocessing_context="spawn",
    )
    yield from zip(steps, loader, strict=True)


def _descend(batches: Sequence[B], losses_of: Callable[[B], Losses]) -> Losses:
    """Add up the gradients of the batches; returns the sums of their losses, by name."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        losses = losses_of(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        total = added([total, {name: loss.detach() for name, loss in losses.items()}])
    return total


def _norm(norm: Tensor) -> float:
    """Of a sharded model it is a sum that still has to be made."""
    full = getattr(norm, "full_tensor", None)
    return float(norm if full is None else full())


def _spelt(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _named(batches: Sequence[object]) -> str:
    """The names of what the batches hold, as far as they have any."""
    names = [name for batch in batches for name in getattr(batch, "names", ())]
    return "(" + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") + ")"
