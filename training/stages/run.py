"""Runs a recipe: from its checkpoint and its data to a run directory.

torchrun --nproc-per-node 8 -m deeptalk_edge.cli train joint ...    over several processes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import write_file
from deeptalk_edge.progress import progress
from deeptalk_edge.training.data.conversations import Clip
from deeptalk_edge.training.data.dataset import (
    Batches,
    load_batch,
    recordings,
)
from deeptalk_edge.training.data.samples import heard_log_mel, num_frames_of
from deeptalk_edge.training.expert_split import (
    ExpertLoads,
)
from deeptalk_edge.training.experts import Routing
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.journal import Journal, past_scores, router_facts, write_report
from deeptalk_edge.training.loop import LoopSettings, StepReport, StopTraining, train
from deeptalk_edge.training.lora import save_adapter
from deeptalk_edge.training.losses import Losses
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.ranks import is_first, num_ranks, shard
from deeptalk_edge.training.stages.objective import (
    LossSettings,
    PreferenceBatch,
    answer_losses,
    encode_batch,
    precision,
    preference_batch_losses,
    preference_margin,
)
from deeptalk_edge.training.stages.objective import (
    run as run_batch,
)
from deeptalk_edge.training.stages.prepare import Prepared, prepare
from deeptalk_edge.training.stages.recipe import Recipe
from deeptalk_edge.training.stages.run_directory import (
    RunDirectory,
    RunFacts,
    prepare_directory,
)
from deeptalk_edge.training.stages.table import num_trainable

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Objective(nn.Module):
    """A model with the losses of its recipe; what is sharded, so that all of it is whole while a
    loss is computed."""

    def __init__(
        self, model: DeepTalk, recipe: Recipe, reference: DeepTalk | None, bfloat16: bool
    ) -> None:
        super().__init__()
        self.deeptalk = model
        self._recipe = recipe
        self._reference = [reference]  # in a list: its parameters are none of ours
        self.remembered: Tensor | None = None
        """The table of features that the batches' frames index, if they bring no log-mels."""
        self.losses = LossSettings(
            weights=(recipe.loss.text, *recipe.loss.codes),
            balance=recipe.loss.balance,
            distillation=recipe.loss.distillation,
            bfloat16=bfloat16,
        )

    @property
    def reference(self) -> DeepTalk | None:
        return self._reference[0]

    def forward(self, batch: Batch | PreferenceBatch) -> Losses:
        """The losses of one batch."""
        if isinstance(batch, PreferenceBatch):
            assert self.reference is not None
            preference = self._recipe.preference
            return preference_batch_losses(
                self.deeptalk,
                self.reference,
                batch,
                self.losses,
                beta=preference.beta,
                mode=preference.mode,
            )
        features = self.features_of(batch)
        return answer_losses(self.deeptalk, batch, features, self.losses, parent=self.reference)

    def features_of(self, batch: Batch) -> Tensor | None:
        """What the batch hears, (N, C)."""
        if self.remembered is not None:
            return self.remembered
        return encode_batch(self.deeptalk, batch, bfloat16=self.losses.bfloat16)


def run_recipe(recipe: Recipe, *, resume: bool, device: str = "cpu") -> Path:
    """Train as a recipe says; returns the final checkpoint's directory.

    Raises SettingsError if something does not fit together, ArtifactError if a file is damaged,
    TrainingFailed and DoesNotFit as the loop and the run directory do.
    """
    for name in ("checkpoint", "output"):
        if not getattr(recipe, name):
            raise SettingsError(f"the recipe names no {name}; add --set {name}=PLACE")
    if not recipe.data.train:
        raise SettingsError("the recipe names no data; add a [[data.train]] with path and task")
    output = Path(recipe.output)
    if is_first():
        prepare_directory(output, resume=resume)
    prepared = prepare(recipe)
    return _train(prepared, output, device)


def loop_settings(recipe: Recipe, steps_per_epoch: float) -> LoopSettings:
    """The loop's settings of a recipe."""
    optimiser, saving = recipe.optimiser, recipe.saving
    num_steps = optimiser.num_steps or max(1, round(optimiser.epochs * steps_per_epoch))
    return LoopSettings(
        num_steps=num_steps,
        learning_rate=optimiser.learning_rate,
        warmup_steps=round(optimiser.warmup * num_steps),
        final_rate=optimiser.final_rate,
        betas=(optimiser.beta1, optimiser.beta2),
        weight_decay=optimiser.weight_decay,
        clip_norm=optimiser.clip_norm,
        evaluate_every=saving.evaluate_every,
        save_every=saving.every,
        log_every=saving.log_every,
        explosion=recipe.explosion,
        workers=recipe.data.workers,
        seed=recipe.seed,
    )


