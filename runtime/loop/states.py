"""The state of a conversation by voice, as a pure function: (loop, event, now) -> (loop, actions).

    LISTENING -> USER_SPEAKING <-> ENDPOINTING -> THINKING -> SPEAKING -> LISTENING
    SPEAKING -> OVERLAP (quieter) -> INTERRUPTED (paused) -> USER_SPEAKING, or
    -> FALSE_INTERRUPTION -> SPEAKING again
    a stop word -> STOPPED_BY_WORD -> LISTENING, or -> USER_SPEAKING if the user goes on
    RECOVERING and STOPPED from anywhere

time     samples of the microphone, 16 kHz; there is no other clock
epoch    the number of an attempt at an answer. It rises when an attempt becomes void; sound and
         text of another epoch are dropped
total    every state accepts every event. `Frame` events alone lead out of every state in bounded
         time, except LISTENING and STOPPED
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TypeAlias

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.signals import (
    Action,
    AnswerFailed,
    BeginAnswer,
    Command,
    CommitAnswer,
    DiscardAnswer,
    DropUtterance,
    Event,
    FinishAnswer,
    Frame,
    HangoverChosen,
    HangoverShortened,
    Idle,
    InterruptAnswer,
    JudgePause,
    PausePlayback,
    Reset,
    ResumePlayback,
    SetGain,
    SoundBegan,
    SoundMissed,
    StopWordHeard,
    TellOverload,
    UserStartedSpeaking,
)

SAMPLES_PER_MS = RATE_HZ // 1000
FRAME = FRAME_MS * SAMPLES_PER_MS


class State(enum.Enum):
    LISTENING = "listening"
    USER_SPEAKING = "user speaking"
    ENDPOINTING = "endpointing"
    THINKING = "thinking"
    SPEAKING = "speaking"
    OVERLAP = "overlap"
    INTERRUPTED = "interrupted"
    FALSE_INTERRUPTION = "false interruption"
    STOPPED_BY_WORD = "stopped by a word"
    RECOVERING = "recovering"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The state of a conversation."""

    state: State = State.LISTENING
    since: int = 0
    """Time at which this state was entered."""
    epoch: int = 0
    """Epoch of the present attempt, or of the next one if there is none."""
    is_answering: bool = False
    """Whether an attempt of this epoch was begun and is not over."""
    interruptible: bool = True
    """Whether the playing answer may be interrupted."""
    sounding_since: int = 0
    """Time at which the answer's sound began; in the future while frames are not read yet."""
    run: int = 0
    """Consecutive samples of voice up to now."""
    voice: int = 0
    """Samples of voice since the user began to speak over an answer, or pressed the button."""
    last_voice: int = 0
    """End of the last frame of voice that counts."""
    hangover: int = 0
    """Silence that ends this utterance."""
    opened: int = 0
    """Time at which this utterance's voice began."""
    missed: int = 0
    """Samples that this utterance lacks; an utterance with lost samples is not asked."""
    is_fresh: bool = True
    """Whether nothing was said since the conversation began."""


Step: TypeAlias = tuple[Loop, tuple[Action, ...]]

_SOUNDING = (State.SPEAKING, State.OVERLAP)
_PAUSED = (State.INTERRUPTED, State.FALSE_INTERRUPTION)
_USER_HAS_FLOOR = (State.USER_SPEAKING, State.ENDPOINTING, State.THINKING)  # after an interruption


def step(loop: Loop, event: Event, now: int, settings: LoopSettings) -> Step:
    """Handle one event. `now` never decreases from call to call."""
    if loop.state is State.STOPPED:
        return loop, ()
    if isinstance(event, Command):
        return _obey(loop, event, now, settings)
    if isinstance(event, HangoverChosen):
        if loop.state is State.ENDPOINTING:
            loop = replace(loop, hangover=event.ms * SAMPLES_PER_MS)
        return loop, ()
    if isinstance(event, HangoverShortened):
        return replace(loop, hangover=min(loop.hangover, event.ms * SAMPLES_PER_MS)), ()
    if isinstance(event, SoundMissed):
        return replace(loop, missed=loop.missed + event.samples, run=0), ()
    if isinstance(event, StopWordHeard):
        return _stop_by_word(loop, now, settings) if _is_stopped_by(loop, event) else (loop, ())
    if isinstance(event, Frame):
        return _hear(loop, event.voiced, now, settings)
    if event.epoch != loop.epoch or not loop.is_answering:
        return loop, ()
    if isinstance(event, SoundBegan):
        if loop.state is not State.THINKING:
            return loop, ()
        loop = replace(loop, interruptible=event.interruptible, sounding_since=now + event.behind)
        return _enter(loop, State.SPEAKING, now), ()
    if isinstance(event, AnswerFailed):
        return _fail(loop, now)
    return _end_answer(loop, now)


