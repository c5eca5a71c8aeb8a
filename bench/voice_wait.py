"""How long a listener waits for an answer.

The wait runs from the last voiced sample of a question to the first audible one of its answer.
Recorded questions are played in real time to the whole loop, threads and all, with speculation on
and off and with a fixed and an adaptive hangover: the same questions each way, a few turns of each
in turn.

modelled   (default) a port in real time whose loudspeaker buffers 40 ms, exact to a sample
card       PyAudio on a virtual sound card, which is started for it (portaudio19-dev, pulseaudio,
           pulseaudio-utils, libasound2-plugins). Both ends are recorded at the card's monitors,
           each mapped to wall time by its own arrivals

The cutoff rate of a way is the share of pauses inside questions that it takes for the end of the
turn: two parts of each recording, judged and followed by pauses as `bench end_of_turn` draws them.

`--load N` lets N busy processes run beside. A question that is not answered as it was asked counts
as lost: unheard, given up (`Overloaded`), cut, or joined with another; so do questions that a lost
sound device takes with it.

The last voiced sample is the end of the last 20 ms of a recording within 30 dB of its loudest.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.end_of_turn import open_listener, recorded_pauses
from deeptalk_edge.bench.harness import BUNDLE, arguments, measured, spoken_questions
from deeptalk_edge.bench.turn_rules import Pause, Table, runtime_ms
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import open_detector
from deeptalk_edge.runtime.audio.echo import open_canceller
from deeptalk_edge.runtime.audio.end_of_turn import HangoverSettings, open_end_of_turn
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame, SoundPort
from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.events import (
    AudioChunk,
    LiveEvent,
    Overloaded,
    SoundLost,
    SoundRestored,
    TurnDone,
)
from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.sound.wav import read_wav, resample

Array = NDArray[np.float32]

_FRAME_S = FRAME_SAMPLES / RATE_HZ
_CARD_RATE_HZ = 48_000
_BEHIND_S = 0.3  # of an answer that is listened to before it is cut off
_PAUSE_S = 0.7  # between two turns
_UNSURE_MS = HangoverSettings().unsure_ms
_ANSWER_S = 25.0  # that a question may take to be answered, before it is lost
_VOICED = 0.01  # of full scale: where a recording's speech begins
_CUT_S = 0.7  # that an utterance may be shorter or longer than its question


Way = tuple[bool, Literal["adaptive", "fixed"]]
"""Whether it speculates, and how long it waits."""


class Room(Protocol):
    """Where questions are asked and answers are heard."""

    @property
    def port(self) -> SoundPort:
        """What the loop listens to and speaks through."""

    def close(self) -> None:
        """Nothing is played or heard any more."""

    def ask(self, pcm: Array) -> float:
        """Play 16 kHz PCM (N,) to the microphone; returns when it began, in seconds of `heard`."""

    def heard(self, behind_s: float) -> float | None:
        """When the first sound after that moment left the loudspeaker; None if none has yet."""


class ModelledRoom(VirtualPort):
    """A virtual port in real time: a frame comes when it is due."""

    def __init__(self) -> None:
        super().__init__(self._hear, on_played=self._note)
        self._question, self._asked = np.empty(0, np.float32), 0
        self._sounds: list[float] = []  # seconds at which blocks with sound were handed over
        self._due_s = time.perf_counter()

    @property
    def port(self) -> SoundPort:
        return self

    def read(self, timeout_s: float) -> MicFrame | None:
        wait_s = self._due_s - time.perf_counter()
        time.sleep(min(max(wait_s, 0.0), timeout_s))
        if wait_s > timeout_s:
            return None
        self._due_s += _FRAME_S
        return super().read(0.0)

    def ask(self, pcm: Array) -> float:
        self._asked = self._passed + FRAME_SAMPLES
        self._question = pcm
        return self._asked / RATE_HZ

    def heard(self, behind_s: float) -> float | None:
        delay_s = self._device_frames * _FRAME_S
        later = [s + delay_s for s in list(self._sounds) if s + delay_s > behind_s]
        return min(later, default=None)

    def _hear(self, start: int) -> Array:
        rng = np.random.default_rng(start)
        frame = rng.standard_normal(FRAME_SAMPLES).astype(np.float32) * np.float32(0.0005)
        place = start - self._asked
        piece = self._question[max(place, 0) : max(place + FRAME_SAMPLES, 0)]
        if place >= 0:
            frame[: len(piece)] += piece
        return frame

    def _note(self, block: Array) -> None:
        if block.any():
            first = int(np.flatnonzero(block)[0])
            self._sounds.append(self._passed / RATE_HZ + first / self.rate_hz)


class CardRoom:
    """The virtual sound card's air: `paplay` speaks, `parec` listens at both monitors."""

    def __init__(self) -> None:
        self.port = PyAudioPort(DeviceSettings(input_name="vmic", output_name="vspk"))
        self._air, self._speaker = Monitor("vair.monitor"), Monitor("vspk.monitor")

    def ask(self, pcm: Array) -> float:
        before_s = time.perf_counter()
        play = ["paplay", "--device=vair", "--latency-msec=20", "--raw", "--format=float32le"]
        player = subprocess.Popen(
            [*play, f"--rate={RATE_HZ}", "--channels=1"], stdin=subprocess.PIPE
        )
        assert player.stdin is not None
        with player.stdin as pipe:
            pipe.write(pcm.astype("<f4").tobytes())
        first = int(np.flatnonzero(np.abs(pcm) > 0.01)[0])
        began_s = None
        while began_s is None:
            time.sleep(0.02)
            began_s = self._air.first_sound(before_s)
        threading.Thread(target=player.wait, daemon=True).start()
        return began_s - first / RATE_HZ

    def heard(self, behind_s: float) -> float | None:
        return self._speaker.first_sound(behind_s)

    def close(self) -> None:
        """Before the card goes: who still listened then would say that the connection ended."""
        self.port.close()
        for monitor in (self._air, self._speaker):
            monitor.close()


