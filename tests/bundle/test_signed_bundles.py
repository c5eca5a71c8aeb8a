"""Production mode: a bundle opens only if its maker signed all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.signature import PublicKey, generate_keys, sign_file
from deeptalk_edge.cli import main
from deeptalk_edge.errors import ArtifactError


@pytest.fixture
def key(own_copy: Path) -> PublicKey:
    """The key with which `own_copy` is signed."""
    secret, public = generate_keys(own_copy.parent / "maker")
    sign_file(own_copy / MANIFEST, secret, "for a test")
    return PublicKey.read(public)


def test_a_signed_bundle_opens(own_copy: Path, key: PublicKey) -> None:
    assert Bundle.open(own_copy, public_key=key).manifest == Bundle.open(own_copy).manifest


def test_an_unsigned_bundle_opens_only_without_a_required_signature(
    own_copy: Path, key: PublicKey
) -> None:
    (own_copy / f"{MANIFEST}.minisig").unlink()
    Bundle.open(own_copy)
    with pytest.raises(ArtifactError, match="not signed"):
        Bundle.open(own_copy, public_key=key)


def test_an_altered_manifest_is_refused_before_it_is_read(own_copy: Path, key: PublicKey) -> None:
    (own_copy / MANIFEST).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ArtifactError, match="altered since it was signed"):
        Bundle.open(own_copy, public_key=key)


@pytest.mark.parametrize("name", ["encoder.bin", "experts.bin", "golden.npz"])
def test_opening_a_signed_bundle_checks_every_byte(
    name: str, own_copy: Path, key: PublicKey
) -> None:
    content = bytearray((own_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own_copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: altered"):
        Bundle.open(own_copy, public_key=key)


def test_a_file_that_was_not_signed_is_refused(own_copy: Path, key: PublicKey) -> None:
    (own_copy / "libextra.so").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"libextra.so: not part of what was signed"):
        Bundle.open(own_copy, public_key=key)


def test_a_place_without_a_bundle_is_named(tmp_path: Path, key: PublicKey) -> None:
    with pytest.raises(ArtifactError, match="no such bundle"):
        Bundle.open(tmp_path / "nothing", public_key=key)


def test_run_refuses_an_unsigned_bundle(
    own_copy: Path, key: PublicKey, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_copy / f"{MANIFEST}.minisig").unlink()
    public = str(own_copy.parent / "maker.pub")
    flags = ["--bundle", str(own_copy), "--text", "hello", "--require-signature", public]
    assert main(["run", *flags]) == 1
    assert "not signed" in capsys.readouterr().err
