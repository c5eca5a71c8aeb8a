"""Sounds that are no kiosk questions, and questions as a room spoils them; all from a seed.

noise     white, pink, brown, hum, babble
hand      taps, knocks, whistles, coughs, hums of a voice
music     plucked, organ, bell and lead tones in a scale, with a beat
foreign   six languages by espeak-ng
english   sentences that no kiosk answers
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.training.tiny.voices import Voice, speak, training_voice

Array = NDArray[np.float64]
Make = Callable[[random.Random, np.random.Generator], Array]

# ruff: noqa: RUF001
FOREIGN = {
    "de": (
        "Guten Morgen, haben Sie gut geschlafen?",
        "Der Hund läuft durch den Garten.",
        "Ich suche meine Brille.",
        "Wie spät ist es jetzt?",
        "Am Wochenende fahren wir ans Meer.",
        "Das Essen war sehr lecker.",
    ),
    "fr-fr": (
        "Bonjour, comment allez-vous?",
        "Le chien court dans le jardin.",
        "Je cherche mes lunettes.",
        "Il est déjà très tard.",
        "Nous partons à la mer samedi.",
        "Le repas était délicieux.",
    ),
    "es": (
        "Buenas tardes, cómo está usted?",
        "El perro corre por el jardín.",
        "Estoy buscando mis gafas.",
        "La comida estaba muy buena.",
        "El sábado vamos a la playa.",
        "No sé qué hora es.",
    ),
    "it": (
        "Buonasera, come sta?",
        "Il cane corre nel giardino.",
        "Sto cercando i miei occhiali.",
        "Sabato andiamo al mare.",
        "Il pranzo era molto buono.",
        "Non so che ore sono.",
    ),
    "ru": (
        "Добрый вечер, как дела?",
        "Собака бежит по саду.",
        "Я ищу свои очки.",
        "В субботу мы едем на море.",
        "Обед был очень вкусный.",
        "Я не знаю, который час.",
    ),
    "cmn": (
        "早上好，你睡得好吗？",
        "狗在花园里跑。",
        "我在找我的眼镜。",
        "周末我们去海边。",
        "午饭很好吃。",
        "我不知道现在几点。",
    ),
}

ENGLISH = (
    """
the bread is still warm from the oven|how do you fold a paper plane|my sister plays the drums
please water the tomatoes|the lift is stuck between two floors|i would rather stay at home tonight
what is the tallest mountain on earth|the neighbours are moving to canada|give me a recipe for soup
the boat left the harbour before sunrise|can you sing a song for me|he lost the race by a second
who invented the telephone|the curtains do not match the carpet|turn the heating up a little
we planted an apple tree last spring|is there life on other planets|the meeting starts at nine
why do leaves change their colour|she wrote a letter to her aunt|the windows need cleaning again
play something quiet and slow|i have never seen the desert|the old clock stopped at midnight
how many legs does a spider have|the road is closed because of snow|remind me to buy a present
they built a bridge over the river|what did you do on your holiday|the milk has gone sour
translate good evening into french|my phone fell into the sink|the baker opens at five
do fish ever sleep|the thunder frightened the horses|order two bottles of lemonade
his handwriting is impossible to read|let me think about it for a while|the roof leaks when it rains
which planet is closest to the sun|the actor forgot his lines|dim the lamps in the kitchen
grandfather repairs old radios|i am not in the mood for jokes|the shop sells second hand books
what is your opinion about football|the puppy chewed my slippers|add salt and stir for a minute
nobody believed her story|how far away is the moon|the garden gate squeaks
""".strip()
    .replace("\n", "|")
    .split("|")
)


def other_sounds(num: int, seed: int) -> list[tuple[str, Array]]:
    """So many sounds of all kinds, each with its kind; PCM (N,) at 16 kHz, peak below 1."""
    rng, values = random.Random(seed), np.random.default_rng(seed)
    kinds = list(_MAKERS)
    made = []
    for i in range(num):
        kind = kinds[i % len(kinds)]
        pcm = _MAKERS[kind](rng, values)
        level = 10 ** rng.uniform(-1.2, -0.1)
        made.append((kind, pcm / max(float(np.abs(pcm).max()), 1e-9) * level))
    return made


def in_room(pcm: Array, rng: random.Random, values: np.random.Generator) -> Array:
    """A question with pink noise or babble at 8 to 25 dB, or through a telephone's band."""
    if rng.random() < 0.15:
        spectrum = np.fft.rfft(pcm)
        hz = np.arange(len(spectrum)) * RATE_HZ / len(pcm)
        return np.asarray(np.fft.irfft(spectrum * ((hz > 300) & (hz < 3400)), len(pcm)))
    noise = _coloured(len(pcm), rng.choice([0.0, 1.0]), values)
    level = np.sqrt(np.square(pcm).mean() / 10 ** (rng.uniform(8, 25) / 10))
    return np.asarray(pcm + noise * level)


def _seconds(rng: random.Random, low: float = 0.6, high: float = 5.0) -> int:
    return int(rng.uniform(low, high) * RATE_HZ)