class Monitor:
    """Records a monitor of the card; its samples are dated by the earliest arrival."""

    def __init__(self, device: str) -> None:
        command = ["parec", f"--device={device}", "--latency-msec=10", "--format=s16le"]
        self._recorder = subprocess.Popen(
            [*command, f"--rate={_CARD_RATE_HZ}", "--channels=1"], stdout=subprocess.PIPE
        )
        self._num_samples, self._offset_s = 0, float("inf")
        self._loud: list[tuple[int, int]] = []  # spans of samples that are not silence
        threading.Thread(target=self._record, daemon=True).start()

    def first_sound(self, behind_s: float) -> float | None:
        """When it began to sound, at or after that moment."""
        for first, last in list(self._loud):
            if last / _CARD_RATE_HZ + self._offset_s > behind_s:
                return max(first / _CARD_RATE_HZ + self._offset_s, behind_s)
        return None

    def last_sound(self) -> float | None:
        """When it last sounded."""
        return self._loud[-1][1] / _CARD_RATE_HZ + self._offset_s if self._loud else None

    def close(self) -> None:
        self._recorder.terminate()
        self._recorder.wait()

    def _record(self) -> None:
        assert self._recorder.stdout is not None
        while block := self._recorder.stdout.read1(9600):  # type: ignore[attr-defined]
            pcm = np.frombuffer(block[: len(block) // 2 * 2], "<i2")
            start, self._num_samples = self._num_samples, self._num_samples + len(pcm)
            arrived_s = time.perf_counter()
            self._offset_s = min(self._offset_s, arrived_s - self._num_samples / _CARD_RATE_HZ)
            loud = np.flatnonzero(np.abs(pcm) > 300)
            if not len(loud):
                continue
            first, last = start + int(loud[0]), start + int(loud[-1])
            # Sound with less than 200 ms of silence in it is one span.
            if self._loud and first - self._loud[-1][1] < _CARD_RATE_HZ // 5:
                first = self._loud.pop()[0]
            self._loud.append((first, last))


@dataclass(frozen=True, slots=True)
class Turn:
    """One wait in milliseconds. Detection, hangover, model and sound add up to it."""

    wait_ms: float
    detection_ms: float
    """From the last voiced sample to the end of the last frame that the detector took for voice,
    the microphone's own delay included."""
    hangover_ms: float
    """From there until the turn counted as over."""
    model_ms: float
    """From there to the first sample in the queue."""
    sound_ms: float
    """From there to the ear, the loudspeaker's delay included."""
    encoder_ms: float
    """This and the next three are compute, wherever it was spent."""
    prefill_ms: float
    first_frame_ms: float
    """The rows of the first codec frame."""
    first_sample_ms: float
    """The rows that the codec looks ahead, and the codec."""
    is_early: bool
    """The end-of-turn cue called the question complete before the longer wait was over."""


def last_voiced(pcm: Array) -> int:
    """The end of the last 20 ms that are within 30 dB of the loudest."""
    frames = pcm[: len(pcm) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    return int(np.flatnonzero(power > power.max() / 1000)[-1] + 1) * FRAME_SAMPLES


@contextmanager
def busy_processes(num: int) -> Iterator[None]:
    """So many processes compute in vain meanwhile."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(num)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    talk: Conversation, room: Room, questions: Iterator[Array], num_turns: int, way: Way
) -> list[Turn | None]:
    """A few turns, one way; None for a question that is lost."""
    is_speculating, hangover = way
    settings = LoopSettings(is_speculating=is_speculating, forget_ms=20)
    hearing = Hearing(
        detector=open_detector(),
        canceller=open_canceller("none"),
        end_of_turn=None if hangover == "adaptive" else open_end_of_turn(hangover),
    )
    turns: list[Turn | None] = []
    with talk.listen(room.port, settings, hearing) as live:
        events = Events(live)
        time.sleep(_PAUSE_S)
        while len(turns) < num_turns:
            pcm = next(questions)
            end_s = room.ask(pcm) + last_voiced(pcm) / RATE_HZ
            found = events.wait_for(AudioChunk, SoundLost, Overloaded)
            if isinstance(found, SoundLost):
                events.wait_for(SoundRestored)
            if not isinstance(found, AudioChunk):
                turns.append(None)
                continue
            time.sleep(_BEHIND_S)
            heard_s = room.heard(end_s)
            live.interrupt()
            done = events.wait_for(TurnDone)
            is_whole = done and abs(done.voice.speech_s - _speech_s(pcm)) < _CUT_S
            if heard_s is None or not is_whole:
                turns.append(None)
            else:
                turns.append(shares_of(1000 * (heard_s - end_s), done))
            time.sleep(_PAUSE_S)
    return turns


class Events:
    """A live conversation's events, taken as they come."""

    def __init__(self, live: LiveConversation) -> None:
        self._queue: queue.SimpleQueue[LiveEvent] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(live,), daemon=True).start()

    def wait_for(self, *kinds: type[Any]) -> Any:
        """The next event of these kinds; None if none comes in time."""
        end_s = time.monotonic() + _ANSWER_S
        while True:
            try:
                event = self._queue.get(timeout=max(end_s - time.monotonic(), 0.0))
            except queue.Empty:
                return None
            if isinstance(event, kinds):
                return event

    def _read(self, live: LiveConversation) -> None:
        for event in live:
            self._queue.put(event)


def _speech_s(pcm: Array) -> float:
    """From the first voiced sample to the last."""
    first = int(np.flatnonzero(np.abs(pcm) > _VOICED)[0])
    return (last_voiced(pcm) - first) / RATE_HZ


def shares_of(wait_ms: float, done: TurnDone) -> Turn:
    voice, metrics = done.voice, done.metrics
    assert voice is not None
    assert voice.queued_ms is not None
    assert voice.audible_ms is not None
    assert metrics.first_frame_ms is not None
    assert metrics.first_sample_ms is not None
    assert metrics.encoder_ms is not None
    # The loop counts from where its detector heard the end, which may be before the last voiced
    # sample; and a speculative answer may be there before the turn counts as over.
    detected_ms = wait_ms - voice.audible_ms
    over_ms, queued_ms = detected_ms + voice.hangover_ms, detected_ms + voice.queued_ms
    detection, hangover, model, sound = _stages([detected_ms, over_ms, queued_ms, wait_ms])
    prompt_ms = metrics.encoder_ms + metrics.prefill_ms
    ends = [metrics.encoder_ms, prompt_ms, metrics.first_frame_ms, metrics.first_sample_ms]
    encoder, prefill, first_frame, first_sample = _stages(ends)
    return Turn(
        wait_ms=wait_ms,
        detection_ms=detection,
        hangover_ms=hangover,
        model_ms=model,
        sound_ms=sound,
        encoder_ms=encoder,
        prefill_ms=prefill,
        first_frame_ms=first_frame,
        first_sample_ms=first_sample,
        is_early=voice.hangover_ms < _UNSURE_MS - FRAME_MS,
    )


def _stages(ends: Sequence[float]) -> list[float]:
    """How long each stage took, of those whose ends are given: one that ended before the one before
    it took no time, and all of them last until the last end."""
    stages, reached = [], 0.0
    for end in ends:
        stages.append(max(min(end, ends[-1]) - reached, 0.0))
        reached += stages[-1]
    return stages


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("voice_wait", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=spoken_questions(), help="spoken questions"
    )
    parser.add_argument("--load", type=int, default=0, help="busy processes beside")
    parser.add_argument("--turns", type=int, help="of each way; by default a turn a question")
    parser.add_argument("--port", choices=("modelled", "card"), default="modelled")
    args = parser.parse_args(argv)
    if args.port == "card" and "PULSE_SERVER" not in os.environ:
        return _on_a_card(sys.argv[1:] if argv is None else argv)
    with measured(args) as figures:
        recordings = [resample(read_wav(wav), RATE_HZ).pcm for wav in args.wav]
        num_turns = args.turns or len(recordings)
        bundle = Bundle.open(args.bundle)
        turns: dict[Way, list[Turn | None]] = {
            (speculation, hangover): []
            for speculation in (True, False)
            for hangover in ("adaptive", "fixed")
        }
        asked = {way: itertools.cycle(recordings) for way in turns}
        with (
            busy_processes(args.load),
            closing(CardRoom() if args.port == "card" else ModelledRoom()) as room,
            Conversation(bundle, ConversationSettings.of(bundle)) as talk,
        ):
            while any(len(done) < num_turns for done in turns.values()):
                for way, done in turns.items():
                    done += measure(talk, room, asked[way], min(6, num_turns - len(done)), way)
        with open_listener(bundle) as listener:
            pauses = list(recorded_pauses(listener, args.wav, random.Random(0)))
        figures.update(
            {
                _name(way): {**_figures(done), "cutoff rate, %": _cutoff_percent(pauses, way)}
                for way, done in turns.items()
            }
        )
        print(f"{args.port} sound, {num_turns} turns of each way; ms from the last voiced sample\n")
        for name, values in figures.items():
            print(name)
            print("".join(f"  {figure:32}{value:8.0f}\n" for figure, value in values.items()))
    return 0


def _cutoff_percent(pauses: Sequence[Pause], way: Way) -> float:
    """Of the pauses inside questions, those that this way takes for the end."""
    is_speculating, kind = way
    hangovers_ms = runtime_ms(pauses, kind=kind, speculates=is_speculating)
    return 100 * Table.of(pauses).cost(hangovers_ms).cutoff_share


def _name(way: Way) -> str:
    is_speculating, hangover = way
    return f"{'speculation' if is_speculating else 'no speculation'}, {hangover} hangover"


def _figures(asked: list[Turn | None]) -> dict[str, float]:
    """Percentiles of the wait, means of its shares (they add up), medians of the compute."""
    turns = [turn for turn in asked if turn is not None]
    lost = {"questions lost": float(len(asked) - len(turns))}
    if not turns:
        return lost
    waits = [turn.wait_ms for turn in turns]
    shares = {
        "  detection": [turn.detection_ms for turn in turns],
        "  hangover": [turn.hangover_ms for turn in turns],
        "  model, after that": [turn.model_ms for turn in turns],
        "  loudspeaker": [turn.sound_ms for turn in turns],
    }
    compute = {
        "encoder": [turn.encoder_ms for turn in turns],
        "prefill": [turn.prefill_ms for turn in turns],
        "first frame": [turn.first_frame_ms for turn in turns],
        "first sample": [turn.first_sample_ms for turn in turns],
    }
    return {
        "to the first audible sample, p50": float(np.percentile(waits, 50)),
        "to the first audible sample, p95": float(np.percentile(waits, 95)),
        "to the first audible sample, mean": statistics.mean(waits),
        **{name: statistics.mean(values) for name, values in shares.items()},
        **{f"compute: {name}": statistics.median(values) for name, values in compute.items()},
        "questions called complete": sum(turn.is_early for turn in turns),
        **lost,
    }


def _on_a_card(flags: list[str]) -> int:
    """Run the same bench in a process that has its own sound card."""
    ours = [sys.executable, "-m", "deeptalk_edge.bench", "voice_wait", *flags]
    card = ["tests/runtime/sound_card/virtual_card.sh", "exec", *ours]
    environment = {**os.environ, "CARD_MAX_S": "900"}
    return subprocess.run(card, env=environment, check=False).returncode
