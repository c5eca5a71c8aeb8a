"""A bundle that is incomplete, damaged or of another format is refused before it is parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from deeptalk_edge.errors import ArtifactError, EdgeError, ExpertUnavailable
from tests.manifests import edit_manifest


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_whole_bundle_opens_and_verifies(bundle: Bundle) -> None:
    sizes = (path.stat().st_size for path in bundle.path.iterdir() if path.name != MANIFEST)
    assert bundle.verify() == sum(sizes)


def test_a_description_is_plain_json(bundle: Bundle) -> None:
    described = json.loads(json.dumps(bundle.describe()))
    assert described["model"]["decoder"]["num_experts"] == 5
    assert described["experts"]["records"] == 10
    assert described["bytes"] == sum(described["files"].values())


def test_a_newer_format_is_refused_with_the_way_out(own_copy: Path) -> None:
    edit_manifest(own_copy, lambda m: m.update(format=2))
    with pytest.raises(
        ArtifactError, match=r"format 2, this runtime reads 1; update deeptalk-edge"
    ):
        Bundle.open(own_copy)


@pytest.mark.parametrize("found", [0, "1", None, True, [], 10**12])
def test_an_unknown_format_is_refused(own_copy: Path, found: object) -> None:
    edit_manifest(own_copy, lambda m: m.update(format=found))
    with pytest.raises(ArtifactError, match="this runtime reads 1"):
        Bundle.open(own_copy)


def test_a_place_without_a_bundle_says_what_it_is(tmp_path: Path, bundle_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such bundle"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"not a bundle, it holds no manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(ArtifactError, match="this is a checkpoint"):
        Bundle.open(bundle_path.parent / "checkpoint")


@pytest.mark.parametrize("name", ["encoder.onnx", "embedding.bin", "experts.bin", "golden.npz"])
def test_a_missing_or_truncated_file_is_named(own_copy: Path, name: str) -> None:
    whole = (own_copy / name).read_bytes()
    (own_copy / name).write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: {len(whole) - 1} bytes, expected"):
        Bundle.open(own_copy)
    (own_copy / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: missing"):
        Bundle.open(own_copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "segment_00.bin", "tokenizer.json"])
def test_an_altered_file_is_named(own_copy: Path, name: str) -> None:
    flip(own_copy / name, 100)
    with pytest.raises(ArtifactError, match=rf"{name}: altered"):
        Bundle.open(own_copy)


def test_a_damaged_expert_opens_but_does_not_verify(own_copy: Path) -> None:
    flip(own_copy / "experts.bin", 4096 + 17)
    bundle = Bundle.open(own_copy)
    with pytest.raises(ExpertUnavailable, match=r"experts\.bin: layer \d, expert \d is damaged"):
        bundle.verify()


def test_damage_between_records_does_not_verify(own_copy: Path) -> None:
    records = Bundle.open(own_copy).manifest.experts.records
    flip(own_copy / "experts.bin", records[0].offset + records[0].bytes)  # in the padding
    with pytest.raises(ArtifactError, match=r"experts\.bin: altered"):
        Bundle.open(own_copy).verify()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("codec"), r"manifest\.json: codec is missing"),
        (lambda m: m["model"]["decoder"].pop("width"), r"model\.decoder\.width is missing"),
        (lambda m: m["generation"].update(beams=4), r"generation\.beams: no such field"),
        (lambda m: m["graphs"].update(head=7), r"graphs\.head = 7: expected text"),
        (lambda m: m["files"].pop("head.onnx"), r"head\.onnx has no size and hash"),
        (
            lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
            "plain file name",
        ),
        (lambda m: m["experts"]["records"].pop(), "9 expert records"),
        (lambda m: m["graphs"]["segments"].pop(), "2 segments, expected 3"),
        (lambda m: m.update(experts=[]), "experts = a list of 0: expected an object"),
        (lambda m: m.update(files=3), "files = 3: expected an object; export the bundle again"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong(
    own_copy: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(own_copy, edit)
    with pytest.raises(ArtifactError, match=message):
        Bundle.open(own_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_not_json_is_refused(own_copy: Path, content: bytes) -> None:
    (own_copy / MANIFEST).write_bytes(content)
    with pytest.raises(EdgeError, match=r"manifest\.json"):
        Bundle.open(own_copy)


def _lead_out(bundle: Path, name: str) -> None:
    """Replace a file of a bundle by a link to a file outside of it."""
    elsewhere = bundle.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    (bundle / name).rename(elsewhere / name)
    (bundle / name).symlink_to(elsewhere / name)


@pytest.mark.parametrize("name", ["embedding.bin", "encoder.bin"])
def test_a_link_that_onnx_runtime_refuses_is_refused_by_every_opener(
    own_copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _lead_out(own_copy, name)
    for argv in (["run", "--text", "hello", "--bundle"], ["bundle", "verify"]):
        assert main([*argv, str(own_copy)]) == 1
        assert f"{name}: a link out of the bundle" in capsys.readouterr().err


def test_a_link_that_onnx_runtime_follows_is_accepted_by_every_opener(
    own_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("experts.bin", "head.onnx", "tokenizer.json"):
        _lead_out(own_copy, name)
    (own_copy / "encoder.bin").rename(own_copy / "same.bin")
    (own_copy / "encoder.bin").symlink_to("same.bin")
    latest = own_copy.with_name("latest")
    latest.symlink_to(own_copy)
    assert main(["bundle", "verify", str(latest)]) == 0
    assert main(["run", "--text", "hello", "--bundle", str(latest)]) == 0