def _coloured(num_samples: int, power: float, values: np.random.Generator) -> Array:
    """Noise whose power falls with this power of the frequency, of deviation 1."""
    spectrum = np.fft.rfft(values.standard_normal(num_samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** (power / 2)
    pcm = np.asarray(np.fft.irfft(spectrum, num_samples))
    return np.asarray(pcm / pcm.std())


def _noise(rng: random.Random, values: np.random.Generator) -> Array:
    return _coloured(_seconds(rng), rng.choice([0.0, 1.0, 2.0]), values)


def _hum(rng: random.Random, values: np.random.Generator) -> Array:
    t = np.arange(_seconds(rng)) / RATE_HZ
    hz = rng.choice([50, 60, 100, 120])
    tone = sum(np.sin(2 * np.pi * hz * k * t + k) / k**1.2 for k in range(1, 12))
    return np.asarray(tone + 0.05 * _coloured(len(t), 1, values))


def _bursts(
    rng: random.Random, values: np.random.Generator, count: int, length_s: float, decay_s: float
) -> Array:
    """Decaying noise bursts at random places."""
    pcm = np.zeros(_seconds(rng))
    for _ in range(count):
        size = int(length_s * RATE_HZ * rng.uniform(0.5, 1.5))
        at = rng.randrange(max(len(pcm) - size, 1))
        burst = values.standard_normal(size) * np.exp(-np.arange(size) / (decay_s * RATE_HZ))
        pcm[at : at + size] += burst[: len(pcm) - at] * rng.uniform(0.3, 1)
    return pcm


def _taps(rng: random.Random, values: np.random.Generator) -> Array:
    return _bursts(rng, values, rng.randint(2, 12), 0.06, rng.uniform(0.002, 0.02))


def _knocks(rng: random.Random, values: np.random.Generator) -> Array:
    """On wood or a wall: a few low tones that die away together, once or a few times. One alone is
    as short as the word "help"."""
    pcm = np.zeros(_seconds(rng, 0.5, 3))
    modes = [(rng.uniform(60, 700), rng.uniform(0.2, 1)) for _ in range(rng.randint(2, 5))]
    decay_s, click = rng.uniform(0.015, 0.12), rng.uniform(0, 0.5)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(pcm))
        t = np.arange(min(int(6 * decay_s * RATE_HZ), len(pcm) - at)) / RATE_HZ
        tone = sum(level * np.sin(2 * np.pi * hz * t) for hz, level in modes)
        noise = click * values.standard_normal(len(t)) * np.exp(-t / 0.004)
        pcm[at : at + len(t)] += rng.uniform(0.3, 1) * (tone * np.exp(-t / decay_s) + noise)
    return pcm + 0.003 * _coloured(len(pcm), 1, values)


def _cough(rng: random.Random, values: np.random.Generator) -> Array:
    formants = [(rng.uniform(400, 700), 40), (rng.uniform(1000, 1400), 40), (2600, 60)]
    n = np.arange(200)
    filters = sum(np.exp(-n / d) * np.cos(2 * np.pi * f / RATE_HZ * n) for f, d in formants)
    return np.asarray(
        np.convolve(_bursts(rng, values, rng.randint(1, 3), 0.3, 0.1), filters, "same")
    )


def _whistle(rng: random.Random, values: np.random.Generator) -> Array:
    n = _seconds(rng)
    t = np.arange(n) / RATE_HZ
    hz = np.interp(t, np.sort(values.uniform(0, n / RATE_HZ, 5)), values.uniform(700, 2600, 5))
    return np.asarray(np.sin(2 * np.pi * np.cumsum(hz) / RATE_HZ) + 0.02 * _coloured(n, 0, values))


def _music(rng: random.Random, values: np.random.Generator) -> Array:
    n, beat_s = _seconds(rng, 2, 6), rng.uniform(0.15, 0.5)
    pcm, fall, decay = np.zeros(n), rng.choice([1.0, 2.0, 3.0]), rng.uniform(1, 6)
    for beat in range(int(n / RATE_HZ / beat_s)):
        at = int(beat * beat_s * RATE_HZ)
        t = np.arange(min(int(2 * beat_s * RATE_HZ), n - at)) / RATE_HZ
        for note in rng.sample([0, 2, 4, 5, 7, 9, 11, 12], rng.randint(1, 3)):
            hz = 110 * 2 ** ((note + rng.choice([0, 12, 24])) / 12)
            tone = sum(np.sin(2 * np.pi * hz * k * t) / k**fall for k in range(1, 8))
            pcm[at : at + len(t)] += tone * np.exp(-decay * t)
    return pcm


def _spoken(text: str, voice: Voice) -> Array:
    return speak(text, voice, rate_hz=RATE_HZ).astype(np.float64) / 2**15


def _foreign(rng: random.Random, values: np.random.Generator) -> Array:
    language = rng.choice(list(FOREIGN))
    name = f"{language}+{rng.choice(['m1', 'm3', 'f2', 'f4', 'm7'])}"
    return _spoken(rng.choice(FOREIGN[language]), Voice(program="espeak-ng", name=name))


def _english(rng: random.Random, values: np.random.Generator) -> Array:
    return _spoken(rng.choice(ENGLISH), training_voice(rng))


def _babble(rng: random.Random, values: np.random.Generator) -> Array:
    pcm = np.zeros(_seconds(rng, 1.5, 5))
    for _ in range(5):
        pcm += np.resize(np.roll(_english(rng, values), rng.randrange(RATE_HZ)), len(pcm))
    return pcm


_MAKERS: dict[str, Make] = {
    "noise": _noise,
    "english": _english,
    "music": _music,
    "foreign": _foreign,
    "taps": _taps,
    "english again": _english,
    "cough": _cough,
    "babble": _babble,
    "hum": _hum,
    "foreign again": _foreign,
    "whistle": _whistle,
    "knocks": _knocks,
}
