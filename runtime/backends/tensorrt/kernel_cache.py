"""Keeps the kernels that TensorRT-RTX compiles at a start in a file, for the next start.

file      a line of text, the SHA-256 of what follows, and TensorRT-RTX's own bytes. It is read
          whole and checked before native code parses it; TensorRT-RTX then refuses kernels of
          another version or GPU by itself
losses    cost time only: what is damaged or refused is compiled again, with a warning
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import refusing, side_output, write_file

log = logging.getLogger(__name__)

_FIRST_LINE = b"deeptalk-edge: compiled kernels of TensorRT-RTX\n"
_HASH_BYTES = hashlib.sha256().digest_size


class KernelCache:
    """The cache that all contexts of a device share, and its file."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: kernels are compiled at each start."""
        self._path = path
        self._cache: Any = None
        self._saved: bytes | None = None

    def of(self, config: Any) -> Any:
        """Return the cache for a context that `config`, an `IRuntimeConfig`, describes.

        Raises SettingsError if the file is something else, or cannot be read.
        """
        if self._cache is None:
            kept = self._read()  # may refuse the file, which is then never written
            self._cache = config.create_runtime_cache()
            if kept is not None and self._cache.deserialize(kept):
                self._saved = kept
            elif kept is not None:
                log.warning(
                    "%s: made by another TensorRT-RTX or for another GPU; the kernels are compiled "
                    "again",
                    self._path,
                )
        return self._cache

    def _read(self) -> bytes | None:
        """The kernels in the file; None if there are none, or they are damaged."""
        if self._path is None or not self._path.exists():
            return None
        with refusing(self._path):
            content = self._path.read_bytes()
        if not content.startswith(_FIRST_LINE):
            raise SettingsError(f"{self._path}: is no kernel cache of ours; name another place")
        start = len(_FIRST_LINE) + _HASH_BYTES
        digest, kernels = content[len(_FIRST_LINE) : start], content[start:]
        if hashlib.sha256(kernels).digest() != digest:
            log.warning("%s: damaged; the kernels are compiled again", self._path)
            return None
        return kernels

    def save(self) -> None:
        """Write the file if there are other kernels than it holds; a failure is a warning."""
        if self._path is None or self._cache is None:
            return
        kernels = bytes(self._cache.serialize())
        if kernels != self._saved:
            with side_output(self._path):
                digest = hashlib.sha256(kernels).digest()
                write_file(self._path, _FIRST_LINE + digest + kernels)
                self._saved = kernels

    def release(self) -> None:
        """Destroy the cache; TensorRT wants this before its runtime is destroyed."""
        self._cache = None
