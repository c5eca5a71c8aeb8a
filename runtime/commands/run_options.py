"""What `run` was asked to do: its flags, read once, at the door of the command."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deeptalk_edge.errors import SettingsError

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.runtime.audio.end_of_turn import HangoverKind
    from deeptalk_edge.runtime.lm.encoder import EncoderWindow
    from deeptalk_edge.runtime.settings import AnswerMode, BackendChoice

_BY_VOICE = (
    "input_device",
    "output_device",
    "push_to_talk",
    "no_echo_canceller",
    "no_speculation",
    "turn_model",
    "stop_word",
    "trace",
    "record",
)
_BY_FILE = ("wav", "text", "out", "realtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """One field a flag of `run`, with the flag's name; `run --help` says what each one means."""

    bundle: Path
    wav: tuple[Path, ...]
    text: tuple[str, ...]
    out: Path | None
    mode: AnswerMode | None
    system: str | None
    speaker: str | None
    forget: bool
    max_turns: str | None
    seed: int
    as_released: bool
    encoder_window: EncoderWindow
    realtime: bool
    require_signature: Path | None
    backend: BackendChoice
    cuda_graphs: bool
    kernel_cache: Path | None
    pool: str | None
    paging_policy: str
    record_routes: Path | None
    answer_all: bool
    least_understood: float | None
    not_understood: Path | Literal["bundle", "silence"]
    threads: int
    json: bool
    # By voice.
    mic: bool
    input_device: str | None
    output_device: str | None
    push_to_talk: bool
    no_echo_canceller: bool
    no_speculation: bool
    hangover: HangoverKind
    turn_model: Path | None
    stop_word: tuple[str, ...]
    trace: Path | None
    record: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> RunOptions:
        """Read the parsed flags.

        Raises SettingsError if there is nothing to ask, or flags of both ways to ask are mixed.
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = getattr(args, field.name)
            found[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**found)

    def __post_init__(self) -> None:
        for name in _BY_FILE if self.mic else _BY_VOICE:
            if getattr(self, name):
                flag = "--" + name.replace("_", "-")
                way_out = (
                    "does not go with --mic; leave one out" if self.mic else "needs --mic; add it"
                )
                raise SettingsError(f"{flag} {way_out}")
        if not (self.num_named or self.mic):
            raise SettingsError(
                "nothing to ask: name a recording with --wav, a question with --text, or talk with "
                "--mic"
            )

    @property
    def num_named(self) -> int:
        """Recordings and questions that the user named."""
        return len(self.wav) + len(self.text)
