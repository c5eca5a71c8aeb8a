"""One small calibration of the tiny checkpoint that the tests here share: never write to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.bundle.manifest import Origin
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.calibrate import CalibrateSettings, Findings, calibrate
from deeptalk_edge.calibration.corpus import Corpus, read_corpus
from deeptalk_edge.calibration.observe import Observation, observe
from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.checkpoint.expert_split import read_audio_experts
from deeptalk_edge.checkpoint.hashes import FileHashes
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle

TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"


@dataclass(frozen=True, slots=True)
class Workshop:
    """The tiny checkpoint, its float bundle, and a pass over eight of its questions."""

    place: Path
    checkpoint: Checkpoint
    origin: Origin
    audio: list[list[int]]
    reference: Bundle
    corpus: Corpus
    seen: Observation

    def calibrated(self, place: Path, settings: CalibrateSettings, form: ExpertForm) -> Findings:
        """A table at `place`."""
        place.mkdir()
        return calibrate(
            self.checkpoint,
            self.origin,
            self.audio,
            self.reference,
            self.corpus,
            load_profile("cpu-int8"),
            dict.fromkeys(self.checkpoint.spec.decoder.moe_layers, form),
            place,
            settings,
            seen=self.seen,
        )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    place = tmp_path_factory.mktemp("calibration")
    checkpoint = Checkpoint.open(TINY)
    export_bundle(TINY, place / "float", ExportSettings())
    reference = Bundle.open(place / "float")
    corpus = read_corpus([TINY / "questions"], most=4)
    (place / "tokens").mkdir()
    return Workshop(
        place=place,
        checkpoint=checkpoint,
        origin=Origin(name="tiny", sha256=FileHashes().of_weights(TINY)),
        audio=read_audio_experts(read_config(TINY)),
        reference=reference,
        corpus=corpus,
        seen=observe(reference, corpus.measured, place / "tokens", most_tokens=600, max_rows=48),
    )
