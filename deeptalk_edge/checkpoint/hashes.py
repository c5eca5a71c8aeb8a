"""What a checkpoint's weights are, as one hash: a table or a bundle names it and is held to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from deeptalk_edge.files import sha256_of


class FileHashes:
    """SHA-256 of files; each is read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of_weights(self, checkpoint: Path) -> str:
        """Over config.json and all shards, in order of their names."""
        return self.of_files(
            [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
        )

    def of_files(self, files: Iterable[Path]) -> str:
        """One hash over names and contents."""
        digest = hashlib.sha256()
        for path in files:
            if path not in self._known:
                self._known[path] = sha256_of(path)
            digest.update(f"{path.name} {self._known[path]}\n".encode())
        return digest.hexdigest()
