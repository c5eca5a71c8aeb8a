"""The bundle on disk: opened, checked and described before any graph is parsed.

A bundle is what `deeptalk-edge export` writes: see docs/bundle.md. `Bundle.open` checks the format,
and the size and SHA-256 of every file that the manifest names. `experts.bin` may be larger than
memory: its size is checked here, its records when they are first read, or all at once by `verify`.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import (
    FORMAT,
    MANIFEST,
    NATIVE_CODEC,
    NATIVE_WEIGHTS,
    Manifest,
    read_manifest,
)
from deeptalk_edge.bundle.signature import PublicKey, note_signature, signature_place, verify_file
from deeptalk_edge.bundle.target import TargetBackend
from deeptalk_edge.errors import ArtifactError, ExpertUnavailable
from deeptalk_edge.files import check_file, sha256_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a TensorRT backend finds where it runs."""

    backend: TargetBackend
    compute_capability: str
    tensorrt: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its files are present, and those that are read are unaltered."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        machine: Machine | None = None,
        public_key: PublicKey | None = None,
    ) -> Bundle:
        """Read the manifest and check every file against it; nothing is parsed but the manifest.

        Of experts.bin, and of `spare_files`, only the size is checked; their readers check the
        rest. With `public_key` the manifest must be signed with it, there may be no file that it
        does not name, and these are hashed at once as well: CRC-32 detects damage, not tampering.

        Raises ArtifactError, naming the file, if this is not a bundle, is one of a newer format,
        is not signed, does not fit `machine`, or a file is missing, truncated, altered or out of
        ONNX Runtime's reach.
        """
        path = Path(path)
        if public_key is not None:
            check_signature(path, public_key)
        manifest = _read_manifest(path)
        _check_links(path, manifest)
        if machine is not None:
            _check_machine(path, manifest, machine)
        later = {manifest.experts.file, *manifest.spare_files} if public_key is None else set()
        for name, entry in manifest.files.items():
            sha256 = None if name in later else entry.sha256
            check_file(path / name, size_bytes=entry.bytes, sha256=sha256)
        return cls(path, manifest)

    @property
    def sha256(self) -> str:
        """Of the manifest, which has the hash of every other file: what `sha256sum` says of it."""
        return sha256_of(self.path / MANIFEST)

    def file(self, name: str) -> Path:
        """The place of a file that the manifest names."""
        return self.path / name

    def check_machine(self, machine: Machine) -> None:
        """Raises ArtifactError if the engines are not built, or are for another machine."""
        _check_machine(self.path, self.manifest, machine)

    def check(self, names: Iterable[str]) -> None:
        """Hash some files.

        Raises ArtifactError naming one that is missing, truncated or altered.
        """
        for name in sorted(names):
            entry = self.manifest.files[name]
            check_file(self.file(name), size_bytes=entry.bytes, sha256=entry.sha256)

    def verify(self) -> int:
        """Read every byte of the bundle and check it; returns how many there were.

        Raises ArtifactError naming a damaged file, ExpertUnavailable naming a damaged record.
        """
        self.check(self.manifest.files.keys() - {self.manifest.experts.file})
        # The records first: they say which expert is damaged, where the hash says only that one is.
        path = self.file(self.manifest.experts.file)
        with path.open("rb") as file:
            for record in self.manifest.experts.records:
                file.seek(record.offset)
                if zlib.crc32(file.read(record.bytes)) != record.crc32:
                    raise ExpertUnavailable(
                        f"{path}: layer {record.layer}, expert {record.expert} is damaged; copy "
                        "the bundle again"
                    )
        self.check([self.manifest.experts.file])
        return sum(entry.bytes for entry in self.manifest.files.values())

    def describe(self) -> dict[str, Any]:
        """What a person wants to know of a bundle, ready for JSON."""
        manifest = self.manifest
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "format": FORMAT,
            "producer": manifest.producer,
            "checkpoint": dataclasses.asdict(manifest.checkpoint),
            "target": dataclasses.asdict(manifest.target),
            "precision": dict(manifest.precision),
            "model": dataclasses.asdict(manifest.model),
            "codec": dataclasses.asdict(manifest.codec),
            "generation": dataclasses.asdict(manifest.generation),
            "engines": {name: dataclasses.asdict(e) for name, e in manifest.engines.items()},
            "experts": {
                "dtype": manifest.experts.dtype,
                "group": manifest.experts.group,
                "records": len(manifest.experts.records),
                "bytes": sum(record.bytes for record in manifest.experts.records),
            },
            "calibration": manifest.calibration and dataclasses.asdict(manifest.calibration),
            "files": {name: entry.bytes for name, entry in manifest.files.items()},
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "licences": dict(manifest.licences),
            "signature": dataclasses.asdict(note_signature(self.path / MANIFEST)),
        }


