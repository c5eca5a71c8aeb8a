"""What the state machine is told, and what it answers: events in, actions out."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """20 ms of microphone ended at `now`."""

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
    """The speculative answer is a sure one: so much silence is enough, whatever was chosen."""

    ms: int


@dataclass(frozen=True, slots=True)
class StopWordHeard:
    """Somebody who speaks over an answer said a stop word."""

    opened: int
    """Where the voice began."""


@dataclass(frozen=True, slots=True)
class SoundBegan:
    """The first sound of an answer went to the loudspeaker."""

    epoch: int
    interruptible: bool = True
    behind: int = 0
    """Microphone samples that wait to be read: they were heard before it began."""


@dataclass(frozen=True, slots=True)
class AnswerHeard:
    """The answer is complete, and all of it was heard."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AnswerFailed:
    """The model gave up this attempt."""

    epoch: int


class Command(enum.Enum):
    """What comes from outside."""

    PRESS = "press"
    """Push-to-talk begins: the user takes the floor."""
    RELEASE = "release"
    INTERRUPT = "interrupt"
    """The integrator ends the answer."""
    LOSE = "lose"
    """The device is gone."""
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
    """Keep the microphone's sound from here on; experts of a prompt may be read meanwhile."""

    start: int


@dataclass(frozen=True, slots=True)
class DropUtterance:
    """It is not wanted."""


@dataclass(frozen=True, slots=True)
class TellOverload:
    """A question is given up: it has a hole of so many samples, or its answer was waited for."""

    reason: Literal["sound lost", "answer late"]
    samples: int


@dataclass(frozen=True, slots=True)
class BeginAnswer:
    """Answer the utterance [its start, end); silently, until `CommitAnswer`."""

    epoch: int
    end: int


@dataclass(frozen=True, slots=True)
class JudgePause:
    """Ask the end-of-turn cue about the utterance so far; it answers with `HangoverChosen`."""

    end: int


@dataclass(frozen=True, slots=True)
class CommitAnswer:
    """The turn is over: the answer may sound."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DiscardAnswer:
    """Nothing of it was heard: remove it and its question without trace."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SetGain:
    """Duck, or come back."""

    gain: float


@dataclass(frozen=True, slots=True)
class PausePlayback:
    """Stop sound and model at once; both may go on."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ResumePlayback:
    """Go on from the position that was heard."""

    epoch: int


@dataclass(frozen=True, slots=True)
class InterruptAnswer:
    """End it where it was heard; the history keeps what the policy says."""

    epoch: int


@dataclass(frozen=True, slots=True)
class FinishAnswer:
    """Keep the answer in the history, as far as it was heard."""

    epoch: int
    heard_samples: int | None = None
    """None: all of it."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Nobody speaks, and no answer is due: the model may trim its history."""


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
