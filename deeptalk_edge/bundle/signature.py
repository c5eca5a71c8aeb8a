"""Signatures in minisign's format: Ed25519 over the BLAKE2b hash of one file, kept beside it.

A bundle's manifest hashes every other file, so signing the manifest signs the bundle.

    manifest.json
    manifest.json.minisig    what `deeptalk-edge bundle sign` or `minisign -S` writes

Why not OpenSSF model-signing: its local-key mode brings 35 packages and an HTTP and Sigstore stack
to a kiosk that is offline, and it hashes every file again where the manifest has done so already.
This needs one kept package (`cryptography`), and minisign, a C program of every distribution, reads
and writes the same keys and signatures: with it a key may have a password, which ours have not.

Source: jedisct1/minisign, "Signature format" and "Secret key format".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.files import (
    OutputFile,
    check_inputs_stay,
    check_output,
    open_input,
    refusing,
    write_file,
)

_UNTRUSTED = "untrusted comment: "
_TRUSTED = "trusted comment: "
_KEY = b"Ed"
_HASHED = b"ED"
_NO_PASSWORD = b"\0\0"
_CHECKSUM = b"B2"
_MARK = re.compile(r"\(file [0-9a-f]{12}\)")
_MAX_KEY_BYTES, _MAX_SIGNATURE_BYTES = 1 << 12, 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """Whose signatures we accept."""

    key_id: bytes
    ed25519: bytes

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read a `.pub` file.

        Raises SettingsError if it is none.
        """
        parts = _decode_key(path, "public", 42)
        if parts[:2] != _KEY:
            raise SettingsError(f"{path}: not a minisign public key; name the .pub file")
        return cls(key_id=parts[2:10], ed25519=parts[10:])


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureNote:
    """A file's signature as it is on disk, not yet checked with a key."""

    state: Literal["absent", "unreadable", "stale", "unchecked"]
    """`stale`: it says itself that it was made for other content."""
    key_id: str | None = None
    comment: str | None = None


def signature_place(path: Path) -> Path:
    """Where the signature of a file lies."""
    return path.with_name(f"{path.name}.minisig")


def generate_keys(place: Path) -> tuple[Path, Path]:
    """Make a pair of keys: `place`.key, which only its owner can read, and `place`.pub.

    Raises SettingsError if either exists or cannot be written, DoesNotFit if the disk is full;
    neither is left then.
    """
    if place.name in ("", ".."):
        raise SettingsError(f"{place}: is a directory; name the keys too, such as {place}/maker")
    secret_place, public_place = (place.with_name(place.name + end) for end in (".key", ".pub"))
    if found := [str(path) for path in (secret_place, public_place) if os.path.lexists(path)]:
        raise SettingsError(f"{found[0]} exists already; a key that is lost cannot be made again")
    key, key_id = _ed25519().Ed25519PrivateKey.generate(), secrets.token_bytes(8)
    public = key.public_key().public_bytes_raw()
    pair = key_id + key.private_bytes_raw() + public
    secret = _KEY + _NO_PASSWORD + _CHECKSUM + bytes(48) + pair + bytes(32)
    with refusing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _new_file(secret_place, mode=0o600) as file:
        file.write(_lines(f"minisign secret key {_spell(key_id)}", secret))
        write_file(
            public_place, _lines(f"minisign public key {_spell(key_id)}", _KEY + key_id + public)
        )
    return secret_place, public_place


def sign_file(path: Path, secret_place: Path, comment: str) -> Path:
    """Write the signature of a file; `comment` is signed with it. Returns the signature's place.

    Raises SettingsError if the key cannot be used or the signature cannot be written, ArtifactError
    if the file cannot be read, DoesNotFit if the disk is full.
    """
    check_signable(path, secret_place)
    key, key_id = _read_secret(secret_place)
    signature = key.sign(_hash_of(path))
    both = key.sign(signature + comment.encode())
    content = _lines("verify with `deeptalk-edge bundle verify`", _HASHED + key_id + signature)
    content += f"{_TRUSTED}{comment}\n".encode() + base64.b64encode(both) + b"\n"
    write_file(signature_place(path), content)
    return signature_place(path)


def check_signable(path: Path, secret_place: Path) -> None:
    """Refuse to sign before the work.

    Raises SettingsError if the signature cannot be written, or would overwrite the file or the key.
    """
    check_inputs_stay([path, secret_place], [signature_place(path)])
    check_output(signature_place(path))


