"""Compares the voice detectors on speech in noise.

Spoken questions with pauses between them, each louder or softer by up to 4 dB, play in a room of
-65 dBFS with synthetic noise: white, pink, mains hum with clicks, babble of eight voices. The level
of the clean speech is the truth; the noise level is relative to the mean power of the speech.

F1             F1 score of the frames
false starts   utterances opened without speech
missed turns   questions without an utterance that ends within half a second of their end
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import arguments, measured, spoken_questions
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import (
    GatedDetector,
    SileroDetector,
    silero_file,
    voice_spans,
)
from deeptalk_edge.runtime.audio.level import level_dbfs
from deeptalk_edge.runtime.audio.vad import FRAME_SAMPLES, VoiceDetector, WebRtcDetector
from deeptalk_edge.sound.wav import read_wav, resample

Array = NDArray[np.float32]
Span = tuple[int, int]

_VOICED_DBFS = -45.0
_ROOM_DBFS = -65.0
_SLACK_SAMPLES = RATE_HZ // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Clean speech and its places."""

    pcm: Array
    """PCM (N,), whole frames."""
    voiced: NDArray[np.bool_]
    """Mask (N / 320,) of the frames with speech."""
    turns: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score of one detector on one scene."""

    detector: str
    noise: str
    snr_db: int | None
    f1: float
    false_starts: int
    missed_turns: int
    num_turns: int


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("vad", __doc__)
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=spoken_questions(), help="spoken questions"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with measured(args) as figures:
        spoken = [resample(read_wav(path), RATE_HZ).pcm for path in args.wav]
        scene = make_scene(spoken, args.seed)
        detectors: dict[str, Callable[[], VoiceDetector]] = {
            "webrtc 2": lambda: WebRtcDetector(2),
            "webrtc 2, gated": lambda: GatedDetector(WebRtcDetector(2)),
        }
        if silero_file():
            detectors["silero"] = SileroDetector
            detectors["silero, gated"] = lambda: GatedDetector(SileroDetector())
        scores = [
            measure(name, make, scene, noise, snr_db, spoken, args.seed)
            for name, make in detectors.items()
            for noise, snr_db in conditions()
        ]
        print(_table(scores, scene))
        figures["scores"] = [asdict(s) for s in scores]
    return 0


def conditions() -> list[tuple[str, int | None]]:
    return [("clean", None)] + [(noise, snr) for noise in _NOISES for snr in (10, 0)]


def make_scene(questions: Sequence[Array], seed: int) -> Scene:
    """Put all questions into one recording."""
    rng = np.random.default_rng(seed)
    parts: list[Array] = []
    turns: list[Span] = []
    for question in questions:
        parts.append(np.zeros(int(rng.uniform(0.8, 1.8) * RATE_HZ), np.float32))
        spoken = np.flatnonzero(np.abs(question) > 10 ** (_VOICED_DBFS / 20))
        start = sum(map(len, parts))
        turns.append((start + int(spoken[0]), start + int(spoken[-1]) + 1))
        parts.append(question * np.float32(10 ** (rng.uniform(-4, 4) / 20)))
    parts.append(np.zeros(RATE_HZ, np.float32))
    pcm = np.concatenate(parts)
    pcm = pcm[: len(pcm) // FRAME_SAMPLES * FRAME_SAMPLES]
    voiced = np.array([level_dbfs(frame) > _VOICED_DBFS for frame in _frames(pcm)])
    return Scene(pcm=pcm, voiced=voiced, turns=turns)


def in_noise(
    scene: Scene, noise: str, snr_db: int | None, questions: Sequence[Array], seed: int
) -> Array:
    """Return the scene as recorded in this noise."""
    rng = np.random.default_rng(seed + 1)
    room = _unit(rng.standard_normal(len(scene.pcm))) * 10 ** (_ROOM_DBFS / 20)
    heard = scene.pcm + room
    if snr_db is not None:
        power = float(np.mean(_frames(scene.pcm)[scene.voiced] ** 2))
        gain = np.sqrt(power) * 10 ** (-snr_db / 20)
        heard = heard + gain * _unit(_NOISES[noise](len(heard), rng, questions))
    return heard.astype(np.float32)


def measure(
    name: str,
    make: Callable[[], VoiceDetector],
    scene: Scene,
    noise: str,
    snr_db: int | None,
    questions: Sequence[Array],
    seed: int,
) -> Score:
    """Run one detector over one scene."""
    heard = in_noise(scene, noise, snr_db, questions, seed)
    detector = make()
    voiced = np.array([detector.is_voiced(frame) for frame in _frames(heard)])
    spans = voice_spans(heard, make())
    false_starts = sum(
        all(start > turn[1] or end < turn[0] for turn in scene.turns) for start, end in spans
    )
    found = sum(
        any(abs(end - turn[1]) <= _SLACK_SAMPLES for _, end in spans) for turn in scene.turns
    )
    return Score(
        detector=name,
        noise=noise,
        snr_db=snr_db,
        f1=float(2 * (voiced & scene.voiced).sum() / (voiced.sum() + scene.voiced.sum())),
        false_starts=false_starts,
        missed_turns=len(scene.turns) - found,
        num_turns=len(scene.turns),
    )


def _white(n: int, rng: np.random.Generator, questions: Sequence[Array]) -> NDArray[np.float64]:
    return rng.standard_normal(n)


def _pink(n: int, rng: np.random.Generator, questions: Sequence[Array]) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(rng.standard_normal(n))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), n)


def _hum(n: int, rng: np.random.Generator, questions: Sequence[Array]) -> NDArray[np.float64]:
    """50 Hz with harmonics, and one click per second."""
    t = np.arange(n) / RATE_HZ
    hum = np.sum([np.sin(2 * np.pi * 50 * k * t + k) / k for k in range(1, 12)], axis=0)
    click = 6 * np.exp(-np.arange(160) / 30)
    for place in rng.integers(0, n - len(click), n // RATE_HZ):
        hum[place : place + len(click)] += click
    return np.asarray(hum)


def _babble(n: int, rng: np.random.Generator, questions: Sequence[Array]) -> NDArray[np.float64]:
    """Eight people ask at once, without pauses."""
    babble = np.zeros(n)
    for _ in range(8):
        order = rng.permutation(len(questions))
        said = np.concatenate([_unit(questions[i]) for i in order])
        babble += np.roll(np.resize(said, n), rng.integers(n))
    return babble


_NOISES = {"white": _white, "pink": _pink, "hum": _hum, "babble": _babble}


def _unit(pcm: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(pcm / np.sqrt(np.mean(pcm**2)), np.float64)


def _frames(pcm: Array) -> Array:
    return pcm.reshape(-1, FRAME_SAMPLES)


def _table(scores: Sequence[Score], scene: Scene) -> str:
    seconds = len(scene.pcm) / RATE_HZ
    always = 2 * scene.voiced.mean() / (1 + scene.voiced.mean())
    lines = [
        f"{len(scene.turns)} questions, {seconds:.0f} s; frame F1, false starts, missed turns "
        f"(a detector that is always on: {always:.3f})",
        "",
    ]
    detectors = list(dict.fromkeys(score.detector for score in scores))
    lines.append(f"{'':14}" + "".join(f"{name:>20}" for name in detectors))
    for noise, snr in conditions():
        cells = [
            f"{score.f1:.3f} {score.false_starts:3d} {score.missed_turns:3d}"
            for score in scores
            if (score.noise, score.snr_db) == (noise, snr)
        ]
        label = noise if snr is None else f"{noise} {snr} dB"
        lines.append(f"{label:14}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