def _obey(loop: Loop, command: Command, now: int, settings: LoopSettings) -> Step:
    state = loop.state
    match command:
        case Command.STOP:
            after, actions = _void(loop)
            return _enter(after, State.STOPPED, now), actions
        case Command.LOSE if state is not State.RECOVERING:
            after, actions = _void(loop)
            return _enter(after, State.RECOVERING, now), (*actions, DropUtterance())
        case Command.RESTORE if state is State.RECOVERING:
            return _idle(loop, now)
        case Command.INTERRUPT if state in _SOUNDING or state in _PAUSED or state is State.THINKING:
            after, actions = _void(loop)
            after, more = _idle(after, now)
            return after, (*actions, DropUtterance(), *more)
        case Command.PRESS if settings.push_to_talk and state in (
            State.LISTENING,
            State.THINKING,
            *_SOUNDING,
            *_PAUSED,
        ):
            after, actions = _void(loop)
            return _open(after, now, now, settings, actions)
        case Command.RELEASE if settings.push_to_talk and state is State.USER_SPEAKING:
            return _release(loop, now)
    return loop, ()


def _hear(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """Handle a frame: first its meaning in this state, then the state's time limit."""
    loop = replace(loop, run=loop.run + FRAME if voiced else 0)
    hear = _PRESSED if settings.push_to_talk else _OPEN_MICROPHONE
    after, actions = hear[loop.state](loop, voiced, now, settings)
    if after.state is loop.state and not actions:
        return _time_out(after, now, settings)
    return after, actions


def _ignore(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    return loop, ()


def _hear_silence(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """LISTENING, THINKING: voice opens an utterance, or continues the one that is being
    answered."""
    if loop.run < _samples(settings.start_ms):
        return loop, ()
    if loop.state is State.LISTENING:
        return _open(loop, now - loop.run, now, settings, ())
    if now - loop.opened >= _samples(settings.max_utterance_ms):
        return loop, ()  # the question is full
    if now - loop.run - loop.last_voice >= _samples(settings.merge_ms):
        after, actions = _give_up(loop, now)
        return _open(after, now - loop.run, now, settings, actions)
    after, actions = _void(loop)  # nothing was heard of it: a longer utterance replaces it
    return _enter(replace(after, last_voice=now), State.USER_SPEAKING, now), actions


def _hear_user(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """USER_SPEAKING."""
    if voiced:
        loop = replace(loop, last_voice=now)
    if now - loop.opened >= _samples(settings.max_utterance_ms):
        return _begin(loop, now, now)
    if voiced:
        return loop, ()
    waiting = replace(loop, hangover=_samples(settings.hangover_ms))
    return _enter(waiting, State.ENDPOINTING, now), ()


def _hear_pause(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """ENDPOINTING: a short pause begins a speculative answer, a long one commits it."""
    if loop.run >= _samples(settings.resume_ms):
        after, actions = _void(loop)
        return _enter(replace(after, last_voice=now), State.USER_SPEAKING, now), actions
    if now - loop.opened >= _samples(settings.max_utterance_ms):
        return _begin(loop, _end(loop, settings), now)
    silence, speculate = now - loop.last_voice, _samples(settings.speculate_ms)
    if silence >= loop.hangover and silence >= speculate:
        return _begin(loop, _end(loop, settings), now)
    if silence - FRAME < speculate <= silence:
        judge = JudgePause(_end(loop, settings))
        if not settings.is_speculating:
            return loop, (judge,)
        if loop.missed:
            return loop, (judge,)
        begin = BeginAnswer(loop.epoch, _end(loop, settings))
        return replace(loop, is_answering=True), (begin, judge)
    return loop, ()


def _hear_over(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """SPEAKING: voice makes the answer quieter until it is known to be an interruption."""
    need_ms = settings.confirm_ms if _may_be_echo(loop, now, settings) else settings.duck_ms
    if not loop.interruptible or loop.run < _samples(need_ms):
        return loop, ()
    loop = replace(loop, voice=loop.run, opened=now - loop.run, last_voice=now, missed=0)
    return _enter(loop, State.OVERLAP, now), (SetGain(settings.duck_gain),)


def _hear_overlap(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """OVERLAP: enough voice stops the answer; a back-channel does not."""
    loop = _count_voice(loop, voiced, now)
    is_meant = voiced and not _may_be_echo(loop, now, settings)
    if is_meant and loop.voice >= _samples(settings.confirm_ms):
        actions = (PausePlayback(loop.epoch), SetGain(1.0), _opening(loop, settings))
        return _enter(loop, State.INTERRUPTED, now), actions
    if now - loop.last_voice >= _samples(settings.release_ms):
        return _enter(loop, State.SPEAKING, now), (SetGain(1.0),)
    return loop, ()


def _hear_interruption(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """INTERRUPTED, FALSE_INTERRUPTION: an utterance becomes a question; after a cough the answer
    resumes."""
    loop = _count_voice(loop, voiced, now)
    if loop.voice >= _samples(settings.turn_ms):
        after, actions = _void(loop)
        return _enter(after, State.USER_SPEAKING, now), actions
    silence = now - loop.last_voice
    if loop.state is State.INTERRUPTED and silence >= _samples(settings.release_ms):
        return _enter(loop, State.FALSE_INTERRUPTION, now), ()
    if loop.state is State.FALSE_INTERRUPTION and silence >= _samples(settings.resume_answer_ms):
        return _resume(loop, now)
    return loop, ()


def _is_stopped_by(loop: Loop, word: StopWordHeard) -> bool:
    """Whether the word was said over the present answer or began the present question. It was
    recognised too late if another answer has begun since."""
    if word.opened != loop.opened:
        return False
    is_over_answer = loop.state in (*_SOUNDING, *_PAUSED) and word.opened >= loop.sounding_since
    return is_over_answer or loop.state in _USER_HAS_FLOOR


def _stop_by_word(loop: Loop, now: int, settings: LoopSettings) -> Step:
    """End the answer, and drop a question that the stop word may have begun."""
    pause = (PausePlayback(loop.epoch), _opening(loop, settings)) if loop.state in _SOUNDING else ()
    after, actions = _void(loop)
    after = replace(after, voice=0, last_voice=now)
    return _enter(after, State.STOPPED_BY_WORD, now), (*pause, *actions)


def _hear_after_stop_word(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """STOPPED_BY_WORD: an utterance after the stop word becomes a question."""
    loop = _count_voice(loop, voiced, now)
    if loop.voice >= _samples(settings.turn_ms):
        return _enter(loop, State.USER_SPEAKING, now), ()
    if now - loop.last_voice >= _samples(settings.release_ms):
        return _with(DropUtterance(), _idle(loop, now))
    return loop, ()


_OPEN_MICROPHONE = {
    State.LISTENING: _hear_silence,
    State.USER_SPEAKING: _hear_user,
    State.ENDPOINTING: _hear_pause,
    State.THINKING: _hear_silence,
    State.SPEAKING: _hear_over,
    State.OVERLAP: _hear_overlap,
    State.INTERRUPTED: _hear_interruption,
    State.FALSE_INTERRUPTION: _hear_interruption,
    State.STOPPED_BY_WORD: _hear_after_stop_word,
    State.RECOVERING: _ignore,
}


def _hear_pressed(loop: Loop, voiced: bool, now: int, settings: LoopSettings) -> Step:
    """USER_SPEAKING with the button down: only the button ends it; with voice it is a question."""
    if not voiced or loop.run < _samples(settings.start_ms):
        return loop, ()
    opened = loop.opened if loop.voice else now - loop.run
    return replace(loop, voice=loop.voice + FRAME, opened=opened, last_voice=now), ()


_PRESSED = {**dict.fromkeys(_OPEN_MICROPHONE, _ignore), State.USER_SPEAKING: _hear_pressed}


def _time_out(loop: Loop, now: int, settings: LoopSettings) -> Step:
    """End a state at its time limit."""
    spent = now - loop.since
    match loop.state:
        case State.LISTENING:
            is_due = settings.forget_ms is not None and spent >= _samples(settings.forget_ms)
            if is_due and not loop.is_fresh:
                return replace(loop, is_fresh=True), (Reset(),)
        case State.USER_SPEAKING if spent >= _samples(settings.max_utterance_ms):
            return _release(loop, now)  # push-to-talk: the button is stuck
        case State.THINKING if spent >= _samples(settings.thinking_ms):
            after, actions = _give_up(loop, now)
            return _after((*actions, DropUtterance()), _idle(after, now))
        case State.SPEAKING if spent >= _samples(settings.speaking_ms):
            return _fail(loop, now)
        case State.OVERLAP if spent >= _samples(settings.overlap_ms):
            return _enter(loop, State.SPEAKING, now), (SetGain(1.0),)
        case State.INTERRUPTED if spent >= _samples(settings.overlap_ms):
            return _enter(loop, State.FALSE_INTERRUPTION, now), ()
        case State.FALSE_INTERRUPTION if spent >= _samples(
            settings.overlap_ms + settings.resume_answer_ms
        ):
            return _resume(loop, now)
        case State.STOPPED_BY_WORD if spent >= _samples(settings.overlap_ms):
            return _with(DropUtterance(), _idle(loop, now))
        case State.RECOVERING if spent >= _samples(settings.recovering_ms):
            return _enter(loop, State.STOPPED, now), ()
    return loop, ()


def _open(
    loop: Loop, start: int, now: int, settings: LoopSettings, before: tuple[Action, ...]
) -> Step:
    """Open an utterance that begins at `start`."""
    loop = replace(loop, opened=start, last_voice=now, voice=0, missed=0, is_fresh=False)
    return _enter(loop, State.USER_SPEAKING, now), (*before, _opening(loop, settings))


def _opening(loop: Loop, settings: LoopSettings) -> UserStartedSpeaking:
    return UserStartedSpeaking(max(loop.opened - _samples(settings.pre_roll_ms), 0))


def _begin(loop: Loop, end: int, now: int) -> Step:
    """The turn is over: answer it, unless a speculative answer was begun or samples are lost."""
    if loop.missed:
        after, actions = _void(loop)
        tell = TellOverload("sound lost", loop.missed)
        return _after((*actions, tell, DropUtterance()), _idle(after, now))
    begin = () if loop.is_answering else (BeginAnswer(loop.epoch, end),)
    loop = replace(loop, is_answering=True, interruptible=True)
    return _enter(loop, State.THINKING, now), (*begin, CommitAnswer(loop.epoch))


def _release(loop: Loop, now: int) -> Step:
    """Push-to-talk: the button is released, or was pressed for too long."""
    if loop.voice:
        return _begin(loop, now, now)
    return _with(DropUtterance(), _idle(loop, now))


def _end_answer(loop: Loop, now: int) -> Step:
    """All of the answer was heard."""
    finish = FinishAnswer(loop.epoch)
    if loop.state is State.THINKING or loop.state is State.SPEAKING:
        return _with(finish, _idle(_next_epoch(loop), now))
    if loop.state is State.OVERLAP:  # speech after the answer's end starts a new question
        opening = UserStartedSpeaking(max(loop.opened - FRAME, 0))
        after = _enter(_next_epoch(loop), State.USER_SPEAKING, now)
        return after, (finish, SetGain(1.0), opening)
    return loop, ()


def _fail(loop: Loop, now: int) -> Step:
    """The attempt has failed."""
    after, actions = _void(loop)
    if loop.state is State.ENDPOINTING or loop.state is State.USER_SPEAKING:
        return after, actions  # the answer was speculative; the utterance continues
    after, more = _idle(after, now)
    return after, (*actions, DropUtterance(), *more)


def _give_up(loop: Loop, now: int) -> Step:
    """THINKING: the answer comes too late."""
    after, actions = _void(loop)
    return after, (*actions, TellOverload("answer late", now - loop.last_voice))


def _void(loop: Loop) -> Step:
    """End the present attempt, heard or not; its late deliveries become void."""
    if not loop.is_answering:
        return loop, ()
    after = _next_epoch(loop)
    if loop.state is State.OVERLAP:
        return after, (InterruptAnswer(loop.epoch), SetGain(1.0))
    if loop.state is State.SPEAKING or loop.state in _PAUSED:
        return after, (InterruptAnswer(loop.epoch),)
    return after, (DiscardAnswer(loop.epoch),)


def _resume(loop: Loop, now: int) -> Step:
    return _enter(loop, State.SPEAKING, now), (DropUtterance(), ResumePlayback(loop.epoch))


def _idle(loop: Loop, now: int) -> Step:
    return _enter(loop, State.LISTENING, now), (Idle(),)


def _next_epoch(loop: Loop) -> Loop:
    return replace(loop, epoch=loop.epoch + 1, is_answering=False)


def _may_be_echo(loop: Loop, now: int, settings: LoopSettings) -> bool:
    """Whether the answer began so recently that the echo canceller may not have adapted."""
    return 0 <= now - loop.sounding_since <= _samples(settings.warm_up_ms)


def _count_voice(loop: Loop, voiced: bool, now: int) -> Loop:
    return replace(loop, voice=loop.voice + FRAME, last_voice=now) if voiced else loop


def _end(loop: Loop, settings: LoopSettings) -> int:
    """Return the end of the utterance, equal for a speculative answer and one begun at the end."""
    return loop.last_voice + _samples(settings.speculate_ms)


def _enter(loop: Loop, state: State, now: int) -> Loop:
    return replace(loop, state=state, since=now, run=0)


def _with(action: Action, result: Step) -> Step:
    return _after((action,), result)


def _after(actions: tuple[Action, ...], result: Step) -> Step:
    return result[0], (*actions, *result[1])


def _samples(ms: int) -> int:
    return ms * SAMPLES_PER_MS
