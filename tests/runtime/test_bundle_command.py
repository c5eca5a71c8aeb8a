"""`deeptalk-edge bundle sign`, `verify --key` and `keygen`, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.cli import main


@pytest.fixture
def signed(bundle_path: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle, signed with the key `tmp_path / "maker"`."""
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_path, bundle)
    assert main(["bundle", "keygen", str(tmp_path / "maker")]) == 0
    assert main(["bundle", "sign", str(bundle), "--key", str(tmp_path / "maker.key")]) == 0
    return bundle


def _verify(bundle: Path, *more: str) -> int:
    key = bundle.with_name("maker.pub")
    return main(["bundle", "verify", str(bundle), "--key", str(key), *more])


def test_a_signed_bundle_is_verified_and_says_for_what_it_was_signed(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert _verify(signed) == 0
    assert "for ort on cpu" in capsys.readouterr().out
    assert _verify(signed, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_whole"]
    assert report["signed"].endswith("for ort on cpu")


def test_an_unsigned_bundle_is_refused(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (signed / f"{MANIFEST}.minisig").unlink()
    assert _verify(signed) == 1
    assert "not signed" in capsys.readouterr().err


def test_a_manifest_that_was_altered_is_refused_before_it_is_parsed(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / MANIFEST).write_text("no JSON at all", encoding="utf-8")
    assert _verify(signed) == 1
    assert "altered since it was signed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["head.onnx", "experts.bin", "tokenizer.json"])
def test_a_signature_covers_every_file(
    signed: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    assert _verify(signed) == 1
    assert name in capsys.readouterr().err


def test_a_damaged_bundle_is_not_signed(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / f"{MANIFEST}.minisig").unlink()
    (signed / "head.onnx").write_bytes(b"")
    assert main(["bundle", "sign", str(signed), "--key", str(tmp_path / "maker.key")]) == 1
    assert "head.onnx" in capsys.readouterr().err
    assert not (signed / f"{MANIFEST}.minisig").exists()
