"""Synthetic noises of a shop or a station hall: (kind, seed, seconds) -> 16 kHz PCM.

steady     fan, rain, music
events     tap, paper, tray, keys, cough, laugh, door: one every four seconds on average
speech     tv: sentence after sentence from a small loudspeaker; second_voice: one side of another
           conversation. espeak-ng and flite speak both, in voices that training never has

numpy makes all of them, nothing is recorded. The same seed makes the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.level import loud_dbfs
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.voices import Voice, held_out_voice, speak

Array = NDArray[np.float32]
_Wave = NDArray[np.float64]
_Random = np.random.Generator

NOISE_DBFS = -20.0
"""Level of the loudest 200 ms of a noise from `make_noise`."""

_EVENTS_PER_S = 0.25
_SENTENCES = (
    "The bridge will stay closed until the end of October.",
    "Researchers counted more than two hundred kinds of moths.",
    "He has lived above the bakery since he was nine.",
    "Voters in three counties go to the polls on Sunday.",
    "You should taste the soup before you add any salt.",
    "A cold front moves in from the north tonight.",
    "My neighbour bought a very old piano at an auction.",
    "The goalkeeper had no chance with the second one.",
    "We painted the kitchen yellow and then white again.",
    "Prices for copper fell for the third week in a row.",
    "I told her that the garden needs more shade.",
    "The orchestra begins its tour in a small village church.",
    "Nobody knew who had left the window open.",
    "Wheat and barley ripened early after the dry spring.",
    "They argued about the map for half an hour.",
    "The minister denied that any letter was ever sent.",
    "Their youngest plays the trumpet, mostly at night.",
    "Engineers expect the tunnel to be finished in May.",
    "She laughed so much that she dropped the tray.",
    "The film tells the story of two lighthouse keepers.",
)


def make_noise(kind: str, seed: int, seconds: float) -> Array:
    """Return noise of this kind, (N,), with its loudest 200 ms at `NOISE_DBFS`; samples may exceed
    1.

    Raises SettingsError or AudioError if a kind of speech has no synthesiser installed.
    """
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    noise = np.asarray(KINDS[kind](round(seconds * RATE_HZ), rng), np.float32)
    gain_db = NOISE_DBFS - loud_dbfs(noise)
    return noise * np.float32(10 ** (gain_db / 20))


# Steady -------------------------------------------------------------------------------------------


def _fan(n: int, rng: _Random) -> _Wave:
    """Air noise, and the tone of the blades with a slow beat."""
    t = _time(n)
    blades_hz = rng.uniform(80, 140)
    tone = sum(np.sin(2 * np.pi * blades_hz * k * t + k) / k for k in range(1, 6))
    beat = 1 + 0.15 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * t)
    return np.asarray(beat * (_shaped_noise(n, rng, 60, 900) + 0.25 * tone))


def _rain(n: int, rng: _Random) -> _Wave:
    """A hiss and forty drops per second."""
    drops = _events(n, rng, 40, _drop)
    return _shaped_noise(n, rng, 800, 7500) + 2.0 * drops


def _drop(rng: _Random) -> _Wave:
    return rng.uniform(0.2, 1) * _burst(rng, decay_ms=3, lowest_hz=1500, highest_hz=6000)


def _music(n: int, rng: _Random) -> _Wave:
    """Chords over a bass and a drum, at 80 to 130 beats a minute."""
    beat = int(RATE_HZ * 60 / rng.uniform(80, 130))
    root_hz = 110 * 2 ** (rng.integers(0, 12) / 12)
    music = np.zeros(n + 4 * beat)
    for number, start in enumerate(range(0, n, beat)):
        if number % 4 == 0:
            step = rng.choice([0, 5, 7, 9])
            chord = [step, step + (3 if step == 9 else 4), step + 7]
            _add(music, start, sum((_note(root_hz, k + 12, 4 * beat) for k in chord), np.zeros(1)))
        _add(music, start, 1.5 * _note(root_hz, step, beat))
        _add(music, start, 0.8 * _note(root_hz, 24 + rng.choice(chord), beat))
        _add(
            music, start, _burst(rng, decay_ms=40, lowest_hz=60, highest_hz=(200, 6000)[number % 2])
        )
    return music[:n]


def _note(root_hz: float, semitones: int, num_samples: int) -> _Wave:
    t = _time(num_samples)
    hz = root_hz * 2 ** (semitones / 12)
    tone = sum(np.sin(2 * np.pi * hz * k * t) / k**1.5 for k in range(1, 7) if hz * k < 7000)
    return np.asarray(tone * np.exp(-3 * t) * np.minimum(t / 0.01, 1))


# Events -------------------------------------------------------------------------------------------


def _tap(rng: _Random) -> _Wave:
    """Fingers on the counter."""
    return _hits(
        rng,
        num=(1, 5),
        apart_ms=(90, 250),
        make=lambda: _burst(rng, decay_ms=rng.uniform(5, 20), lowest_hz=150, highest_hz=1500),
    )


def _paper(rng: _Random) -> _Wave:
    """A sheet that is folded or torn: short bursts of hiss."""
    n = int(rng.uniform(0.3, 1.5) * RATE_HZ)
    crackle = np.repeat(rng.exponential(1.0, n // 80 + 1) ** 2, 80)[:n]
    return crackle * _shaped_noise(n, rng, 1500, 7500) * np.hanning(n)


def _tray(rng: _Random) -> _Wave:
    """Dishes on metal."""
    return _hits(
        rng,
        num=(2, 7),
        apart_ms=(40, 300),
        make=lambda: _ring(rng, num_partials=9, hz=(700, 6000), decay_ms=(60, 300)),
    )


def _keys(rng: _Random) -> _Wave:
    """A shaken bunch of keys."""
    return _hits(
        rng,
        num=(8, 25),
        apart_ms=(15, 90),
        make=lambda: _ring(rng, num_partials=4, hz=(3500, 7600), decay_ms=(10, 50)),
    )


def _cough(rng: _Random) -> _Wave:
    """One to three coughs, each a shaped burst of noise."""
    return _hits(rng, num=(1, 4), apart_ms=(280, 500), make=lambda: _cough_once(rng))


def _cough_once(rng: _Random) -> _Wave:
    n = int(rng.uniform(0.18, 0.38) * RATE_HZ)
    voice = _formants(_pulses(n, rng.uniform(90, 180) * np.ones(n)), (600, 1200, 2500))
    breath = _formants(rng.standard_normal(n), (600, 1300, 2700))
    return (_unit(breath) + 0.4 * _unit(voice)) * _decay(n, rng.uniform(60, 110))


def _laugh(rng: _Random) -> _Wave:
    """Four to nine times "ha", each a little lower."""
    pitch_hz = rng.uniform(140, 330)
    return _hits(
        rng,
        num=(4, 10),
        apart_ms=(150, 230),
        make=lambda: _ha(rng, pitch_hz * rng.uniform(0.85, 1.1)),
    )


def _ha(rng: _Random, pitch_hz: float) -> _Wave:
    n = int(rng.uniform(0.09, 0.15) * RATE_HZ)
    vowel = _formants(_pulses(n, np.linspace(pitch_hz, 0.85 * pitch_hz, n)), (750, 1250, 2600))
    breath = _formants(rng.standard_normal(n), (900, 1500, 2900))
    return np.hanning(n) * (_unit(vowel) + 0.3 * _unit(breath))


def _door(rng: _Random) -> _Wave:
    """A door falls shut, then its latch."""
    slam = 3 * _burst(rng, decay_ms=rng.uniform(60, 140), lowest_hz=40, highest_hz=400)
    _add(slam, int(0.06 * RATE_HZ), _burst(rng, decay_ms=6, lowest_hz=1000, highest_hz=5000))
    return slam


# Speech -------------------------------------------------------------------------------------------


def _tv(n: int, rng: _Random) -> _Wave:
    """News without pauses, from a small loudspeaker at the other end of a room."""
    spoken = _speech(n, rng, pause_s=(0.1, 0.5))
    echo = rng.standard_normal(RATE_HZ // 3) * _decay(RATE_HZ // 3, 70)
    echo[0] = 6.0
    size = 1 << (n + len(echo)).bit_length()
    return _band(
        np.fft.irfft(np.fft.rfft(spoken, size) * np.fft.rfft(echo, size), size)[:n], 250, 4500
    )


def _second_voice(n: int, rng: _Random) -> _Wave:
    """Another person who talks to a third one, with pauses to listen."""
    return _speech(n, rng, pause_s=(0.8, 4.0))


def _speech(n: int, rng: _Random, *, pause_s: tuple[float, float]) -> _Wave:
    """One voice."""
    voice: Voice = held_out_voice(random.Random(int(rng.integers(2**32))))
    spoken = np.zeros(n)
    start = int(rng.uniform(*pause_s) * RATE_HZ)
    while start < n:
        sentence = as_samples(speak(str(rng.choice(_SENTENCES)), voice, rate_hz=RATE_HZ))
        _add(spoken, start, sentence.astype(np.float64))
        start += len(sentence) + int(rng.uniform(*pause_s) * RATE_HZ)
    return spoken


# Building blocks ----------------------------------------------------------------------------


def _scattered(make: Callable[[_Random], _Wave]) -> Callable[[int, _Random], _Wave]:
    return lambda n, rng: _events(n, rng, _EVENTS_PER_S, make)


def _events(n: int, rng: _Random, per_s: float, make: Callable[[_Random], _Wave]) -> _Wave:
    """Put events at random places, at least one; events at the end are cut."""
    out = np.zeros(n)
    for start in rng.integers(0, n, max(round(per_s * n / RATE_HZ), 1)):
        _add(out, int(start), make(rng))
    return out


def _hits(
    rng: _Random, *, num: tuple[int, int], apart_ms: tuple[float, float], make: Callable[[], _Wave]
) -> _Wave:
    """Put some hits in a row, each louder or softer than the last one."""
    starts = np.cumsum(rng.uniform(*apart_ms, rng.integers(*num))) * RATE_HZ / 1000
    out = np.zeros(int(starts[-1]) + RATE_HZ)
    for start in starts:
        _add(out, int(start - starts[0]), rng.uniform(0.4, 1) * make())
    return out


def _add(out: _Wave, start: int, sound: _Wave) -> None:
    """Mix `sound` in at `start`; a part that does not fit is cut."""
    end = min(start + len(sound), len(out))
    out[start:end] += sound[: end - start]


def _burst(rng: _Random, *, decay_ms: float, lowest_hz: float, highest_hz: float) -> _Wave:
    n = int(8 * decay_ms * RATE_HZ / 1000)
    return _shaped_noise(n, rng, lowest_hz, highest_hz) * _decay(n, decay_ms)


def _ring(
    rng: _Random, *, num_partials: int, hz: tuple[float, float], decay_ms: tuple[float, float]
) -> _Wave:
    """Struck metal: partials without simple ratios."""
    n = int(5 * decay_ms[1] * RATE_HZ / 1000)
    t = _time(n)
    partials = [
        rng.uniform(0.3, 1)
        * np.sin(2 * np.pi * rng.uniform(*hz) * t)
        * _decay(n, rng.uniform(*decay_ms))
        for _ in range(num_partials)
    ]
    return np.asarray(np.sum(partials, axis=0))


def _pulses(n: int, pitch_hz: _Wave) -> _Wave:
    """Glottal pulses, (N,), at a pitch (N,)."""
    phase = np.cumsum(pitch_hz) / RATE_HZ
    return np.diff(np.floor(phase), prepend=0.0)


def _formants(source: _Wave, centres_hz: tuple[float, ...]) -> _Wave:
    """Apply a vowel's resonances, each at least 120 Hz wide."""
    spectrum, hz = np.fft.rfft(source), np.fft.rfftfreq(len(source), 1 / RATE_HZ)
    gains = sum(1 / (1 + ((hz - centre) / (60 + 0.05 * centre)) ** 2) for centre in centres_hz)
    return np.fft.irfft(spectrum * gains, len(source))


