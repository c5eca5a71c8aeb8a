"""Events into the state machine and actions out of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """20 ms of microphone that end at `now`."""

    voiced: bool


@dataclass(frozen=True, slots=True)
class SoundMissed:
    """Microphone samples up to `now` were not read in time."""

    samples: int


@dataclass(frozen=True, slots=True)
class HangoverChosen:
    """The end-of-turn cue has judged the pause."""

    ms: int


@dataclass(frozen=True, slots=True)
class HangoverShortened:
    """The speculative answer is confident: so much silence is enough, whatever was chosen."""

    ms: int


@dataclass(frozen=True, slots=True)
class StopWordHeard:
    """The user said a stop word over an answer."""

    opened: int
    """Sample at which the voice began."""


@dataclass(frozen=True, slots=True)
class SoundBegan:
    """The first sound of an answer went to the loudspeaker."""

    epoch: int
    interruptible: bool = True
    behind: int = 0
    """Microphone samples that are not read yet and so were recorded before the sound began."""


@dataclass(frozen=True, slots=True)
class AnswerHeard:
    """The answer is complete and all of it was heard."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AnswerFailed:
    """The model gave up this attempt."""

    epoch: int


class Command(enum.Enum):
    """A command of the integrator, or the loss of the device."""

    PRESS = "press"
    """Push-to-talk: the button is pressed."""
    RELEASE = "release"
    INTERRUPT = "interrupt"
    """The integrator ends the answer."""
    LOSE = "lose"
    """The device is lost."""
    RESTORE = "restore"
    STOP = "stop"


Event: TypeAlias = (
    Frame
    | SoundMissed
    | HangoverChosen
    | HangoverShortened
    | StopWordHeard
    | SoundBegan
    | AnswerHeard
    | AnswerFailed
    | Command
)


# Actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserStartedSpeaking:
    """Keep the microphone's sound from `start` on; experts for a prompt may be read meanwhile."""

    start: int


@dataclass(frozen=True, slots=True)
class DropUtterance:
    """Drop the utterance: it is not asked."""


@dataclass(frozen=True, slots=True)
class TellOverload:
    """Report that a question is given up: it lacks so many samples, or its answer is late."""

    reason: Literal["sound lost", "answer late"]
    samples: int


@dataclass(frozen=True, slots=True)
class BeginAnswer:
    """Answer the utterance [its start, end), silently until `CommitAnswer`."""

    epoch: int
    end: int


@dataclass(frozen=True, slots=True)
class JudgePause:
    """Ask the end-of-turn cue about the utterance so far; it answers with `HangoverChosen`."""

    end: int


@dataclass(frozen=True, slots=True)
class CommitAnswer:
    """The turn is over: the answer may be played."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DiscardAnswer:
    """Nothing of the answer was heard: remove it and its question from the history."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SetGain:
    """Make the answer quieter, or normal again."""

    gain: float


@dataclass(frozen=True, slots=True)
class PausePlayback:
    """Stop sound and model at once; both may resume."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ResumePlayback:
    """Resume at the position that was heard."""

    epoch: int


@dataclass(frozen=True, slots=True)
class InterruptAnswer:
    """End the answer where it was heard; the policy says what the history keeps."""

    epoch: int


@dataclass(frozen=True, slots=True)
class FinishAnswer:
    """Keep the heard part of the answer in the history."""

    epoch: int
    heard_samples: int | None = None
    """None: the whole answer."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Neither side speaks and no answer is due: the model may trim its history."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Begin a new conversation."""


Action: TypeAlias = (
    UserStartedSpeaking
    | DropUtterance
    | TellOverload
    | BeginAnswer
    | JudgePause
    | CommitAnswer
    | DiscardAnswer
    | SetGain
    | PausePlayback
    | ResumePlayback
    | InterruptAnswer
    | FinishAnswer
    | Idle
    | Reset
)