def _train(prepared: Prepared, output: Path, device: str) -> Path:
    recipe, model = prepared.recipe, prepared.model
    remembered = None
    if recipe.data.remember:
        prepared, remembered = _remember(prepared, device)
    batches = Batches(
        prepared.reader,
        prepared.train_entries,
        batch_size=recipe.data.batch_size,
        accumulation=recipe.data.accumulation,
        seed=recipe.seed,
    )
    _, count = num_ranks()
    if recipe.data.accumulation % count:
        raise SettingsError(
            f"data.accumulation = {recipe.data.accumulation} batches a step cannot be shared by "
            f"{count} processes; make it a multiple of {count}"
        )
    settings = loop_settings(recipe, batches.steps_per_epoch)
    bfloat16 = recipe.precision == "bfloat16"
    objective = Objective(model.to(device), recipe, prepared.reference, bfloat16)
    objective.remembered = remembered
    if prepared.reference is not None:
        prepared.reference.to(device)
    shard(objective, list(model.model.layers))
    directory = RunDirectory(
        output,
        model,
        prepared.config,
        Path(recipe.checkpoint),
        RunFacts(recipe=recipe.fingerprint, data=prepared.index.digest),
        keep=recipe.saving.keep,
        split=prepared.split,
        adapters=recipe.lora is not None,
    )
    if is_first():
        _write_recipe(recipe, output / "recipe.json")
        _say(prepared, settings)
    steps = directory.steps()
    num_done = int(steps[-1].name.rpartition("-")[2]) if steps else 0
    judge = _Judge(prepared, objective, device, past_scores(output, num_done))
    journal = Journal(output, tensorboard=recipe.tensorboard) if is_first() else None
    if journal:
        journal.resume(num_done)
        judge.journal = journal
    weight = 1 / recipe.data.accumulation

    def losses_of(batch: Batch | PreferenceBatch) -> Losses:
        losses: Losses = objective(_on(batch, device))
        return {name: loss * weight for name, loss in losses.items()}

    train(
        objective,
        batches.plans_at,
        losses_of,
        settings,
        load=batches.load,
        name=recipe.stage,
        keeper=directory,
        watch=_Watcher(journal, recipe) if journal else None,
        evaluate=judge if prepared.evaluation[1] else None,
    )
    if recipe.saving.patience:
        directory.go_back_to_best()  # stopping early is worth nothing without it
    final = _finish(recipe, model, directory)
    if journal:
        journal.close()
        write_report(output, f"{recipe.stage}: {output}")
    return final


@torch.no_grad()
def _remember(prepared: Prepared, device: str) -> tuple[Prepared, Tensor]:
    """Hear every recording once, with whole windows as in each step."""
    recipe, model = prepared.recipe, prepared.model.to(device)
    moving = recipe.rule.trains if recipe.lora is None else set(recipe.lora.parts)
    if recipe.stage == "preference" or {"encoder", "projector"} & moving:
        raise SettingsError("data.remember needs a frozen encoder, and no DPO")
    judge, plans = prepared.evaluation
    heard = dict.fromkeys(recordings(prepared.reader, prepared.index.entries))
    heard |= dict.fromkeys(recordings(judge, [entry for p in plans for entry in p.entries]))
    starts: dict[tuple[Clip, ...], int] = {}
    features, first = [], 0
    for clips in progress(heard, name="hear", unit="clip"):
        mel = torch.from_numpy(heard_log_mel(clips, model.spec))[None].to(device)
        with precision(mel.device, recipe.precision == "bfloat16"):
            features.append(model.encode(mel)[0, : num_frames_of(clips)].half())
        starts[clips] = first
        first += len(features[-1])
    table = torch.cat(features) if features else torch.zeros(1, model.spec.decoder.width)
    return (
        replace(
            prepared,
            reader=replace(prepared.reader, remembered=starts),
            evaluation=(replace(judge, remembered=starts), plans),
        ),
        table,
    )


