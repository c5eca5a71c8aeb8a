"""Settings of a conversation: the checkpoint's defaults, and what a user may change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.target import current_name
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.backends.base import BackendSettings
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.lm.encoder import EncoderWindow
from deeptalk_edge.runtime.lm.sampler import Penalty, SamplerSettings
from deeptalk_edge.runtime.understanding import UnderstandingSettings

BackendChoice = Literal["auto", "cpu", "ort", "tensorrt", "fake"]
MOST_THREADS = 1024
"""More threads are a mistake: a system that allows them takes minutes to start them."""


AnswerMode = Literal["batch-parallel", "single", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationSettings:
    """Settings of a conversation. `ConversationSettings.of(bundle)` returns the checkpoint authors'
    choice."""

    system: str
    speaker: str
    mode: AnswerMode
    sampler: SamplerSettings
    max_rows: int
    """Most rows of one answer."""
    context_rows: int
    """Most rows of the whole conversation; the cache is allocated for them."""
    max_turns: int | None = None
    """Turns that the model sees, the present question included: with 1 it sees no history. None: as
    many as the context holds."""
    fold_typed: bool = False
    """Typed questions reach the model in lower case and without punctuation."""
    ends_with_speech: bool = False
    """End an answer when its speech ends, even if its text continues, as the released loop does."""
    encoder_window: EncoderWindow = "whole"
    """The encoder's window: `near` is many times faster but differs from training."""
    threads: int = 1
    backend: BackendChoice = "auto"
    """Backend that runs the bundle; `auto` is TensorRT for a bundle of engines, else our own
    kernels if the bundle and the machine have them. `native` is the older name of `cpu`."""
    paging: PagingSettings = field(default_factory=PagingSettings)
    understanding: UnderstandingSettings = field(default_factory=UnderstandingSettings)
    cuda_graphs: bool = True
    """On a GPU: launch a step as one CUDA graph. Without it, answers are the same but slower."""
    kernel_cache: Path | None = None
    """With TensorRT-RTX: a file that keeps the compiled kernels, for the next start."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "context_rows", "max_turns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} = {value}: expected 1 or more")
        check_threads(self.threads)
        object.__setattr__(self, "backend", current_name("backend", self.backend))
        if self.backend not in get_args(BackendChoice):
            known = ", ".join(get_args(BackendChoice))
            raise SettingsError(f"backend = {self.backend!r}: known are {known}")

    def for_backend(self) -> BackendSettings:
        """The settings that a backend is opened with."""
        return BackendSettings(
            context_rows=self.context_rows,
            threads=self.threads,
            encoder_window=self.encoder_window,
            paging=self.paging,
            num_items=2 if self.mode == "batch-parallel" else 1,
            cuda_graphs=self.cuda_graphs,
            kernel_cache=self.kernel_cache,
        )

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        mode: AnswerMode | None = None,
        seed: int = 0,
        threads: int = 1,
        as_released: bool = False,
    ) -> ConversationSettings:
        """Return the bundle's defaults; `as_released` reproduces the released loop's bugs."""
        own = bundle.manifest.generation
        sampler = SamplerSettings(
            seed=seed,
            text_top_k=own.text_top_k,
            audio_top_k=own.audio_top_k,
            temperature=own.temperature,
            repetition_penalty=own.repetition_penalty,
            penalty=Penalty.AS_RELEASED if as_released else Penalty.ONCE,
        )
        return cls(
            system=own.system,
            speaker=own.speaker,
            mode=mode or own.mode,
            sampler=sampler,
            max_rows=own.max_rows,
            context_rows=own.context_rows,
            max_turns=own.max_turns,
            fold_typed=own.fold_typed,
            ends_with_speech=as_released,
            threads=threads,
        )


def check_threads(threads: int) -> None:
    """Raises SettingsError if there are no threads or too many."""
    if not 1 <= threads <= MOST_THREADS:
        raise SettingsError(f"threads = {threads}: expected 1 to {MOST_THREADS}")
