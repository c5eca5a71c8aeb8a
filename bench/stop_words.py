"""Measures how well the spotter finds stop words over our own voice, after the echo canceller.

Voices that training never has say "stop", "cancel" and "help" 4 s into answers of the bundle. The
echo is 9 dB below the played sound and 60 ms late; the word's loudest 200 ms are as loud as the
echo's. As in the loop, the spotter gets sound from 300 ms before the voice's start to 1 s after it.

alone       the word in a quiet room, the ideal output of a canceller
cancelled   word and echo after WebRTC's AEC3
raised      the same with the word's loudest 200 ms at -20 dBFS, the spotter's expected level
false       the onsets of each kind of noise, over an answer and cancelled; and every second of the
            answers without a word. `noise_hour --stop-words` counts the loop's reactions in an hour

A word counts as heard if the spotter finds it within 600 ms of its end. The bench needs espeak-ng,
flite, and the extras `echo` and `stop-words`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import BUNDLE, arguments, measured, spoken_questions
from deeptalk_edge.bench.noise import KINDS, make_noise
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.echo import WebRtcEchoCanceller
from deeptalk_edge.runtime.audio.level import loud_dbfs
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, PLAY_RATE_HZ
from deeptalk_edge.runtime.audio.stop_words import SphinxSpotter, WordSpotter
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.events import AudioChunk
from deeptalk_edge.sound.rates import StreamResampler
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.voices import held_out_voice, need_synthesisers, speak

Array = NDArray[np.float32]

_WORDS = ("stop", "cancel", "help")
_WAYS = ("alone", "cancelled", "raised")
_ECHO_DB, _ECHO_SAMPLES = -9.0, 60 * RATE_HZ // 1000
_ROOM_DBFS, _SPOTTER_DBFS = -65.0, -20.0
_WORD_AT = 4 * RATE_HZ
_BEFORE, _LISTENED = 3 * RATE_HZ // 10, RATE_HZ  # pre-roll, and the sound after it
_SOON = 6 * RATE_HZ // 10
_LATE = 8 * RATE_HZ // 1000  # delay of AEC3
_SOUNDING = 0.02  # level of a noise's onset, after 200 ms below it
_NOISE_S, _PIECES = 60, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """One sound over an answer as the spotter gets it: (N,) from 300 ms before its start."""

    alone: Array
    cancelled: Array
    num_samples: int
    """Samples of the sound."""

    @property
    def loss_db(self) -> float:
        """Attenuation of the sound by the canceller."""
        return loud_dbfs(self.alone[_BEFORE : _BEFORE + self.num_samples]) - self._left_dbfs

    @property
    def raised(self) -> Array:
        """The cancelled sound at the spotter's expected level."""
        return self.cancelled * np.float32(10 ** ((_SPOTTER_DBFS - self._left_dbfs) / 20))

    @property
    def _left_dbfs(self) -> float:
        start = _BEFORE + _LATE
        return loud_dbfs(self.cancelled[start : start + self.num_samples])


def over_answer(sound: Array, answer: Array, rng: np.random.Generator) -> Take:
    """Mix a sound (N,) at 16 kHz with an answer of 6 s or more, as loud as its echo."""
    echo = np.pad(answer, (_ECHO_SAMPLES, 0))[: len(answer)] * np.float32(10 ** (_ECHO_DB / 20))
    gain_db = loud_dbfs(echo) - loud_dbfs(sound)
    near = rng.standard_normal(len(answer), np.float32) * np.float32(10 ** (_ROOM_DBFS / 20))
    near[_WORD_AT : _WORD_AT + len(sound)] += sound * np.float32(10 ** (gain_db / 20))
    heard = slice(_WORD_AT - _BEFORE, _WORD_AT + _LISTENED)
    cancelled = cancel(near + echo, answer)
    return Take(alone=near[heard], cancelled=cancelled[heard], num_samples=len(sound))


def cancel(microphone: Array, played: Array) -> Array:
    """Return AEC3's output for the microphone, (N,) in whole frames."""
    canceller = WebRtcEchoCanceller()
    starts = range(0, len(microphone) - FRAME_SAMPLES + 1, FRAME_SAMPLES)
    frames = [
        canceller.process(microphone[i : i + FRAME_SAMPLES], played[i : i + FRAME_SAMPLES])
        for i in starts
    ]
    return np.concatenate(frames)


def heard_at(spotter: WordSpotter, pcm: Array) -> int | None:
    """Return the sample of (N,) at which a word was found, or None."""
    spotter.begin()
    for start in range(0, len(pcm) - FRAME_SAMPLES + 1, FRAME_SAMPLES):
        if spotter.hears(pcm[start : start + FRAME_SAMPLES]):
            return start + FRAME_SAMPLES
    return None


def is_in_time(spotter: WordSpotter, take: Take, pcm: Array) -> bool:
    moment = heard_at(spotter, pcm)
    return moment is not None and moment <= _BEFORE + take.num_samples + _SOON


