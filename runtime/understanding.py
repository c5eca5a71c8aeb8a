"""Whether a question was understood, from what the bundle knows of its checkpoint's questions.

before prefill   the features' cues, where the bundle has a word head
before sound     where those leave a doubt, or without a head: the same and the entropy of the
                 answer's first rows; its sound waits for them
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
from deeptalk_edge.model.understanding import SURE_P, CueName, Score, entropy_cue, feature_cues
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


ANSWER_ALL = UnderstandingSettings(refuses=False)


@dataclass(slots=True)
class Judgement:
    """What is known of one question so far."""

    transcript: Transcript
    header: files.Header
    settings: UnderstandingSettings
    cues: dict[CueName, float] = field(default_factory=dict)

    @property
    def understood_p(self) -> float | None:
        """By the features, or else with the first rows; None if the cues for both are not known."""
        early = self._p(self.header.before_prefill)
        return self.right_p if early is None else early

    @property
    def right_p(self) -> float | None:
        """How likely the answer is right; None if the cues for that are not known."""
        return self._p(self.header.before_sound)

    @property
    def whole_p(self) -> float | None:
        """How likely the speaker has finished; None if the cues for that are not known."""
        return self._p(self.header.complete)

    @property
    def is_whole(self) -> bool | None:
        """Whether that is likely enough; None likewise."""
        score, p = self.header.complete, self.whole_p
        return None if score is None or p is None else p >= score.least_p

    @property
    def is_refused(self) -> bool:
        """Whether what is known says that it was not understood."""
        early, late = self.header.before_prefill, self.header.before_sound
        return self._is_below(early) or (self._is_doubtful and self._is_below(late))

    @property
    def waits_for_entropy(self) -> bool:
        """Whether sound has to wait until the answer's first rows are known."""
        late = self.header.before_sound
        return self._is_doubtful and late is not None and self._p(late) is None

    def add_entropy(self, mean_entropy: float) -> None:
        """Of the answer's first rows, in nats."""
        self.cues["entropy"] = entropy_cue(mean_entropy)

    @property
    def _is_doubtful(self) -> bool:
        """Whether the features alone do not suffice."""
        early = self._p(self.header.before_prefill)
        return self.settings.refuses and (early is None or early < SURE_P)

    def _is_below(self, score: Score | None) -> bool:
        p, least_p = self._p(score), self.settings.least_p
        if score is None or p is None or not self.settings.refuses:
            return False
        return p < (score.least_p if least_p is None else least_p)

    def _p(self, score: Score | None) -> float | None:
        return None if score is None else score.p(self.cues)


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

    @property
    def knows_whole(self) -> bool:
        """Whether it can tell a whole question from a part of one."""
        known = self._known
        return known is not None and known.header.complete is not None and self._paths is not None

    def of_features(self, features: Array) -> Judgement:
        """The first judgement of a spoken question with these features (n, C)."""
        known = self._known
        transcript, paths = Transcript(None, None, NO_HEAD), None
        if known is None:
            return Judgement(transcript, files.Header(), self._settings)
        if known.head is not None:
            log_p = known.head.log_p(features)
            spotted = known.head.spot(log_p)
            transcript = Transcript(spotted.text, spotted.confidence, None)
            paths = self._paths.scores(log_p) if self._paths else None
        distance = known.manifold.squared_distance(features) if known.manifold else None
        return Judgement(transcript, known.header, self._settings, feature_cues(distance, paths))

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
