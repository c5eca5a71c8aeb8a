"""`deeptalk-edge bundle sign`, `verify --key` and `keygen`, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.cli import main
from tests.manifests import edit_manifest


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


def test_a_signed_bundle_is_verified_and_shows_its_signed_comment(
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


def _shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["bundle", *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("action", ["verify", "inspect"])
def test_a_signature_is_shown_as_unchecked_stale_unreadable_or_absent(
    action: str, signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = signed / f"{MANIFEST}.minisig"

    def said() -> tuple[str, str]:
        report = json.loads(_shown(capsys, action, str(signed), "--json"))
        return report["signature"]["state"], _shown(capsys, action, str(signed))

    state, text = said()
    assert state == "unchecked"
    assert "not checked, name the key with" in text
    edit_manifest(signed, lambda manifest: manifest["checkpoint"].update(name="another"))
    state, text = said()
    assert state == "stale"
    assert "signature is stale" in text
    place.write_text("nonsense")
    state, text = said()
    assert state == "unreadable"
    place.unlink()
    state, text = said()
    assert state == "absent"
    assert "not signed" in text


def test_a_checked_signature_is_shown_as_valid(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert _verify(signed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["signature"]["state"] == "valid"


def test_verify_is_as_strict_as_run_about_files_that_were_not_signed(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / "libextra.so").write_bytes(b"")
    key = str(signed.with_name("maker.pub"))
    asked = ["run", "--bundle", str(signed), "--text", "hello", "--require-signature", key]
    verify = ["bundle", "verify", str(signed), "--key", key]
    for argv in (verify, asked):
        assert main(argv) == 1
        assert "libextra.so: not part of what was signed" in capsys.readouterr().err
    secret = str(signed.with_name("maker.key"))
    assert main(["bundle", "sign", str(signed), "--key", secret]) == 1
    assert "libextra.so" in capsys.readouterr().err


def test_both_keys_are_shown_with_their_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "keygen", str(tmp_path / "maker")]) == 0
    secret, public = capsys.readouterr().out.splitlines()
    assert secret.startswith(f"{tmp_path / 'maker.key'}  signs")
    assert public.endswith(f"--require-signature {tmp_path / 'maker.pub'}")
