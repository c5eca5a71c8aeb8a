"""One hash of all that an export depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import deeptalk_edge
from deeptalk_edge.checkpoint.hashes import FileHashes

_EXPORTER = ("export", "calibration", "devices", "bundle", "checkpoint", "model")


class InputHashes(FileHashes):
    """Of a checkpoint, the settings, and the exporter itself; each file is read once."""

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
        text = f"{deeptalk_edge.__version__} {settings} {self.of_files([*below, *files])}"
        return hashlib.sha256(text.encode()).hexdigest()
