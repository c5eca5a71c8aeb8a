"""Whether a question was understood, from what the bundle knows of its checkpoint's questions.

before prefill   the features' cues, where the bundle has a word head
before sound     else those and the entropy of the answer's first rows; its sound waits for them
refused          the bundle's spoken line, another WAV, or nothing sounds; no turn is remembered
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle import understanding as files
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.understanding import CueName, Score, entropy_cue, feature_cues
from deeptalk_edge.runtime.events import Transcript
from deeptalk_edge.sound.wav import read_wav

Array = NDArray[np.float32]

NO_HEAD = "the bundle has no word head"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderstandingSettings:
    """What becomes of a question that was not understood."""

    refuses: bool = True
    """Off: every question gets the model's answer."""
    least_p: float | None = None
    """Refuse below this probability; None takes the bundle's, which refuses 2 % of what would be
    answered right."""
    line: Path | Literal["bundle", "silence"] = "bundle"
    """What is said in the answer's place: the bundle's own line, no sound, or a mono WAV at the
    codec's rate."""

    def __post_init__(self) -> None:
        if self.least_p is not None and not 0 <= self.least_p <= 1:
            raise SettingsError(f"least_p = {self.least_p}: expected 0 to 1, or None")


@dataclass(slots=True)
class Judgement:
    """What is known of one question so far."""

    transcript: Transcript
    before_prefill: Score | None
    before_sound: Score | None
    complete: Score | None
    least_p: float | None
    cues: dict[CueName, float] = field(default_factory=dict)

    @property
    def understood_p(self) -> float | None:
        """By the best score whose cues are known; None if there is none yet."""
        for score in (self.before_sound, self.before_prefill):
            if score is not None and (p := score.p(self.cues)) is not None:
                return p
        return None

    @property
    def complete_p(self) -> float | None:
        """How likely the question is whole; None if the cues for that are not known."""
        return None if self.complete is None else self.complete.p(self.cues)

    @property
    def is_refused(self) -> bool:
        """Whether what is known says that it was not understood."""
        return any(
            score is not None
            and (p := score.p(self.cues)) is not None
            and p < (score.least_p if self.least_p is None else self.least_p)
            for score in (self.before_prefill, self.before_sound)
        )

    @property
    def waits_for_entropy(self) -> bool:
        """Whether sound has to wait until the answer's first rows are known."""
        return self.before_sound is not None and self.before_sound.p(self.cues) is None

    def add_entropy(self, mean_entropy: float) -> None:
        """Of the answer's first rows, in nats."""
        self.cues["entropy"] = entropy_cue(mean_entropy)


class Judge:
    """Judges the questions of one conversation."""

    def __init__(self, bundle: Bundle, settings: UnderstandingSettings) -> None:
        """Raises ArtifactError if the bundle's files are damaged, SettingsError or AudioError if
        the line cannot be used."""
        self._settings = settings
        self._known = files.read_understanding(bundle.path, bundle.manifest.model.decoder.width)
        self._paths = self._known.paths() if self._known else None
        self.line = self._read_line(bundle)
        """PCM (N,) at the codec's rate, said when a question is refused."""

    def of_features(self, features: Array) -> Judgement:
        """The first judgement of a spoken question with these features (n, C)."""
        known = self._known
        if known is None:
            transcript = Transcript(None, None, NO_HEAD)
            return Judgement(transcript, None, None, None, None)
        transcript, paths = Transcript(None, None, NO_HEAD), None
        if known.head is not None:
            log_p = known.head.log_p(features)
            spotted = known.head.spot(log_p)
            transcript = Transcript(spotted.text, spotted.confidence, None)
            paths = self._paths.scores(log_p) if self._paths else None
        distance = known.manifold.squared_distance(features) if known.manifold else None
        header, refuses = known.header, self._settings.refuses
        cues = feature_cues(distance, paths)
        early = header.before_prefill if refuses else None
        is_early = early is not None and early.p(cues) is not None
        return Judgement(
            transcript,
            early,
            None if is_early or not refuses else header.before_sound,
            header.complete,
            self._settings.least_p,
            cues,
        )

    def _read_line(self, bundle: Bundle) -> Array:
        line = self._settings.line
        if line == "silence":
            return np.empty(0, np.float32)
        path = bundle.path / files.LINE if line == "bundle" else Path(line)
        if line == "bundle" and not path.is_file():
            return np.empty(0, np.float32)
        sound, wanted_hz = read_wav(path), bundle.manifest.codec.spec.sampling_rate
        if sound.rate_hz != wanted_hz:
            raise SettingsError(f"{path}: {sound.rate_hz} Hz, expected the codec's {wanted_hz} Hz")
        return sound.pcm
