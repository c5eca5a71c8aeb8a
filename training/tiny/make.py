"""Makes the tiny checkpoint's parts, each in its place in a working directory.

Parts that are already there are not made again. Side processes are spawned, so that they may use
a GPU; what they run must be importable, which is why it is not in `__main__`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from deeptalk_edge.training.ranks import is_first, joined
from deeptalk_edge.training.snac_files import save_snac
from deeptalk_edge.training.tiny.codec import DecoderSettings, train_decoder
from deeptalk_edge.training.tiny.corpus import load_corpus, synthesise
from deeptalk_edge.training.tiny.publish import publish
from deeptalk_edge.training.tiny.tokens import TINY_CODEC, Tokeniser, TokenSettings, train_tokens
from deeptalk_edge.training.tiny.train import (
    TrainSettings,
    Workshop,
    learn_to_answer,
    learn_to_hear,
    learn_to_speak,
    read_split,
    remember_questions,
)
from deeptalk_edge.training.tiny.units import UnitVoice, build_units


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan:
    """What the parts need to know; travels to the side processes."""

    work: Path
    device: str
    settings: TrainSettings
    codec_steps: int
    workers: int
    """Cores to use."""

    @property
    def ranks(self) -> int:
        """Processes that train one model together."""
        return 2 if self.device == "cpu" else 1

    @property
    def corpus(self) -> Path:
        return self.work / "corpus"

    @property
    def tokeniser(self) -> Path:
        return self.work / "tokeniser.safetensors"

    @property
    def units(self) -> Path:
        return self.work / "units.npz"

    @property
    def snac(self) -> Path:
        return self.work / "snac"

    def workshop(self) -> Workshop:
        """Load what was made, for the language model's stages."""
        return Workshop(
            load_corpus(self.corpus),
            UnitVoice.load(self.units),
            TINY_CODEC,
            self.settings,
            self.device,
        )


def make(plan: MakePlan, out: Path) -> None:
    """Make every part and write the checkpoint."""
    plan.work.mkdir(parents=True, exist_ok=True)
    _make_speech(plan)
    _make_codes(plan)
    _run_side_by_side(plan, [_hear] * plan.ranks, [_make_voice])
    torch.set_num_threads(plan.workers)
    remember_questions(plan.workshop(), plan.work)
    _run_side_by_side(plan, [partial(_answer, out)] * plan.ranks)


def _make_speech(plan: MakePlan) -> None:
    if not (plan.corpus / "corpus.json").exists():
        synthesise(plan.corpus, seed=plan.settings.seed, workers=plan.workers)


def _make_codes(plan: MakePlan) -> None:
    if not plan.tokeniser.exists():
        tokeniser, _ = train_tokens(
            load_corpus(plan.corpus).answers, TokenSettings(), device=plan.device
        )
        tokeniser.save(plan.tokeniser)
    if not plan.units.exists():
        build_units(Tokeniser.load(plan.tokeniser)).save(plan.units)


def _hear(plan: MakePlan) -> None:
    learn_to_hear(plan.workshop(), plan.work)


def _make_voice(plan: MakePlan) -> None:
    """The codec's decoder, then the language model's first stage."""
    if not plan.snac.exists():
        codec, _ = train_decoder(
            load_corpus(plan.corpus).answers,
            Tokeniser.load(plan.tokeniser),
            UnitVoice.load(plan.units),
            replace(DecoderSettings(), num_steps=plan.codec_steps),
            device=plan.device,
        )
        save_snac(codec.cpu(), plan.snac)
    learn_to_speak(plan.workshop(), plan.work)


def _answer(out: Path, plan: MakePlan) -> None:
    workshop = plan.workshop()
    model = learn_to_answer(workshop, plan.work)
    if is_first():
        publish(model, workshop.tokenizer, read_split(plan.work), plan.snac, plan.tokeniser, out)


def _run_side_by_side(plan: MakePlan, *jobs: Sequence[Callable[[MakePlan], None]]) -> None:
    """Run the jobs, each by child processes that are joined, with one thread each.

    Raises RuntimeError if a process fails; what the others made stays.
    """
    context = get_context("spawn")
    with TemporaryDirectory() as meetings:
        processes = [
            context.Process(
                target=_take_part,
                args=(part, plan, rank, len(job), Path(meetings) / str(number)),
            )
            for number, job in enumerate(jobs)
            for rank, part in enumerate(job)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{len(failed)} of the processes failed; their errors are above")


def _take_part(
    part: Callable[[MakePlan], None], plan: MakePlan, rank: int, count: int, meeting: Path
) -> None:
    torch.set_num_threads(1)
    with joined(rank, count, meeting):
        part(plan)