def verify_file(path: Path, public: PublicKey) -> str:
    """Check the signature beside a file; returns the comment that was signed with it.

    Raises ArtifactError if the file is not signed, signed with another key, or altered since.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    key_id, signature, comment, both = _read_signature(path)
    if key_id != public.key_id:
        raise ArtifactError(
            f"{path}: signed with key {_spell(key_id)}, required is {_spell(public.key_id)}; get "
            "the bundle from its maker again, or name the maker's key"
        )
    key = ed25519.Ed25519PublicKey.from_public_bytes(public.ed25519)
    try:
        key.verify(signature, _hash_of(path))
        key.verify(both, signature + comment.encode())
    except InvalidSignature:
        raise ArtifactError(
            f"{path}: altered since it was signed with key {_spell(key_id)}, or the signature is "
            "of an earlier one; get the bundle from its maker again"
        ) from None
    return comment


def content_mark(path: Path) -> str:
    """What to put into a comment: a signature that goes stale then shows it without a key.

    Raises ArtifactError if the file cannot be read.
    """
    return f"(file {_hash_of(path).hex()[:12]})"


def note_signature(path: Path) -> SignatureNote:
    """What can be said of a file's signature without a key.

    Raises ArtifactError if the file cannot be read.
    """
    if not os.path.lexists(signature_place(path)):
        return SignatureNote(state="absent")
    try:
        key_id, _, comment, _ = _read_signature(path)
    except ArtifactError:
        return SignatureNote(state="unreadable")
    made_for = _MARK.search(comment)
    is_stale = made_for is not None and made_for[0] != content_mark(path)
    state: Literal["stale", "unchecked"] = "stale" if is_stale else "unchecked"
    return SignatureNote(state=state, key_id=_spell(key_id), comment=comment)


def _read_signature(path: Path) -> tuple[bytes, bytes, str, bytes]:
    """Key id, signature, the trusted comment, and the signature over both."""
    place = signature_place(path)
    try:
        with open_input(place) as file:
            lines = file.read(_MAX_SIGNATURE_BYTES).decode().splitlines()
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: not signed, {place.name} is missing; its maker signs it with "
            "`deeptalk-edge bundle sign`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{place}: not readable ({error}); sign the bundle again") from error
    try:
        _, first, comment, second = lines
        content, both = (base64.b64decode(line, validate=True) for line in (first, second))
    except (ValueError, binascii.Error):
        content, comment, both = b"", "", b""
    if not (content[:2] == _HASHED and len(content) == 74 and comment.startswith(_TRUSTED)):
        raise ArtifactError(f"{place}: not a signature by minisign; sign the bundle again")
    return content[2:10], content[10:], comment.removeprefix(_TRUSTED), both


def _read_secret(path: Path) -> tuple[Any, bytes]:
    parts = _decode_key(path, "secret", 158)
    if parts[:2] != _KEY or parts[4:6] != _CHECKSUM:
        raise SettingsError(f"{path}: not a minisign secret key; name the .key file")
    if parts[2:4] != _NO_PASSWORD:
        raise SettingsError(
            f"{path}: has a password; sign with `minisign -Sm BUNDLE/manifest.json -s {path}`"
        )
    key_id, seed, public = parts[54:62], parts[62:94], parts[94:126]
    key = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    if key.public_key().public_bytes_raw() != public:
        raise SettingsError(f"{path}: damaged; take the key from your backup")
    return key, key_id


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SettingsError(
            "signatures need the package cryptography: pip install 'deeptalk-edge[sign]'"
        ) from None
    return ed25519


def _decode_key(path: Path, kind: str, size: int) -> bytes:
    try:
        with open_input(path) as file:  # of a device that never ends, no more than a key
            text = file.read(_MAX_KEY_BYTES).decode()
        content = base64.b64decode(text.splitlines()[1], validate=True)
    except OSError as error:
        raise SettingsError(f"{path}: no readable {kind} key ({error.strerror})") from error
    except (IndexError, ValueError):
        content = b""
    if len(content) != size:
        raise SettingsError(f"{path}: not a minisign {kind} key; make one with `bundle keygen`")
    return content


def _hash_of(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: not readable (it is no regular file)")
    try:
        with path.open("rb") as file:
            return hashlib.blake2b(file.read()).digest()
    except OSError as error:
        raise ArtifactError(f"{path}: not readable ({error.strerror})") from error


@contextmanager
def _new_file(place: Path, *, mode: int) -> Iterator[OutputFile]:
    """A file that must not exist; it is gone again if the block fails."""
    with refusing(place):
        file = OutputFile(place, is_new=True, mode=mode)
        try:
            yield file
            file.commit()
        except BaseException:
            file.discard()
            raise


def _lines(comment: str, content: bytes) -> bytes:
    return f"{_UNTRUSTED}{comment}\n".encode() + base64.b64encode(content) + b"\n"


def _spell(key_id: bytes) -> str:
    """As minisign spells it."""
    return key_id[::-1].hex().upper()
