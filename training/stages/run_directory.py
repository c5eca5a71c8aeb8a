"""A run's directory: its checkpoints, complete or absent, and what it needs to resume.

    recipe.json            the recipe as it was run
    journal.jsonl          one line a logged step or evaluation
    report.html            the same to look at
    step-000400/           a checkpoint in the official layout, float32, and trainer.pt
    final/                 the result: the official layout, in the recipe's dtype

A step directory is written under a hidden name and renamed, so the newest one is always whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from deeptalk_edge.errors import ArtifactError, DoesNotFit, EdgeError, SettingsError
from deeptalk_edge.files import staged_directory
from deeptalk_edge.schema import read_json
from deeptalk_edge.training.checkpoint import load_weights, write_checkpoint
from deeptalk_edge.training.expert_split import save_split
from deeptalk_edge.training.loop import LoopSettings
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.ranks import is_first, wait_for_all

TRAINER = "trainer.pt"
TRAINER_FACTS = "trainer.json"
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "codec_encoder.safetensors",
    "snac",
)
"""What a checkpoint needs besides config and weights; copied from the one a run starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run must have in common with the one that it resumes."""

    recipe: str
    """The recipe's fingerprint."""
    data: str
    """The index's digest."""


class RunDirectory:
    """Keeps a run; see the module. `keep` newest step directories stay, and the best."""

    def __init__(
        self,
        path: Path,
        model: DeepTalk,
        config: Mapping[str, Any],
        source: Path,
        facts: RunFacts,
        *,
        keep: int,
        split: Sequence[Sequence[int]] | None = None,
        adapters: bool = False,
    ) -> None:
        self.path = path
        self._model, self._config, self._source, self._facts = model, config, source, facts
        self._keep, self._split, self._adapters = keep, split, adapters

    def steps(self) -> list[Path]:
        """The step directories, oldest first."""
        return sorted(p for p in self.path.glob("step-*") if (p / TRAINER_FACTS).is_file())

    def resume(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, settings: LoopSettings
    ) -> int:
        """Load the newest step's state, if there is one; returns the first step to do.

        Raises ArtifactError if the run was another recipe's or the data has changed since.
        """
        if not (steps := self.steps()):
            return 0
        newest = steps[-1]
        facts = read_json(newest / TRAINER_FACTS)
        if facts.get("data") != self._facts.data:
            raise ArtifactError(
                f"{newest}: the data has changed since this run began (digest "
                f"{facts.get('data')}, now {self._facts.data}), so the run cannot continue; "
                "restore the data, or start again with another `output`"
            )
        if facts.get("recipe") != self._facts.recipe:
            raise ArtifactError(
                f"{newest}: was written by another recipe (see {self.path}/recipe.json); resume "
                "with that one, or start again with another `output`"
            )
        state = self._load(newest)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        set_optimizer_state_dict(model, optimiser, state["optimiser"], options=options)
        return int(facts["step"])

    def save(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        settings: LoopSettings,
        num_done: int,
        score: float | None,
    ) -> None:
        """Write a step directory, then drop the oldest that are too many.

        Raises DoesNotFit if the disk is full; those that were there stay.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        place = self.path / f"step-{num_done:06}"
        state: dict[str, Any] = {
            "optimiser": get_optimizer_state_dict(model, optimiser, options=options)
        }
        if self._adapters:
            state["adapters"] = self._adapter_tensors()
        with self._room(place):
            if is_first() and place.exists():
                shutil.rmtree(place)
            with staged_on_first(place) as staging:
                write_checkpoint(
                    staging, self._model, self._config, dtype=torch.float32, merged=False
                )
                if is_first():
                    self._carry(staging)
                    torch.save(state, staging / TRAINER)
                    facts = {
                        "step": num_done,
                        "score": score,
                        "recipe": self._facts.recipe,
                        "data": self._facts.data,
                    }
                    (staging / TRAINER_FACTS).write_text(json.dumps(facts), encoding="utf-8")
        if is_first():
            self._drop_old()
        wait_for_all()

    def best(self) -> Path | None:
        """The step directory with the lowest score; the newest where none has one."""
        steps = self.steps()
        scored = [(score, step) for step in steps if (score := _score(step)) is not None]
        if scored:
            return min(scored, key=lambda pair: pair[0])[1]
        return steps[-1] if steps else None

    def go_back_to_best(self) -> None:
        """Load the best step's weights, if there is a step."""
        if (best := self.best()) is not None:
            self._load(best)

    def _load(self, step: Path) -> dict[str, Any]:
        """Load a step's weights and adapters; returns what else the trainer kept."""
        load_weights(self._model, step)
        state: dict[str, Any] = torch.load(step / TRAINER, map_location="cpu", weights_only=True)
        if self._adapters:
            self._load_adapters(state["adapters"])
        return state

    def finish(self, dtype: torch.dtype, *, merged: bool = True) -> Path:
        """Write `final/`. Raises DoesNotFit if the disk is full."""
        place = self.path / "final"
        with self._room(place):
            if is_first() and place.exists():
                shutil.rmtree(place)
            with staged_on_first(place) as staging:
                write_checkpoint(staging, self._model, self._config, dtype=dtype, merged=merged)
                if is_first():
                    self._carry(staging)
        wait_for_all()
        return place

    def _carry(self, staging: Path) -> None:
        """Put what belongs to a checkpoint besides its weights beside them."""
        if self._split is not None:
            save_split(self._split, staging / str(self._config["audio_experts_file"]))
        carry(self._source, staging, self._config)

    @contextmanager
    def _room(self, place: Path) -> Iterator[None]:
        """What fails for want of room says so, and what is still there."""
        try:
            yield
        except EdgeError:
            raise
        except (OSError, RuntimeError) as error:
            steps = self.steps()
            kept = f"the last whole one is {steps[-1]}" if steps else "there is none yet"
            raise DoesNotFit(
                f"{place}: the checkpoint cannot be written ({error}); {kept}. Free room on the "
                "disk and start again with --resume"
            ) from error

    def _drop_old(self) -> None:
        best = self.best()
        for step in self.steps()[: -self._keep]:
            if step != best:
                shutil.rmtree(step)

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        from deeptalk_edge.training.lora import adapter_tensors

        return adapter_tensors(self._model)

    def _load_adapters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from deeptalk_edge.training.lora import load_adapter_tensors

        load_adapter_tensors(self._model, tensors)


def prepare_directory(path: Path, *, resume: bool) -> None:
    """Refuse a place that holds another run's checkpoints. Raises SettingsError."""
    if not resume and path.exists() and any(path.iterdir()):
        raise SettingsError(
            f"{path} holds a run already; continue it with --resume, or name another `output`"
        )
    path.mkdir(parents=True, exist_ok=True)


def carry(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy what a checkpoint needs besides config and weights, where `target` lacks it; `config` is
    what its config.json holds."""
    split = config.get("audio_experts_file")
    for name in (*_CARRIED, *([split] if isinstance(split, str) else [])):
        old, new = source / name, target / name
        if Path(name).name != name or new.exists():
            continue
        if old.is_dir():
            shutil.copytree(old, new)
        elif old.is_file():
            shutil.copy2(old, new)


@contextmanager
def staged_on_first(place: Path) -> Iterator[Path]:
    """A staged directory in the first process; the others get a name that nothing is put under."""
    if not is_first():
        yield place
        return
    with staged_directory(place) as staging:
        yield staging


def _score(step: Path) -> float | None:
    score = read_json(step / TRAINER_FACTS).get("score")
    is_number = isinstance(score, (int, float)) and math.isfinite(score)
    return float(score) if is_number else None  # type: ignore[arg-type]
