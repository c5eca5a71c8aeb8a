"""The manifest is written and read by one definition; the checksum finds plausible damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST, read_manifest, write_manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from tests.manifests import edit_manifest


@pytest.fixture
def place(sweep_bundle: Path, tmp_path: Path) -> Path:
    """A directory with a manifest to damage."""
    (tmp_path / MANIFEST).write_text((sweep_bundle / MANIFEST).read_text())
    return tmp_path


def test_a_written_file_reads_back_equal(place: Path, tmp_path: Path) -> None:
    manifest = read_manifest(place / MANIFEST)
    (tmp_path / "again").mkdir()
    write_manifest(manifest, tmp_path / "again")
    assert read_manifest(tmp_path / "again" / MANIFEST) == manifest


def test_a_manifest_that_would_be_refused_is_not_written(place: Path, tmp_path: Path) -> None:
    manifest = read_manifest(place / MANIFEST)
    wrong = replace(manifest, generation=replace(manifest.generation, max_rows=0))
    with pytest.raises(ArtifactError, match=r"cannot be written: generation\.max_rows = 0"):
        write_manifest(wrong, tmp_path / "absent")


def test_a_plausible_change_is_found_by_the_checksum(place: Path) -> None:
    text = (place / MANIFEST).read_text()
    (place / MANIFEST).write_text(text.replace("Be brief.", "Be crief."))
    with pytest.raises(ArtifactError, match=r"checksum = .*damaged or edited"):
        read_manifest(place / MANIFEST)


def test_other_json_formatting_is_accepted_and_older_bundles_have_no_checksum(place: Path) -> None:
    content = json.loads((place / MANIFEST).read_text())
    manifest = read_manifest(place / MANIFEST)
    (place / MANIFEST).write_text(json.dumps(dict(reversed(content.items()))))
    assert read_manifest(place / MANIFEST) == manifest
    del content["checksum"]
    (place / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(place / MANIFEST) == manifest


def test_an_older_bundle_has_no_limit_on_turns(place: Path) -> None:
    def forget(content: dict[str, Any]) -> None:
        del content["generation"]["max_turns"], content["generation"]["fold_typed"]

    edit_manifest(place, forget)
    generation = read_manifest(place / MANIFEST).generation
    assert generation.max_turns is None
    assert not generation.fold_typed


@pytest.mark.parametrize("checksum", [None, "", 0, "0" * 64])
def test_a_checksum_cannot_be_switched_off(place: Path, checksum: object) -> None:
    content = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps(content | {"checksum": checksum}))
    with pytest.raises(ArtifactError, match="checksum = "):
        read_manifest(place / MANIFEST)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.decoder.num_layers", 10**12, r"num_layers = 1000000000000: expected 1 to 1024"),
        ("model.decoder.top_k", 6, r"model\.decoder: top_k = 6: expected at most num_experts, 5"),
        ("model.decoder.rope_dim", 5, r"model\.decoder: rope_dim = 5: expected an even number"),
        ("model.decoder.num_dense_layers", 3, "num_dense_layers = 3: expected fewer than"),
        ("model.encoder.num_heads", 5, r"model\.encoder: num_heads = 5: expected a divisor"),
        ("model.vocabulary.num_codebooks", 1, "num_codebooks = 1: a codec of strides .* has 7"),
        ("model.vocabulary.codebook_block", 1, r"codebook_size = 32: expected 1 at most"),
        ("model.vocabulary.codebook_size", 40, r"codebook_size = 40: the codec has 32"),
        ("model.vocabulary.eos", 320, "eos = 320: expected below text_size, 320"),
        ("model.vocabulary.audio_specials", {}, "audio_specials lacks EOA, PAD_A, BOA"),
        ("codec.delay_samples", 1, "delay_samples = 1: this codec's is 4757"),
        ("codec.noise_rates", [1], r"noise_rates = \[1\]: noise 'off' has \[\]"),
        ("codec.state_size", 10**12, "codec.state_size = 1000000000000: expected 1 to"),
        ("generation.speaker", "M30", "generation.speaker = 'M30': the checkpoint has EOA"),
        ("generation.context_rows", 0, "generation.context_rows = 0: expected 1 to"),
        ("precision", {}, "precision.encoder is missing"),
        ("experts.group", 32, "int8 experts with group 32"),
        ("experts.records.0.crc32", "x", r'experts\.records\[0\]\.crc32 = "x": expected a whole'),
        ("experts.records.0.offset", 100, "lies at 100, expected a multiple of 4096 within"),
        ("experts.records.0.offset", 1 << 40, "lies at 1099511627776, expected"),
        ("experts.records.0.expert", 1, "10 expert records, expected one for each of 10"),
        ("files.experts~bin.sha256", None, r"files\.experts\.bin\.sha256 = null: expected text"),
        ("files.experts~bin.bytes", 4096, "expected a multiple of 4096 within 4096 bytes"),
        ("graphs.encoder", "n" * 300, "graphs.encoder = .*: expected a plain file name"),
        ("graphs.encoder", "../x", 'graphs.encoder = "../x": expected a plain file name'),
        ("graphs.encoder", "a\0b", "graphs.encoder = .*: expected a plain file name"),
        ("checkpoint.sha256", "x", 'checkpoint.sha256 = "x": expected a SHA-256'),
        ("target.backend", "cuda", 'target.backend = "cuda": expected one of ort, cpu'),
    ],
)
def test_impossible_values_are_refused_by_field(
    place: Path, field: str, value: object, message: str
) -> None:
    *owners, last = field.split(".")

    def edit(content: object) -> None:
        for name in owners:
            content = content[int(name) if name.isdigit() else name.replace("~", ".")]  # type: ignore[index]
        content[last] = value  # type: ignore[index]

    edit_manifest(place, edit)
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{message}"):
        read_manifest(place / MANIFEST)


def test_a_refusal_comes_before_any_file_is_opened(place: Path) -> None:
    edit_manifest(place, lambda m: m["model"]["decoder"].update(width="wide"))
    with pytest.raises(ArtifactError, match=r'model\.decoder\.width = "wide"'):
        Bundle.open(place)  # no other file of the bundle exists
