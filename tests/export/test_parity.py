"""The parity report: it passes what is equal, and names what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.golden import golden_inputs
from deeptalk_edge.export.parity import bundle_differences, check, difference
from deeptalk_edge.features import log_mel, num_frames
from deeptalk_edge.runtime.bundle import Bundle
from tests.export.checkpoints import Written, write_checkpoint
from tests.specs import SPECS

Array = NDArray[np.float32]
Reference = dict[str, Array]


@pytest.fixture(scope="module")
def bundle_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    directory = tmp_path_factory.mktemp("parity")
    written = write_checkpoint(directory / "checkpoint", SPECS["yarn"])
    export_bundle(written.place, directory / "bundle", ExportSettings())
    delay = Bundle.open(directory / "bundle").manifest.codec.delay_samples
    return directory / "bundle", _reference(written, delay)


def test_a_bundle_agrees_with_torch_on_every_output(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    differences = bundle_differences(*bundle_and_reference)
    assert {one.name for one in differences} == set(bundle_and_reference[1])
    check(differences)


def test_golden_npz_holds_what_torch_computes(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    place, reference = bundle_and_reference
    golden = np.load(place / "golden.npz")
    for name, expected in reference.items():
        np.testing.assert_allclose(golden[name], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["features", "text_logits", "code_logits", "sound"])
def test_a_bundle_that_differs_is_named(
    bundle_and_reference: tuple[Path, Reference], name: str
) -> None:
    place, reference = bundle_and_reference
    with pytest.raises(ParityError, match=f"{name}: .* exceeds"):
        check(bundle_differences(place, {**reference, name: reference[name] + 1e-3}))


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:-1], lambda x: np.full_like(x, np.nan), lambda x: x + np.inf],
    ids=["shape", "NaN", "infinite"],
)
def test_what_cannot_be_compared_differs_infinitely(spoil: Callable[[Array], Array]) -> None:
    found = difference("x", spoil(np.zeros(3, np.float32)), np.zeros(3, np.float32), 1.0)
    assert found.greatest == np.inf
    assert not found.is_within


def _reference(written: Written, delay: int) -> Reference:
    """The golden outputs, from torch."""
    model, spec = written.model, written.model.spec
    inputs = golden_inputs(spec)
    codes = torch.from_numpy(inputs.codes)
    with torch.inference_mode():
        mel = torch.from_numpy(log_mel(inputs.pcm, spec.encoder))
        features = model.encode(mel[None])[0, : num_frames(len(inputs.pcm))]
        rows = torch.from_numpy(np.concatenate([inputs.rows, inputs.next_row], axis=1))
        mask = torch.zeros(1, rows.shape[1], dtype=torch.bool)
        mask[0, : len(inputs.audio_mask)] = torch.from_numpy(inputs.audio_mask)
        spread = torch.zeros(1, rows.shape[1], spec.decoder.width)
        spread[mask] = features[: int(mask.sum())]
        hidden = model(rows, spread, mask)[0]
        sound = written.codec.decode(codes[None])[0]
        return {
            "features": features.numpy(),
            "hidden": hidden.numpy(),
            "text_logits": model.text_logits(hidden[-2:]).numpy(),
            "code_logits": model.code_logits(hidden[-2:]).numpy(),
            "sound": np.pad(sound.numpy(), (delay, 0))[: len(sound)],
        }