def _shaped_noise(n: int, rng: _Random, lowest_hz: float, highest_hz: float) -> _Wave:
    """Band noise with a mean power of 1."""
    return _unit(_band(rng.standard_normal(n), lowest_hz, highest_hz))


def _band(wave: _Wave, lowest_hz: float, highest_hz: float) -> _Wave:
    """Filter to a band with slopes of 12 dB per octave."""
    spectrum, hz = np.fft.rfft(wave), np.fft.rfftfreq(len(wave), 1 / RATE_HZ)
    hz[0] = hz[1] if len(hz) > 1 else 1.0
    return np.fft.irfft(
        spectrum / (1 + (lowest_hz / hz) ** 2) / (1 + (hz / highest_hz) ** 2), len(wave)
    )


def _unit(wave: _Wave) -> _Wave:
    """Scale to a mean power of 1."""
    return np.asarray(wave / np.sqrt(np.mean(wave**2)))


def _decay(n: int, ms: float) -> _Wave:
    return np.exp(-_time(n) * 1000 / ms)


def _time(n: int) -> _Wave:
    """Seconds, (N,)."""
    return np.arange(n) / RATE_HZ


KINDS: dict[str, Callable[[int, _Random], _Wave]] = {
    "tap": _scattered(_tap),
    "fan": _fan,
    "paper": _scattered(_paper),
    "tray": _scattered(_tray),
    "keys": _scattered(_keys),
    "cough": _scattered(_cough),
    "laugh": _scattered(_laugh),
    "tv": _tv,
    "second_voice": _second_voice,
    "music": _music,
    "door": _scattered(_door),
    "rain": _rain,
}
"""Makers of each kind of noise: from a number of samples N and a generator to (N,)."""

SPOKEN = ("tv", "second_voice")
"""Kinds that need espeak-ng and flite."""
