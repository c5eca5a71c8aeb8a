"""Voices to synthesise with: espeak-ng and flite, called as programs.

training   75 espeak variants in 5 accents, flite kal, kal16, slt, rms; pitch, rate, tape at random
held out   flite awb, and espeak accents and variants that training never has
answers    flite rms: of Debian's voices the one that recognisers read best
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import soxr

from deeptalk_edge.errors import AudioError, SettingsError

Pcm = npt.NDArray[np.int16]

TRAINING_ACCENTS = ("en-us", "en-gb", "en-029", "en-gb-x-rp", "en-gb-x-gbcwmd")
# fmt: off
TRAINING_VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m8", "f1", "f2", "f3", "adam", "Alex", "Alicia", "Andrea",
    "Andy", "Annie", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "Denis",
    "Diogo", "ed", "edward", "Gene", "Gene2", "gustave", "Henrique", "Hugo", "iven",
    "iven2", "iven3", "iven4", "Jacky", "john", "kaukovalta", "Lee", "linda", "marcelo", "Marco",
    "Mario", "max", "Michael", "michel", "miguel", "Mike", "Nguyen", "norbert", "pablo", "paul",
    "pedro", "quincy", "RicishayMax", "RicishayMax2", "RicishayMax3", "rob", "robert", "sandro",
    "shelby", "steph", "steph2", "steph3", "Storm", "travis", "Tweaky", "victor", "zac", "anika",
    "grandma", "grandpa", "klatt2", "klatt4", "klatt5",
)
# fmt: on
TRAINING_FLITE = ("kal", "kal16", "slt", "rms")
HELD_OUT_ACCENTS = ("en-gb-scotland", "en-gb-x-gbclan", "en-us-nyc")
HELD_OUT_VARIANTS = ("m6", "m7", "f4", "f5")
HELD_OUT_FLITE = ("awb",)

DEBIAN_PACKAGES = {"espeak-ng": "espeak-ng", "flite": "flite"}
SILENCE_LEVEL = 0.01
PEAK_LEVEL = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """One synthesiser with all that it is told about how to speak."""

    program: Literal["espeak-ng", "flite"]
    name: str
    rate: float = 1.0
    """Speaking rate; 1 is the voice's own."""

    pitch: int = 50
    """espeak-ng only: 0 to 99."""

    f0_hz: int | None = None
    """flite only: the mean pitch; None is the voice's own."""

    tape_speed: float = 1.0
    """Played faster or slower, as a tape is: shifts pitch and formants into another speaker's."""


ANSWER_VOICE = Voice(program="flite", name="rms")


def training_voice(rng: random.Random) -> Voice:
    """Draw a voice that training may hear."""
    if rng.random() < 0.5:
        return Voice(
            program="espeak-ng",
            name=f"{rng.choice(TRAINING_ACCENTS)}+{rng.choice(TRAINING_VARIANTS)}",
            rate=round(rng.uniform(0.71, 1.06), 3),
            pitch=rng.randint(20, 80),
            tape_speed=round(rng.uniform(0.88, 1.14), 2),
        )
    return Voice(
        program="flite",
        name=rng.choice(TRAINING_FLITE),
        rate=round(rng.uniform(0.8, 1.18), 3),
        f0_hz=rng.randint(70, 200),
        tape_speed=round(rng.uniform(0.84, 1.2), 2),
    )


def held_out_voice(rng: random.Random) -> Voice:
    """Draw a voice that training must not hear."""
    if rng.random() < 0.5:
        return Voice(
            program="espeak-ng",
            name=f"{rng.choice(HELD_OUT_ACCENTS)}+{rng.choice(HELD_OUT_VARIANTS)}",
            rate=round(rng.uniform(0.69, 1.09), 3),
            pitch=rng.randint(25, 75),
        )
    return Voice(
        program="flite",
        name=rng.choice(HELD_OUT_FLITE),
        rate=round(rng.uniform(0.87, 1.18), 3),
    )


def need_synthesisers() -> None:
    """Check that the programs are here.

    Raises SettingsError, naming the Debian packages, if one is not.
    """
    missing = [package for program, package in DEBIAN_PACKAGES.items() if not shutil.which(program)]
    if missing:
        packages = " ".join(missing)
        raise SettingsError(
            f"no speech synthesiser found for {packages}; install it: apt install {packages}"
        )


def speak(text: str, voice: Voice, *, rate_hz: int, margin_ms: int = 60) -> Pcm:
    """Say `text` at a fixed peak level, with at most `margin_ms` of silence on both sides.

    Raises AudioError if the synthesiser fails or says nothing.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "speech.wav"
        _call(_command(text, voice, path), text)
        samples, recorded_hz = _read_wav(path)
    samples = soxr.resample(samples, recorded_hz * voice.tape_speed, rate_hz)
    loud = np.flatnonzero(np.abs(samples) > SILENCE_LEVEL)
    if not loud.size:
        raise AudioError(f"{voice.program} {voice.name} says nothing for {text!r}")
    margin = margin_ms * rate_hz // 1000
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    level = PEAK_LEVEL * 32767 / np.abs(samples).max()
    return np.asarray(np.round(samples * level), np.int16)


def phones_of(word: str) -> list[str]:
    """The phones of a word on its own, as flite's American dictionary has them."""
    command = ["flite", "-voice", ANSWER_VOICE.name, "-ps", "-t", word, "-o", "/dev/null"]
    return [phone for phone in _call(command, word).split() if phone != "pau"]


def _command(text: str, voice: Voice, path: Path) -> list[str]:
    if voice.program == "flite":
        how = ["-voice", voice.name, "--setf", f"duration_stretch={1 / voice.rate:.3f}"]
        if voice.f0_hz is not None:
            how += ["--setf", f"int_f0_target_mean={voice.f0_hz}"]
        return ["flite", *how, "-t", text, "-o", str(path)]
    words_per_minute = round(175 * voice.rate)
    how = ["-v", voice.name, "-s", str(words_per_minute), "-p", str(voice.pitch)]
    return ["espeak-ng", *how, "-w", str(path), text]


def _call(command: list[str], text: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AudioError(f"{command[0]} failed on {text!r}: {done.stderr.strip()}")
    return done.stdout


def _read_wav(path: Path) -> tuple[npt.NDArray[np.float32], int]:
    with wave.open(str(path)) as recording:
        pcm = np.frombuffer(recording.readframes(recording.getnframes()), dtype=np.int16)
        return np.asarray(pcm, np.float32) / np.float32(32768), recording.getframerate()
