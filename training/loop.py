"""The training loop that every stage shares: AdamW, warm-up and cosine, clipping, resuming.

What step n does depends on (seed, n) and the weights alone: `batches_at` is asked for step n, and
torch is seeded anew before each step. So a run that was cut off and resumed ends where it would
have ended.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.noise import SEED_LIMIT, check_seed
from deeptalk_edge.training.ranks import add_up_gradients, is_first, share

Batch = TypeVar("Batch")
Losses = Mapping[str, Tensor]
"""Scalars by name; their sum is what the step descends."""

_SEED_STRIDE = 1_000_003


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
    """Steps between saves of the trainer's state, if it has a path."""

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


def train(
    model: nn.Module,
    batches_at: Callable[[int], Sequence[Batch]],
    losses_of: Callable[[Batch], Losses],
    settings: LoopSettings,
    *,
    name: str = "train",
    state_path: Path | None = None,
    evaluate: Callable[[int], None] | None = None,
) -> None:
    """Train what of `model` requires a gradient, on whatever device it lies.

    A step descends the sum of its batches' losses. Processes that have joined (`ranks`) share them;
    the first of them shows the losses, which are those of its own batches, saves and evaluates.

    With a `state_path` the run resumes from it if it exists, and saves to it. `evaluate` gets the
    number of steps done.

    Raises ArtifactError if the state at `state_path` is of another run, ValueError if a loss is not
    finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    first = _resume(model, optimiser, settings, state_path)
    progress = tqdm(
        range(first, settings.num_steps),
        desc=name,
        unit="step",
        mininterval=5,
        disable=None if is_first() else True,  # None: where stderr is no terminal
    )
    for step in progress:
        for group in optimiser.param_groups:
            group["lr"] = settings.rate_at(step)
        torch.manual_seed((settings.seed * _SEED_STRIDE + step) % SEED_LIMIT)
        optimiser.zero_grad()
        losses = _descend(share(batches_at(step)), losses_of)
        add_up_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimiser.step()
        done = step + 1
        if done % 50 == 0:
            values = {key: value.item() for key, value in losses.items()}
            if not math.isfinite(sum(values.values())):
                raise ValueError(f"{name}, step {step}: the losses are {values}; lower the rate")
            progress.set_postfix({key: f"{value:.3f}" for key, value in values.items()})
        if not is_first():
            continue
        if state_path and (done % settings.save_every == 0 or done == settings.num_steps):
            _save(model, optimiser, settings, done, state_path)
        if evaluate and settings.evaluate_every and done % settings.evaluate_every == 0:
            evaluate(done)


def _descend(batches: Sequence[Batch], losses_of: Callable[[Batch], Losses]) -> Losses:
    """Add up the gradients of the batches; returns the sums of their losses, by name."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        losses = losses_of(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach()
    return total


def _save(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    settings: LoopSettings,
    step: int,
    path: Path,
) -> None:
    partial = path.with_name(path.name + ".partial")
    state = {
        "step": step,
        "num_steps": settings.num_steps,
        "seed": settings.seed,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    settings: LoopSettings,
    path: Path | None,
) -> int:
    """Load the state, if there is one; returns the first step to do."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    found = (state["num_steps"], state["seed"])
    if found != (settings.num_steps, settings.seed):
        raise ArtifactError(
            f"{path}: a run of (num_steps, seed) {found}, expected "
            f"{(settings.num_steps, settings.seed)}; remove it to start anew"
        )
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    step: int = state["step"]
    return step