def beginnings(noise: Array) -> list[Array]:
    """Return a second of noise from each onset; of steady noise, from some places."""
    frames = np.abs(noise[: len(noise) // FRAME_SAMPLES * FRAME_SAMPLES]).reshape(-1, FRAME_SAMPLES)
    is_loud = frames.max(axis=1) > _SOUNDING
    places = [
        i * FRAME_SAMPLES
        for i in range(10, len(is_loud) - 50)
        if is_loud[i] and not is_loud[i - 10 : i].any()
    ]
    places = places or list(range(0, len(noise) - RATE_HZ, 5 * RATE_HZ))
    return [noise[place : place + RATE_HZ] for place in places[:_PIECES]]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("stop_words", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--voices", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5], help="per phone"
    )
    args = parser.parse_args(argv)
    need_synthesisers()
    with measured(args) as figures:
        answers = _answers(args.bundle)
        rng, voice_rng = np.random.default_rng(args.seed), random.Random(args.seed)
        voices = [held_out_voice(voice_rng) for _ in range(args.voices)]
        said = {
            word: [
                over_answer(
                    as_samples(speak(word, voice, rate_hz=RATE_HZ)), _some(answers, number), rng
                )
                for number, voice in enumerate(voices)
            ]
            for word in _WORDS
        }
        noises = {
            kind: [
                over_answer(piece, _some(answers, number), rng)
                for number, piece in enumerate(beginnings(make_noise(kind, args.seed, _NOISE_S)))
            ]
            for kind in KINDS
        }
        echoes = _echoes(answers, rng)
        losses = [take.loss_db for takes in said.values() for take in takes]
        figures["loss_db"] = [float(np.percentile(losses, p)) for p in (10, 50, 90)]
        figures["spotters"] = [
            _figures(threshold, said, noises, echoes) for threshold in args.thresholds
        ]
        print(_table(figures, args.voices, noises, echoes))
    return 0


def _answers(path: Path) -> list[Array]:
    """Return the bundle's answers to the shipped questions, at 16 kHz."""
    bundle = Bundle.open(path)
    answers = []
    with Conversation(bundle, ConversationSettings.of(bundle)) as talk:
        for wav in spoken_questions():
            events = list(talk.ask(resample(read_wav(wav), RATE_HZ).pcm))
            pcm = np.concatenate([event.pcm for event in events if isinstance(event, AudioChunk)])
            answers.append(StreamResampler(PLAY_RATE_HZ, RATE_HZ).push(pcm))
            talk.reset()
    return answers


def _some(answers: Sequence[Array], number: int) -> Array:
    """Return 6 s of consecutive answers, beginning with another answer for each number."""
    turned = [answers[(3 * number + i) % len(answers)] for i in range(4)]
    return np.resize(np.concatenate(turned), 6 * RATE_HZ)


def _echoes(answers: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """Return the canceller's output for the answers alone, in pieces of 1.3 s."""
    played = np.concatenate(answers)
    echo = np.pad(played, (_ECHO_SAMPLES, 0))[: len(played)] * np.float32(10 ** (_ECHO_DB / 20))
    room = rng.standard_normal(len(played), np.float32) * np.float32(10 ** (_ROOM_DBFS / 20))
    left = cancel(echo + room, played)
    size = _BEFORE + _LISTENED
    return [left[start : start + size] for start in range(0, len(left) - size, RATE_HZ)]


def _figures(
    threshold: float,
    said: dict[str, list[Take]],
    noises: dict[str, list[Take]],
    echoes: list[Array],
) -> dict[str, Any]:
    spotter = SphinxSpotter(_WORDS, threshold_per_phone=threshold)
    return {
        "threshold": threshold,
        **{
            way: {
                word: sum(is_in_time(spotter, take, getattr(take, way)) for take in takes)
                for word, takes in said.items()
            }
            for way in _WAYS
        },
        "noise": {
            kind: sum(heard_at(spotter, take.cancelled) is not None for take in takes)
            for kind, takes in noises.items()
        },
        "answers": sum(heard_at(spotter, echo) is not None for echo in echoes),
    }


def _table(
    figures: dict[str, Any], num_voices: int, noises: dict[str, list[Take]], echoes: list[Array]
) -> str:
    low, middle, high = figures["loss_db"]
    num_pieces = sum(map(len, noises.values()))
    lines = [
        f"the canceller takes {middle:.1f} dB of a word in the median ({low:.1f} to {high:.1f} for "
        "80 % of them)",
        "",
        f"{num_voices} voices of each word: heard alone, cancelled, raised; false: of {num_pieces} "
        f"beginnings of noise, of {len(echoes)} pieces of answers",
        "",
        f"{'per phone':>10}"
        + "".join(f"{word:>12}" for word in _WORDS)
        + f"{'noise':>8}{'answers':>9}",
    ]
    for row in figures["spotters"]:
        cells = [" ".join(str(row[way][word]) for way in _WAYS) for word in _WORDS]
        lines.append(
            f"{row['threshold']:>10.0e}"
            + "".join(f"{cell:>12}" for cell in cells)
            + f"{sum(row['noise'].values()):>8}{row['answers']:>9}"
        )
        lines.append(" " * 14 + ", ".join(f"{k} {n}" for k, n in row["noise"].items() if n))
    return "\n".join(lines)