def _finish(recipe: Recipe, model: DeepTalk, directory: RunDirectory) -> Path:
    is_adapter = recipe.lora is not None and recipe.lora.keep == "adapter"
    if is_adapter:
        final = directory.path / "final"
        if is_first():
            save_adapter(model, final, recipe.checkpoint)
        return final
    return directory.finish(_DTYPES[recipe.saving.dtype])


class _Watcher:
    """Writes the journal, and shows how fast it goes."""

    def __init__(self, journal: Journal, recipe: Recipe) -> None:
        self._journal = journal
        data = recipe.data
        self._items_per_step = data.batch_size * data.accumulation

    def __call__(self, report: StepReport) -> Mapping[str, str]:
        rate = report.num_steps * self._items_per_step / max(report.seconds, 1e-9)
        self._journal.add(
            "step",
            report.num_done,
            losses=dict(report.losses),
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm,
            samples_per_s=round(rate, 2),
        )
        return {"samples/s": f"{rate:.1f}"}


class _Judge:
    """Scores the model on what is held out, and stops a run that gets no better."""

    def __init__(
        self, prepared: Prepared, objective: Objective, device: str, past: Sequence[float]
    ) -> None:
        """`past` are the scores so far of a run that is resumed."""
        self._prepared, self._objective, self._device = prepared, objective, device
        self._best, self._waited = float("inf"), 0
        self.journal: Journal | None = None
        """In the first process."""
        for score in past:
            self._count(score)

    @torch.no_grad()
    def __call__(self, num_done: int) -> float:
        reader, plans = self._prepared.evaluation
        decoder = self._prepared.model.spec.decoder
        loads = ExpertLoads(len(decoder.moe_layers), decoder.num_experts)
        totals: dict[str, float] = {}
        margins: list[float] = []
        self._objective.eval()
        for plan in plans:
            batch = _on(load_batch(reader, plan), self._device)
            for name, loss in self._objective(batch).items():
                totals[name] = totals.get(name, 0.0) + float(loss) / len(plans)
            if isinstance(batch, Batch):
                features = self._objective.features_of(batch)
                count_loads(self._prepared.model, batch, features, loads)
            elif self._objective.reference is not None:
                margins.append(
                    preference_margin(
                        self._prepared.model,
                        self._objective.reference,
                        [batch],
                        self._objective.losses,
                        self._prepared.recipe.preference.mode,
                    )
                )
        self._objective.train()
        score = sum(totals.values())
        if self.journal:
            facts = {"margin": sum(margins) / len(margins)} if margins else {}
            self.journal.add("evaluation", num_done, score=score, losses=totals, **facts)
            if not margins:
                self.journal.add("router", num_done, facts=router_facts(loads))
        self._wait(score)
        return score

    def _wait(self, score: float) -> None:
        patience = self._prepared.recipe.saving.patience
        self._count(score)
        if patience and self._waited >= patience:
            raise StopTraining(score)

    def _count(self, score: float) -> None:
        self._waited = 0 if score < self._best else self._waited + 1
        self._best = min(self._best, score)


@torch.no_grad()
def count_loads(model: DeepTalk, batch: Batch, features: Tensor | None, loads: ExpertLoads) -> None:
    """Add a batch's routing to some loads."""
    routing: list[Routing] = []
    run_batch(model, batch, features, routing)
    audio = batch.speech_rows(model.spec.vocabulary)
    loads.count(routing, audio & batch.live, ~audio & batch.live)


def _on(batch: Batch | PreferenceBatch, device: str) -> Batch | PreferenceBatch:
    if device == "cpu":
        return batch
    if isinstance(batch, PreferenceBatch):
        return PreferenceBatch(win=batch.win.to(device), lose=batch.lose.to(device))
    return batch.to(device)


def _write_recipe(recipe: Recipe, path: Path) -> None:
    """As the run began; a run that resumes leaves it."""
    if not path.exists():
        write_file(path, (json.dumps(asdict(recipe), indent=1) + "\n").encode())


def _say(prepared: Prepared, settings: LoopSettings) -> None:
    total = sum(p.numel() for p in prepared.model.parameters())
    print(
        f"{prepared.recipe.stage}: {num_trainable(prepared.model):,} of {total:,} parameters "
        f"train; {len(prepared.train_entries)} samples, {settings.num_steps} steps; "
        f"{len(prepared.index.problems)} bad samples left out"
    )
