"""Signatures prove the maker of a file and that it was not changed."""

from __future__ import annotations

import base64
import os
import stat
import sys
from pathlib import Path

import pytest

from deeptalk_edge import files
from deeptalk_edge.bundle.signature import (
    PublicKey,
    generate_keys,
    sign_file,
    signature_place,
    verify_file,
)
from deeptalk_edge.errors import ArtifactError, DoesNotFit, SettingsError
from tests.disks import make_read_only, small_disk

# Made by minisign 0.11 itself: `minisign -G -W`, then `minisign -Sm manifest.json -t ...`.
MINISIGN_CONTENT = b'{"a":1}\n'
MINISIGN_PUBLIC = """untrusted comment: minisign public key 507AA81E4A548DEA
RWTqjVRKHqh6UCfZ2xIDTJjzTdlnhFz1+pG6OdMLkSxkDQI7/VSaAmcA
"""
MINISIGN_SIGNATURE = """untrusted comment: signature from minisign secret key
RUTqjVRKHqh6ULX/cP52fsD2mAE+VW7W/QHf1QOEjp4YfCMHwyhrt5Pb6mBVeNsr5ORpQFQTrP9pu8tTrBq4wRWmCyLZnVac8wQ=
trusted comment: tiny, signed by minisign
MCoF1g5hTGnB9xwzcJKISk7U2qQnuUBf2RgBiMHp8PPyhiC2jAcyDEza+44I3ZzCSiToJz/RMrUX/ny75CPKBw==
"""


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A file signed with the key `tmp_path / "maker"`."""
    generate_keys(tmp_path / "maker")
    path = tmp_path / "manifest.json"
    path.write_bytes(b'{"format": 1}')
    sign_file(path, tmp_path / "maker.key", "tiny for cpu")
    return path


def _maker(signed: Path) -> PublicKey:
    return PublicKey.read(signed.with_name("maker.pub"))


def test_a_signed_file_gives_its_comment(signed: Path) -> None:
    assert verify_file(signed, _maker(signed)) == "tiny for cpu"


def test_what_minisign_signed_we_accept(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(MINISIGN_CONTENT)
    signature_place(path).write_text(MINISIGN_SIGNATURE, encoding="utf-8")
    (tmp_path / "k.pub").write_text(MINISIGN_PUBLIC, encoding="utf-8")
    assert verify_file(path, PublicKey.read(tmp_path / "k.pub")) == "tiny, signed by minisign"


def test_one_altered_byte_is_refused(signed: Path) -> None:
    signed.write_bytes(signed.read_bytes().replace(b"1", b"2"))
    with pytest.raises(ArtifactError, match=r"manifest.json: altered since it was signed"):
        verify_file(signed, _maker(signed))


def test_an_altered_comment_is_refused(signed: Path) -> None:
    place = signature_place(signed)
    place.write_text(place.read_text().replace("for cpu", "for gpu"))
    with pytest.raises(ArtifactError, match="altered since it was signed"):
        verify_file(signed, _maker(signed))


def test_an_unsigned_file_is_refused_with_the_way_out(signed: Path) -> None:
    signature_place(signed).unlink()
    with pytest.raises(ArtifactError, match=r"not signed, manifest.json.minisig is missing"):
        verify_file(signed, _maker(signed))


def test_another_makers_signature_is_refused_and_both_keys_named(signed: Path) -> None:
    generate_keys(signed.with_name("other"))
    other = PublicKey.read(signed.with_name("other.pub"))
    ids = [key.key_id[::-1].hex().upper() for key in (_maker(signed), other)]
    with pytest.raises(ArtifactError, match=f"signed with key {ids[0]}, required is {ids[1]}"):
        verify_file(signed, other)


def test_a_key_that_borrows_the_makers_id_is_refused(signed: Path) -> None:
    generate_keys(signed.with_name("thief"))
    sign_file(signed, signed.with_name("thief.key"), "tiny for cpu")
    thief = PublicKey.read(signed.with_name("thief.pub"))
    mixed = PublicKey(key_id=thief.key_id, ed25519=_maker(signed).ed25519)
    with pytest.raises(ArtifactError, match="altered since it was signed"):
        verify_file(signed, mixed)


@pytest.mark.parametrize("content", [b"", b"a\nb\nc\nd\n", b"one line", b"\xff\xfe", b"\n" * 4])
def test_a_file_that_is_not_a_signature_is_refused(signed: Path, content: bytes) -> None:
    signature_place(signed).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest.json.minisig: not"):
        verify_file(signed, _maker(signed))


def test_a_signature_or_a_key_that_never_comes_is_refused(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FIFO_WAIT_S", 0.1)
    maker, place = _maker(signed), signature_place(signed)
    for path in (place, signed.with_name("maker.pub"), signed):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ArtifactError, match="this FIFO has no writer"):
        verify_file(signed, maker)
    with pytest.raises(SettingsError, match="this FIFO has no writer"):
        PublicKey.read(signed.with_name("maker.pub"))
    with pytest.raises(ArtifactError, match="it is no regular file"):
        sign_file(signed, signed.with_name("maker.key"), "")


@pytest.mark.parametrize("end", ["key", "pub"])
def test_a_key_is_never_written_over(tmp_path: Path, end: str) -> None:
    place = tmp_path / f"maker.{end}"
    place.write_text("precious")
    with pytest.raises(SettingsError, match=f"maker.{end} exists already"):
        generate_keys(tmp_path / "maker")
    assert place.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_key_is_written_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "maker.key").symlink_to("elsewhere")
    with pytest.raises(SettingsError, match=r"maker.key exists already"):
        generate_keys(tmp_path / "maker")
    assert [path.name for path in tmp_path.iterdir()] == ["maker.key"]


def test_a_pair_of_keys_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:  # room for one of the two files
        with pytest.raises(DoesNotFit, match="No space left on device"):
            generate_keys(disk / "maker")
        assert list(disk.iterdir()) == []


def test_a_read_only_place_gives_an_error(signed: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        (disk / "manifest.json").write_bytes(signed.read_bytes())
        make_read_only(disk)
        with pytest.raises(SettingsError, match=r"cannot be written \(Read-only file system\)"):
            sign_file(disk / "manifest.json", signed.with_name("maker.key"), "")
        with pytest.raises(SettingsError, match=r"cannot be written \(Read-only file system\)"):
            generate_keys(disk / "maker")


def test_a_signature_never_replaces_the_signed_file_or_the_key(signed: Path) -> None:
    place = signature_place(signed)
    for target in (signed, signed.with_name("maker.key")):
        place.unlink()
        place.symlink_to(target)
        before = target.read_bytes()
        with pytest.raises(SettingsError, match="is the same file as"):
            sign_file(signed, signed.with_name("maker.key"), "")
        assert target.read_bytes() == before


def test_only_its_owner_can_read_a_secret_key(tmp_path: Path) -> None:
    secret, _ = generate_keys(tmp_path / "maker")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_the_wrong_half_of_a_pair_is_refused_by_name(signed: Path) -> None:
    with pytest.raises(SettingsError, match=r"maker.key: not a minisign public key"):
        PublicKey.read(signed.with_name("maker.key"))
    with pytest.raises(SettingsError, match=r"maker.pub: not a minisign secret key"):
        sign_file(signed, signed.with_name("maker.pub"), "")


def test_a_missing_key_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nobody.pub: no readable public key"):
        PublicKey.read(tmp_path / "nobody.pub")


def test_a_damaged_secret_key_signs_nothing(signed: Path) -> None:
    _edit_key(signed.with_name("maker.key"), at=70, value=b"\x55")
    with pytest.raises(SettingsError, match=r"maker.key: damaged"):
        sign_file(signed, signed.with_name("maker.key"), "")


def test_a_key_with_a_password_is_left_to_minisign(signed: Path) -> None:
    _edit_key(signed.with_name("maker.key"), at=2, value=b"Sc")
    with pytest.raises(SettingsError, match=r"has a password; sign with `minisign -Sm"):
        sign_file(signed, signed.with_name("maker.key"), "")


def test_without_cryptography_the_error_says_what_to_install(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(SettingsError, match=r"pip install 'deeptalk-edge\[sign\]'"):
        verify_file(signed, _maker(signed))


def _edit_key(path: Path, *, at: int, value: bytes) -> None:
    comment, line = path.read_text().splitlines()
    content = bytearray(base64.b64decode(line))
    content[at : at + len(value)] = value
    path.write_text(f"{comment}\n{base64.b64encode(bytes(content)).decode()}\n")
