"""A model with an untied head, no shared experts, and normalised weights in spite of a scale is
exported for every backend, and each bundle's graphs and kernels pass parity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.dry_run.forecast import plan_export
from deeptalk_edge.model.spec import ModelSpec
from tests.export.checkpoints import write_checkpoint
from tests.specs import PLAIN

ODD = replace(
    PLAIN,
    decoder=replace(
        PLAIN.decoder,
        width=64,
        expert_ffn_width=64,
        normalise_top_k=True,
        routed_scale=2.5,
        num_shared_experts=0,
    ),
    tied_head=False,
)
PROFILES = [
    load_profile("cpu"),
    load_profile("cpu-int8"),
    load_profile("agx-orin-64gb").with_precision(["experts=int8"]),  # engines come on the device
]
every_backend = pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.backend)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: never write to it."""
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "checkpoint", ODD).place


@every_backend
def test_an_odd_model_is_exported_for_every_backend(
    checkpoint: Path, profile: DeviceProfile, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(profile=profile))
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    assert bundle.manifest.model == ODD
    assert {"embedding.bin", "head.bin"} <= bundle.manifest.files.keys()
    assert ("head.bin" in bundle.manifest.spare_files) is (profile.backend == "cpu")
    codec = read_codec_spec(checkpoint / "snac")
    plan = plan_export(read_model_spec(checkpoint), codec, profile)
    planned = {file.name: file for file in plan.files}
    for name in ("embedding.bin", "head.bin", "native.bin"):
        if name in bundle.manifest.files:
            assert planned[name].is_exact
            assert planned[name].bytes == bundle.file(name).stat().st_size


@every_backend
def test_a_head_that_is_replaced_by_the_embedding_fails_parity(
    checkpoint: Path, profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity check detects the wrong table."""

    def tied(spec: ModelSpec) -> str:
        return "embedding.bin"

    for module in ("graphs.decoder", "verify.run_step"):
        monkeypatch.setattr(f"deeptalk_edge.export.{module}.head_file", tied)
    with pytest.raises(ParityError, match="logits"):
        export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(profile=profile))
