"""`deeptalk-edge run --mic`: a conversation by voice, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.runtime.audio.ports import SoundPort
    from deeptalk_edge.runtime.audio.wav_port import WavPort
    from deeptalk_edge.runtime.commands.run_options import RunOptions
    from deeptalk_edge.runtime.conversation import Conversation
    from deeptalk_edge.runtime.events import LiveEvent, Setup, Transcript, TurnDone
    from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
    from deeptalk_edge.trace import Trace

log = logging.getLogger(__name__)

_QUIET_S = 0.5  # a recording is over when nothing has happened for this long after its end


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare the flags that `--mic` brings."""
    group.add_argument("--mic", action="store_true", help="talk through microphone and loudspeaker")
    group.add_argument(
        "--input-device",
        metavar="NAME",
        help="microphone, by name or a part of it; or a WAV file, played in real time",
    )
    group.add_argument(
        "--output-device", metavar="NAME", help="loudspeaker; or a WAV file to write"
    )
    group.add_argument(
        "--push-to-talk", action="store_true", help="Enter begins your turn, Enter ends it"
    )
    group.add_argument(
        "--no-echo-canceller",
        action="store_true",
        help="for a headset, or a device that cancels echo itself",
    )
    group.add_argument(
        "--no-speculation",
        action="store_true",
        help="begin no answer before the turn is certainly over",
    )
    group.add_argument(
        "--hangover",
        choices=("fixed", "adaptive"),
        default="adaptive",
        help="wait as long behind every pause, or less behind a finished sentence (default)",
    )
    group.add_argument(
        "--turn-model", type=Path, metavar="ONNX", help="end-of-turn model in Smart Turn's format"
    )
    group.add_argument(
        "--stop-word",
        action="append",
        default=[],
        metavar="WORD",
        help="who says it over an answer ends it at once; English; may be given several times",
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace, for chrome://tracing"
    )
    group.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="keep what is heard and played as WAV files, numbered if there are some already",
    )


def main(options: RunOptions, talk: Conversation) -> int:
    """Talk until Ctrl-C, or until a WAV file in place of the microphone is over.

    Raises DeviceLost if a device cannot be opened, EdgeError if something else that the user named
    cannot be used.
    """
    from deeptalk_edge.runtime.loop.recorder import Recorder
    from deeptalk_edge.runtime.loop.settings import LoopSettings
    from deeptalk_edge.trace import NO_TRACE, Trace

    settings = LoopSettings(
        is_speculating=not options.no_speculation,
        push_to_talk=options.push_to_talk,
        forget_ms=20 if options.forget else None,
        stop_words=options.stop_word,
    )
    trace = Trace() if options.trace else NO_TRACE
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(options.record)) if options.record else None
        port, recording = _open_port(options)
        stack.callback(port.close)
        live = talk.listen(port, settings, _hearing(options), recorder=recorder, trace=trace)
        if options.trace:
            stack.callback(_save_trace, trace, options.trace)
        stack.enter_context(live)
        if recording:
            live.run_beside("recording", partial(_stop_behind, recording, live))
        if options.push_to_talk:
            live.run_beside("keys", partial(_press_with_enter, live))
        show = _Printer(talk.setup, is_json=options.json)
        try:
            for event in live:
                show(event)
        finally:
            show.end_line()
    return 0


def is_wav_file(device: str | None) -> TypeGuard[str]:
    """Whether the name of a sound device is that of a WAV file."""
    return device is not None and device.lower().endswith(".wav")


def _save_trace(trace: Trace, place: Path) -> None:
    from deeptalk_edge.files import side_output

    with side_output(place):
        trace.save(place)


def _open_port(options: RunOptions) -> tuple[SoundPort, WavPort | None]:
    """The port, and once more if it is a recording, which ends."""
    from deeptalk_edge.errors import SettingsError

    names = options.input_device, options.output_device
    if not any(map(is_wav_file, names)):
        from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort

        return PyAudioPort(DeviceSettings(input_name=names[0], output_name=names[1])), None
    from deeptalk_edge.runtime.audio.wav_port import WavPort

    if not is_wav_file(names[0]):
        raise SettingsError("--output-device is a WAV file: --input-device must be one, too")
    recording = WavPort(Path(names[0]), Path(names[1]) if names[1] else None)
    return recording, recording


