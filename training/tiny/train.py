"""The language model's half of `make tiny`: from a corpus and a unit voice to a whole model.

    hearing | speaking     two processes: the ear learns words; the decoder, typing and speech
    remember               every training question is encoded once; the ear is frozen
    align, audio, text, joint       two processes, each with half of every step

Each part writes its result to the working directory and is skipped when the result exists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from deeptalk_edge.files import write_file
from deeptalk_edge.model.noise import check_seed
from deeptalk_edge.model.spec import CodecSpec, DecoderSpec
from deeptalk_edge.training.expert_split import save_split
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.loop import LoopSettings, StateFile, train
from deeptalk_edge.training.losses import Losses, added
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.ranks import is_first
from deeptalk_edge.training.stages.objective import LossSettings, answer_losses
from deeptalk_edge.training.stages.table import apply_rule
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.dataset import (
    DatasetSettings,
    ItemWriter,
    TinyBatches,
    UtterancePool,
)
from deeptalk_edge.training.tiny.domain import vocabulary
from deeptalk_edge.training.tiny.hearing import Ear, HearingSettings
from deeptalk_edge.training.tiny.listening import (
    HearingBatches,
    HearingPlan,
    Listener,
    start_ear,
)
from deeptalk_edge.training.tiny.shape import (
    AUDIO_EXPERT_COUNTS,
    DECODER,
    SYSTEM_PROMPT,
    tiny_spec,
    tiny_template,
)
from deeptalk_edge.training.tiny.stages import (
    TINY_LOSSES,
    HeardMemory,
    Stage,
    choose_audio_experts,
    remember,
    start_decoder,
)
from deeptalk_edge.training.tiny.tokenizer import train_tokenizer
from deeptalk_edge.training.tiny.units import UnitVoice

EAR = "model.audio_"
"""What begins so is the ear's; the rest is the decoder's."""

SPLIT_BATCHES = 16
_SPLIT_STEP = 10**6  # batches that no stage trains on


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The whole course: some 100 minutes on two cores that multiply bfloat16."""

    hearing: HearingPlan = field(default_factory=HearingPlan)
    hearing_rate: float = 2e-3
    augmentation: HearingSettings = field(default_factory=HearingSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    losses: LossSettings = TINY_LOSSES
    speaking_steps: int = 2500
    decoder_steps: int = 3200
    decoder_rate: float = 2e-3
    stage_shares: tuple[float, float, float, float] = (0.2, 0.05, 0.05, 0.7)
    """Of `decoder_steps`: align, audio, text, joint."""

    remember_strength: float = 0.8
    """How much the remembered questions are varied."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def scaled(self, factor: float) -> TrainSettings:
        """The same course in `factor` times as many steps."""

        def times(steps: int) -> int:
            return max(4, round(steps * factor))

        return replace(
            self,
            hearing=replace(self.hearing, num_steps=times(self.hearing.num_steps)),
            speaking_steps=times(self.speaking_steps),
            decoder_steps=times(self.decoder_steps),
        )


class Workshop:
    """What every part of the training needs; one per process."""

    def __init__(
        self,
        corpus: Corpus,
        units: UnitVoice,
        codec: CodecSpec,
        settings: TrainSettings,
        device: str,
        decoder: DecoderSpec = DECODER,
    ) -> None:
        self.settings, self.corpus, self.device = settings, corpus, device
        self.tokenizer = tiny_tokenizer()
        self.spec = tiny_spec(self.tokenizer, codec, "word", decoder)
        clips = (corpus.questions[i] for i in range(len(corpus.questions)))
        self.ear = Ear(clips, self.spec.encoder, settings.augmentation, device)
        self.pool = UtterancePool(corpus, self.ear.lengths)
        self.batches = TinyBatches(
            corpus,
            self.pool,
            ItemWriter(self.spec, tiny_template(self.spec, self.tokenizer), units),
            self.spec,
            settings.dataset,
            device,
        )

    def new_model(self) -> DeepTalk:
        """A model from nothing, the same each time."""
        torch.manual_seed(self.settings.seed)
        model = DeepTalk(self.spec)
        start_ear(model)
        start_decoder(model)
        return model.to(self.device)


def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of the tiny checkpoint; it depends on the domain alone."""
    return train_tokenizer(vocabulary(), [SYSTEM_PROMPT])


def learn_to_hear(workshop: Workshop, work: Path) -> Path:
    """The hearing stage: encoder and projector, by the phones and words of the questions."""
    path = work / "ear.safetensors"
    if path.exists():
        return path
    settings, model = workshop.settings, workshop.new_model()
    model.requires_grad_(False)
    model.model.audio_encoder.requires_grad_(True)
    model.model.audio_encoder.embed_positions.requires_grad_(False)
    model.model.audio_mm_projector.requires_grad_(True)
    batches = HearingBatches(
        workshop.corpus, workshop.pool, workshop.ear, workshop.spec, settings.hearing
    )
    listener = Listener(model, len(batches.words), len(batches.phones), settings.hearing)
    listener.to(workshop.device)
    train(
        listener,
        batches.parts,
        lambda part: listener.losses(batches(*part), bfloat16=settings.losses.bfloat16),
        LoopSettings(
            num_steps=settings.hearing.num_steps,
            learning_rate=settings.hearing_rate,
            seed=settings.seed,
        ),
        name="hearing",
        keeper=StateFile(work / "hearing.state"),
    )
    if is_first():
        _save_part(model, path, is_ear=True)
    return path


def learn_to_speak(workshop: Workshop, work: Path, *, final_rate: float = 0.5) -> Path:
    """Before anything is heard: typed questions, and speech that follows the text. `final_rate` is
    the share of the rate at its end: another stage follows."""
    path = work / "speaking.safetensors"
    if path.exists():
        return path
    model = workshop.new_model()
    apply_rule(model, Stage.ALIGN.rule, None)
    train(
        model,
        lambda step: [workshop.batches.typed(step)],
        lambda batch: answer_losses(model, batch, None, workshop.settings.losses),
        LoopSettings(
            num_steps=workshop.settings.speaking_steps,
            learning_rate=workshop.settings.decoder_rate,
            final_rate=final_rate,
            seed=workshop.settings.seed,
        ),
        name="speaking",
        keeper=StateFile(work / "speaking.state"),
    )
    _save_part(model, path, is_ear=False)
    return path


def remember_questions(workshop: Workshop, work: Path) -> Path:
    """Encode every training question with the ear that `learn_to_hear` left in `work`."""
    path = work / "heard.safetensors"
    if path.exists():
        return path
    settings, model = workshop.settings, workshop.new_model()
    model.load_state_dict(load_file(work / "ear.safetensors"), strict=False)
    memory = remember(
        model,
        workshop.ear,
        workshop.pool.members,
        strength=settings.remember_strength,
        bfloat16=settings.losses.bfloat16,
        seed=settings.seed,
    )
    memory.save(path)
    return path


def learn_to_answer(workshop: Workshop, work: Path) -> DeepTalk:
    """The remaining stages, from what the others left in `work`. Returns the model, on the CPU; the
    experts' split is in `work`."""
    settings, model = workshop.settings, workshop.new_model()
    for part in ("ear.safetensors", "speaking.safetensors"):
        model.load_state_dict(load_file(work / part), strict=False)
    memory = HeardMemory.load(work / "heard.safetensors", workshop.device)
    experts: list[list[int]] = []
    first = settings.speaking_steps
    for stage, share in zip(Stage, settings.stage_shares, strict=True):
        num_steps = max(1, round(share * settings.decoder_steps))
        if stage is Stage.AUDIO:
            experts = _split(model, workshop, memory)
            if is_first():
                save_split(experts, work / "audio_experts.json")
        apply_rule(model, stage.rule, experts or None)
        _train_stage(model, workshop, memory, stage, first, num_steps, work)
        first += num_steps
    return model.cpu()


def read_split(work: Path) -> list[list[int]]:
    """The audio experts that `learn_to_answer` found."""
    split: list[list[int]] = json.loads((work / "audio_experts.json").read_text(encoding="utf-8"))
    return split


def _train_stage(
    model: DeepTalk,
    workshop: Workshop,
    memory: HeardMemory,
    stage: Stage,
    first: int,
    num_steps: int,
    work: Path,
) -> None:
    """Train one stage on steps `first` onwards."""
    settings, batches = workshop.settings, workshop.batches

    def halves_at(step: int) -> list[tuple[Batch, Batch]]:
        heard, typed = batches.heard(first + step, memory.spans), batches.typed(first + step)
        return list(zip(heard.halves(), typed.halves(), strict=True))

    def losses_of(half: tuple[Batch, Batch]) -> Losses:
        both = [
            answer_losses(model, batch, source, settings.losses)
            for batch, source in zip(half, (memory.features, None), strict=True)
        ]
        return added([{name: loss / 2 for name, loss in part.items()} for part in both])

    is_partial = stage in (Stage.AUDIO, Stage.TEXT)
    train(
        model,
        halves_at,
        losses_of,
        LoopSettings(
            num_steps=num_steps,
            learning_rate=settings.decoder_rate * (0.5 if is_partial else 1.0),
            warmup_steps=min(60, num_steps),
            final_rate=0.02 if stage is Stage.JOINT else 0.5,
            seed=settings.seed,
        ),
        name=stage.value,
        keeper=StateFile(work / f"{stage.value}.state"),
    )


def _split(model: DeepTalk, workshop: Workshop, memory: HeardMemory) -> list[list[int]]:
    batches = workshop.batches
    calibration: Sequence[Batch] = [
        batch
        for step in range(_SPLIT_STEP, _SPLIT_STEP + SPLIT_BATCHES)
        for batch in (batches.heard(step, memory.spans), batches.typed(step))
    ]
    return choose_audio_experts(model, calibration, memory, AUDIO_EXPERT_COUNTS)


def _save_part(model: DeepTalk, path: Path, *, is_ear: bool) -> None:
    """Write the ear, or all but the ear and the head, which is the embedding."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if name.startswith(EAR) is is_ear
    }
    write_file(path, save(tensors))