def check_signature(path: Path, public_key: PublicKey) -> str:
    """Check that a bundle's manifest is signed and that no file lies beside those that it names;
    returns the comment that was signed. Nothing unsigned is parsed.

    Raises ArtifactError saying what is missing, altered or too much.
    """
    if not path.is_dir():
        _read_manifest(path)  # which says what is there instead
    comment = verify_file(path / MANIFEST, public_key)
    check_nothing_else(path, _read_manifest(path))
    return comment


def check_nothing_else(path: Path, manifest: Manifest) -> None:
    """Raises ArtifactError if a file lies in a bundle that its manifest does not name: no signature
    covers it."""
    signed = {MANIFEST, signature_place(path / MANIFEST).name, *manifest.files}
    if unsigned := sorted({entry.name for entry in path.iterdir()} - signed):
        raise ArtifactError(f"{path / unsigned[0]}: not part of what was signed; remove it")


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such bundle; a bundle is a directory, export makes one")
    place = path / MANIFEST
    if not place.is_file():
        hint = "this is a checkpoint: " if (path / "config.json").is_file() else ""
        raise ArtifactError(
            f"{path}: not a bundle, it holds no {MANIFEST}; {hint}make one with "
            "`deeptalk-edge export`"
        )
    return read_manifest(place)


def _check_links(path: Path, manifest: Manifest) -> None:
    """Refuse what recent versions of ONNX Runtime refuse: external data outside of the directory of
    its graph. What we read ourselves may be a link to another disk."""
    if manifest.graphs is None:  # engines have their own readers
        return
    ours = {manifest.experts.file, NATIVE_WEIGHTS, NATIVE_CODEC}
    directory = Path(os.path.realpath(path))
    for name in sorted(manifest.files.keys() - ours):
        target = Path(os.path.realpath(path / name))
        if name.endswith(".bin") and target.parent != directory:
            raise ArtifactError(
                f"{path / name}: a link out of the bundle, to {target}, which ONNX Runtime does "
                "not follow; put the file itself there (cp -rL copies a bundle that way)"
            )


def _check_machine(path: Path, manifest: Manifest, machine: Machine) -> None:
    """Engines serve the GPUs and the TensorRT that they were built for, and no other."""
    target = manifest.target
    if machine.backend != target.backend:
        raise ArtifactError(
            f"{path}: made for {target.backend}, this is {machine.backend}; export the checkpoint "
            f"with --backend {machine.backend}"
        )
    unbuilt = [name for name, entry in manifest.engines.items() if entry.engine is None]
    if unbuilt:
        raise ArtifactError(
            f"{path}: no engine yet for {', '.join(unbuilt)}; build them on this device with "
            f"`deeptalk-edge export {path} --device {target.device} -o FINISHED`"
        )
    if machine.compute_capability not in target.compute_capabilities:
        raise ArtifactError(
            f"{path}: its engines are for {', '.join(target.compute_capabilities)}, this GPU is "
            f"{machine.compute_capability}; export the checkpoint for this device"
        )
    if machine.tensorrt != target.tensorrt:
        raise ArtifactError(
            f"{path}: its engines were built by TensorRT {target.tensorrt}, this machine has "
            f"{machine.tensorrt}; build them again with this version"
        )
