"""What an export depends on, as hashes: the checkpoint's own, and one of all inputs together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import deeptalk_edge
from deeptalk_edge.files import sha256_of

_EXPORTER = ("export", "calibration", "devices", "bundle", "checkpoint", "model")


class InputHashes:
    """SHA-256 of files; each is read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of_weights(self, checkpoint: Path) -> str:
        """Over config.json and all shards, in order of their names."""
        return self._of([checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))])

    def of_all(self, folders: Iterable[Path], files: Iterable[Path], settings: object) -> str:
        """Over all files below the folders, the files, the settings as spelt, and the exporter with
        all that it imports of ours."""
        package = Path(deeptalk_edge.__file__).parent
        exporter = (package / name for name in _EXPORTER)
        below = [
            path
            for folder in (*folders, *exporter)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".pyc"
        ]
        text = f"{deeptalk_edge.__version__} {settings} {self._of([*below, *files])}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _of(self, files: Iterable[Path]) -> str:
        digest = hashlib.sha256()
        for path in files:
            if path not in self._known:
                self._known[path] = sha256_of(path)
            digest.update(f"{path.name} {self._known[path]}\n".encode())
        return digest.hexdigest()
