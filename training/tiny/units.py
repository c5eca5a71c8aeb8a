"""The answer voice as a box of prompts, as in station announcements.

unit     a carrier phrase or a slot word, spoken once, padded to whole codec frames, encoded alone
answer   the codes of its units end to end

A unit always has the same codes, so a combination never spoken before has exact targets too. With
whole recorded sentences the audio heads learn a thousand answers by heart and ignore the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import write_file
from deeptalk_edge.progress import progress
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.domain import FIXED, GREETING, PLACES, TENS, answers
from deeptalk_edge.training.tiny.tokens import Tokeniser
from deeptalk_edge.training.tiny.voices import (
    ANSWER_VOICE,
    Pcm,
    Voice,
    need_synthesisers,
    phones_of,
    speak,
)

UNIT_VOICE = Voice(program="flite", name=ANSWER_VOICE.name, rate=1.05)
MARGIN_MS = 20
MAX_LEAD_SAMPLES = 600

CARRIERS = (
    "calling room",
    "tickets to",
    "ticket to",
    "that will be",
    "the next train to",
    "leaves at",
    "from platform",
    "is on the",
    "floor turn",
    "opens at",
    "for platform",
    "go up the stairs and turn",
    "go down the stairs and turn",
    "is open until",
    "is closed today",
    GREETING,
    "yes the",
    "no the",
    TENS[100],
    *FIXED.values(),
    *(f"is {where}" for where in PLACES.values()),
    *PLACES,
)
_CARRIERS_BY_WORDS = sorted({tuple(phrase.split()) for phrase in CARRIERS}, key=len, reverse=True)


@dataclass(frozen=True, slots=True)
class Unit:
    """One prompt."""

    codes: npt.NDArray[np.int64]
    """(T, 7), in the codec's column order."""

    word_frames: tuple[int, ...]
    """The frame in which each word's sound begins; no two words share one."""

    pcm: Pcm
    """(T * 2048,) samples at 24 kHz: the sound of the codes."""


class UnitVoice:
    """Every unit of the answer voice; speaks any string of known words."""

    def __init__(self, units: dict[str, Unit]) -> None:
        self._units = units

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, name: str) -> Unit:
        return self._units[name]

    @property
    def names(self) -> list[str]:
        return sorted(self._units)

    def answer_codes(self, text: str) -> tuple[npt.NDArray[np.int64], list[int]]:
        """The codes (T, 7) of a text, and the frame in which each of its words begins.

        Raises KeyError for a word that the voice has no unit for.
        """
        units = [self._units[name] for name in split_into_units(text)]
        word_frames, start = [], 0
        for unit in units:
            word_frames += [start + frame for frame in unit.word_frames]
            start += len(unit.codes)
        return np.concatenate([unit.codes for unit in units]), word_frames

    def answer_pcm(self, text: str) -> Pcm:
        """The units' recordings end to end: what decoding `answer_codes` should sound like."""
        return np.concatenate([self._units[name].pcm for name in split_into_units(text)])

    def save(self, path: Path) -> None:
        """Write all units, whole or not at all."""
        arrays = {}
        for name, unit in self._units.items():
            arrays[f"{name}/codes"] = unit.codes.astype(np.int16)
            arrays[f"{name}/word_frames"] = np.array(unit.word_frames, np.int16)
            arrays[f"{name}/pcm"] = unit.pcm
        archive = BytesIO()
        np.savez_compressed(archive, **arrays)  # type: ignore[arg-type]
        write_file(path, archive.getvalue())

    @classmethod
    def load(cls, path: Path) -> UnitVoice:
        """Read what `save` wrote.

        Raises ArtifactError if it is missing or damaged.
        """
        try:
            with np.load(path) as arrays:
                names = sorted({key.rpartition("/")[0] for key in arrays.files})
                return cls(
                    {
                        name: Unit(
                            codes=arrays[f"{name}/codes"].astype(np.int64),
                            word_frames=tuple(arrays[f"{name}/word_frames"].tolist()),
                            pcm=arrays[f"{name}/pcm"],
                        )
                        for name in names
                    }
                )
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ArtifactError(f"{path}: not a unit voice ({error}); build it again") from error


def split_into_units(text: str) -> list[str]:
    """Cut a text into units, the longest carrier first; what is left are single words."""
    words, units = text.split(), []
    while words:
        longest = next((c for c in _CARRIERS_BY_WORDS if tuple(words[: len(c)]) == c), (words[0],))
        units.append(" ".join(longest))
        words = words[len(longest) :]
    return units


def unit_names(texts: Iterable[str]) -> list[str]:
    """Every unit that the texts need, and every word of them alone, for words in random order."""
    return sorted({name for text in texts for name in (*split_into_units(text), *text.split())})


def build_units(tokeniser: Tokeniser) -> UnitVoice:
    """Speak and encode the units of all answers.

    Raises SettingsError if flite is missing.
    """
    need_synthesisers()
    names = progress(unit_names(answers()), name="units", unit="unit")
    return UnitVoice({name: _speak_unit(name, tokeniser) for name in names})


def _speak_unit(name: str, tokeniser: Tokeniser) -> Unit:
    spec = tokeniser.spec
    speech = speak(name, UNIT_VOICE, rate_hz=spec.sampling_rate, margin_ms=MARGIN_MS)
    pcm = _pad_to_frames(speech, spec.frame_samples)
    silence = np.zeros(spec.frame_samples, np.int16)
    codes = tokeniser.codes(as_samples(np.concatenate([silence, pcm, silence]))).numpy()[1:-1]
    return Unit(
        codes, share_frames([len(phones_of(word)) for word in name.split()], len(codes)), pcm
    )


def _pad_to_frames(pcm: Pcm, frame_samples: int) -> Pcm:
    missing = -len(pcm) % frame_samples
    lead = min(missing // 2, MAX_LEAD_SAMPLES)
    return np.pad(pcm, (lead, missing - lead))


def share_frames(num_phones: list[int], num_frames: int) -> tuple[int, ...]:
    """The first frame of each word: frames are shared out by phones, no two words begin in one."""
    starts: list[int] = []
    for word in range(len(num_phones)):
        share = sum(num_phones[:word]) * num_frames // sum(num_phones)
        starts.append(max(share, starts[-1] + 1) if starts else share)
    assert starts[-1] < num_frames, "a unit has more words than frames"
    return tuple(starts)
