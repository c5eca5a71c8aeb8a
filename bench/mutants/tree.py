"""A private copy of the checkout, in which faults are planted; the checkout is never written.

Sources and tests are copied. Checkpoints and bundles, which no test may write, are hard links.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINKED = ("bundles", "checkpoints")
"""Folders that are only read, 75 MB: hard links suffice."""

LEFT_OUT = {".git", ".venv", ".hypothesis", "build", "demo", "dist", "__pycache__"}


_COMPILER = Path(__file__).with_name("compiler.py").resolve()


class TreeCopy:
    """A copy of the checkout `source` in the empty or absent folder `root`."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source, self.root = source.resolve(), root.resolve()
        self._compilers: dict[str, str] = {}
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(
            self.source,
            self.root,
            symlinks=True,
            ignore=_left_out,
            copy_function=self._copy_or_link,
        )

    @contextmanager
    def planted(self, path: str, text: str) -> Iterator[None]:
        """Replace the content of the file `path` (relative) by `text` until the context ends."""
        place = self.root / path
        kept, stamp = place.read_bytes(), place.stat()
        _replace(place, text.encode())
        try:
            yield
        finally:
            _replace(place, kept)
            os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def environment(self) -> dict[str, str]:
        """Environment of a Python that imports this copy. It writes no bytecode, because a stale
        file of the faulty source could be used for the restored one."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), *_outside_paths(self.source)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            **self._compilers,
        }

    def put_before_compilers(self, objects: Path) -> None:
        """Let the C++ compilers cache their objects in the folder `objects`."""
        folder = self.root.with_name(f"{self.root.name}-compilers")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        objects.mkdir(parents=True, exist_ok=True)
        self._compilers = {
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
            "DEEPTALK_MUTANTS_OBJECTS": str(objects.resolve()),
        }
        for name in ("c++", "g++", "aarch64-linux-gnu-g++"):
            found = shutil.which(name)
            if found is not None:
                # With this Python: the first one in the PATH may be a slow script.
                (folder / name).write_text(f"#!{sys.executable}\n{_COMPILER.read_text('utf-8')}")
                (folder / name).chmod(0o755)
                self._compilers[f"DEEPTALK_MUTANTS_{name}"] = found

    def compile_bytecode(self, python: str) -> None:
        """Compile once for all runs in this copy."""
        command = [python, "-m", "compileall", "-q", "."]
        subprocess.run(command, cwd=self.root, capture_output=True, check=False)

    def _copy_or_link(self, source: str, target: str) -> str:
        relative = Path(source).relative_to(self.source)
        if relative.parts[0] not in LINKED:
            return str(shutil.copy2(source, target))
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)
        return target


def _left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in LEFT_OUT or name.endswith("_cache")}


def _outside_paths(source: Path) -> list[str]:
    """Return the entries of PYTHONPATH outside of the checkout."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in paths if path and Path(path).resolve() != source]


def _replace(place: Path, content: bytes) -> None:
    """Write a new file: `place` may be a hard link."""
    place.unlink()
    place.write_bytes(content)