def _hearing(options: RunOptions) -> Hearing:
    from deeptalk_edge.runtime.audio.echo import EchoMode, open_canceller
    from deeptalk_edge.runtime.audio.end_of_turn import open_end_of_turn
    from deeptalk_edge.runtime.loop.live import Hearing

    mode: EchoMode = "none" if options.no_echo_canceller or options.push_to_talk else "software"
    return Hearing(
        canceller=open_canceller(mode),
        end_of_turn=None
        if options.hangover == "adaptive" and options.turn_model is None
        else open_end_of_turn(options.hangover, model=options.turn_model),
    )


def _stop_behind(recording: WavPort, live: LiveConversation) -> None:
    """Stop when the recording is over and all of it is answered."""
    idle_since_s: float | None = None
    while idle_since_s is None or time.monotonic() - idle_since_s < _QUIET_S:
        time.sleep(_QUIET_S / 10)
        if not (recording.is_over and live.is_idle):
            idle_since_s = None
        elif idle_since_s is None:
            idle_since_s = time.monotonic()
    live.stop()


def _press_with_enter(live: LiveConversation) -> None:
    print("Enter: speak, Enter: done", file=sys.stderr)
    for number, _ in enumerate(sys.stdin):
        (live.release if number % 2 else live.press)()


class _Printer:
    """Shows what happens: a line a turn, or one JSON object a turn."""

    def __init__(self, setup: Setup, *, is_json: bool) -> None:
        self._setup = setup
        self._is_json, self._num_turns = is_json, 0
        self._is_mid_line = False
        self._is_due = False  # an answer is due, and its line is not begun
        self._transcript: Transcript | None = None

    def end_line(self) -> None:
        """Nothing follows; an error's line begins at the left."""
        if self._is_mid_line:
            self._say("\n")

    def _say(self, text: str) -> None:
        """Print. A full disk at stdout does not stop the conversation; a closed pipe does."""
        from deeptalk_edge.files import silence_stdout

        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            log.warning("stdout: %s; the conversation goes on unwritten", error.strerror)
            silence_stdout()
        self._is_mid_line = not text.endswith("\n")

    def __call__(self, event: LiveEvent) -> None:
        from deeptalk_edge.runtime import events

        match event:
            case events.TurnDone():
                self._num_turns += 1
                self._done(event)
            case events.Transcript():
                self._transcript = event
                if event.text and not self._is_json:
                    self._say(f"you said: {event.text} ({event.confidence:.0%})\n")
            case events.TurnFailed(error) | events.SoundLost(error):
                print(f"deeptalk-edge: {error}", file=sys.stderr)
            case events.Overloaded(reason, seconds):
                print(
                    f"deeptalk-edge: too slow, a question is given up: {reason}, {seconds:.1f} s",
                    file=sys.stderr,
                )
            case _ if self._is_json:
                pass
            case events.SpeechEnded(seconds):
                self._say(f"you: {seconds:.1f} s of speech\n")
                self._is_due = True
            case events.NothingSaid():
                self._say("(nothing was said)\n")
            case events.TextPiece(text):
                self._begin_line()
                self._say(text)
            case events.NotUnderstood():
                self._begin_line()
                self._say("(not understood)")
            case events.Interrupted():
                self._say(" ... (interrupted)")
            case events.AnswerResumed():
                self._say(" ... (goes on) ")
            case events.SoundRestored():
                print("the sound devices are back", file=sys.stderr)

    def _begin_line(self) -> None:
        if self._is_due:
            self._say("deeptalk: ")
        self._is_due = False

    def _done(self, done: TurnDone) -> None:
        from deeptalk_edge.runtime.measure import record, transcript_record

        voice = done.voice
        assert voice is not None  # it was asked by voice
        if self._is_json:
            turn = {
                "turn": self._num_turns,
                **record(done, self._setup),
                **transcript_record(self._transcript),
            }
            self._say(json.dumps(turn) + "\n")
            return
        self._begin_line()
        if voice.audible_ms is None:
            self._say("\n  (nothing was heard)\n")
        else:
            self._say(
                f"\n  (heard {voice.audible_ms:.0f} ms behind your last word, of which "
                f"{voice.hangover_ms:.0f} ms were spent waiting for more)\n"
            )
