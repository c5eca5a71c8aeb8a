"""The form of Markdown: prose wraps at 100 columns, a changelog entry has at most 25 words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import ROOT

COLUMNS = 100
WORDS = 25
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "checkpoints/*/README.md", "native/*/README.md")
    for path in ROOT.glob(pattern)
)


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of prose with their numbers: outside of tables, code blocks and headings."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "#", "    ")):
            yield number, line


def too_wide(text: str) -> list[int]:
    """The numbers of prose lines over the limit; one link or code span may pass it by itself."""
    return [
        number
        for number, line in prose_lines(text)
        if len(line) > COLUMNS and len(re.sub(r"\]\([^)]*\)|`[^`]*`", "", line)) > COLUMNS
    ]


def entries(text: str) -> list[str]:
    """The entries of a changelog, each on one line."""
    return [
        " ".join(entry.split()) for entry in re.findall(r"^- (.*?)(?=^[-#]|\Z)", text, re.S | re.M)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_wraps_at_100_columns(page: Path) -> None:
    assert not too_wide(page.read_text(encoding="utf-8"))


def test_a_changelog_entry_has_at_most_25_words() -> None:
    found = entries((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert found
    assert not [entry for entry in found if len(entry.split()) > WORDS]


def test_a_wide_line_counts_as_prose_only_outside_of_tables_and_code() -> None:
    wide = "word " * 21
    assert too_wide(wide) == [1]
    assert too_wide(f"short\n- {wide}") == [2]
    assert not too_wide(f"| {wide} |\n```\n{wide}\n```\n# {wide}")
    assert not too_wide(f"see [this]({'x' * 120})")


def test_an_entry_may_span_lines() -> None:
    assert entries("## 1\n\n- one\n  two\n- three\n") == ["one two", "three"]
