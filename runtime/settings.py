"""How a conversation is held: the checkpoint's own defaults, and what a user may change."""

from __future__ import annotations

from dataclasses import dataclass, field
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
"""More are a slip; a system that gives them is busy starting them for minutes."""


AnswerMode = Literal["batch-parallel", "single", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationSettings:
    """How to talk. `ConversationSettings.of(bundle)` gives what the checkpoint's authors chose."""

    system: str
    speaker: str
    mode: AnswerMode
    sampler: SamplerSettings
    max_rows: int
    """Rows of one answer at most."""
    context_rows: int
    """Rows of the whole conversation at most; the cache is allocated for them."""
    max_turns: int | None = None
    """Turns that the model sees at once, the question at hand included: 1 asks each question by
    itself. None: as many as the context holds."""
    fold_typed: bool = False
    """Typed questions reach the model in lower case and without punctuation."""
    ends_with_speech: bool = False
    """End an answer with its speech even if its text goes on, as the released loop does."""
    encoder_window: EncoderWindow = "whole"
    """What the encoder sees: `near` is many times quicker, and not what it was trained on."""
    threads: int = 1
    backend: BackendChoice = "auto"
    """What runs the bundle; `auto` is TensorRT for a bundle of engines, else our own kernels where
    bundle and machine have them. `native`,
    the older name of `cpu`, is understood."""
    paging: PagingSettings = field(default_factory=PagingSettings)
    understanding: UnderstandingSettings = field(default_factory=UnderstandingSettings)
    cuda_graphs: bool = True
    """On a GPU: launch a step as one CUDA graph. The same answers without, more slowly."""

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
        """What of these a backend is opened with."""
        return BackendSettings(
            context_rows=self.context_rows,
            threads=self.threads,
            encoder_window=self.encoder_window,
            paging=self.paging,
            num_items=2 if self.mode == "batch-parallel" else 1,
            cuda_graphs=self.cuda_graphs,
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
        """The bundle's own defaults; `as_released` brings back the released loop's bugs."""
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
    """Raises SettingsError if there are none, or too many."""
    if not 1 <= threads <= MOST_THREADS:
        raise SettingsError(f"threads = {threads}: expected 1 to {MOST_THREADS}")
