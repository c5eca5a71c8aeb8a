"""A one-line fault: its place, and the line before and after."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Fault:
    """Replaces `before` by `after` in line `line` (from 1) of the file `path`."""

    path: str
    line: int
    operator: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """A name that is equal in every run."""
        return f"{self.path}:{self.line} {self.operator}: {self.after.strip()}"

    def planted_in(self, text: str) -> str:
        """Return the file's text with the fault. Raises ValueError if the line has changed."""
        lines = text.split("\n")
        if lines[self.line - 1] != self.before:
            raise ValueError(f"{self.path}:{self.line}: expected {self.before!r}")
        lines[self.line - 1] = self.after
        return "\n".join(lines)

    def diff(self, text: str) -> str:
        """Return a unified diff; `text` is the file without the fault."""
        lines = difflib.unified_diff(
            text.splitlines(),
            self.planted_in(text).splitlines(),
            f"a/{self.path}",
            f"b/{self.path}",
            lineterm="",
        )
        return "\n".join(lines)
