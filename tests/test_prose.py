"""The form of prose: Markdown wraps at 100 columns, a changelog entry has at most 25 words, a
sentence of a docstring at most 40, and docstrings and comments use no retired phrase."""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import ROOT

COLUMNS = 100
WORDS = 25
SENTENCE_WORDS = 40
RETIRED = re.compile(r"\b(behind|stands|whoever|nobody|somebody|of its own|asks for)\b", re.I)
"""Say: after, is, the caller or the user, no one by name, separate, needs."""
MAY_USE_RETIRED = {
    "bench/noise.py": "sentences to speak",
    "tests/test_prose.py": "the phrases themselves",
}
"""Files that may, with the reason."""
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


def sources() -> Iterator[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return (name for name in listed if name and (ROOT / name).is_file())


def docstrings(source: str) -> Iterator[str]:
    """Every string that is a statement: of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield inspect.cleandoc(text)


def comments(text: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a docstring; each row of a table begins one, indented blocks are none."""
    prose = re.sub(r"^ {4}.*$", "", re.sub(r"\n {6,}", " ", docstring), flags=re.M)
    for paragraph in re.split(r"\n\s*\n|^\S+(?: \S+){0,3} {2,}", prose, flags=re.M):
        yield from re.split(r"(?<=[.!?;:])\s+", paragraph.strip())


def test_a_sentence_of_a_docstring_has_at_most_40_words() -> None:
    long = [
        f"{name}: {sentence}"
        for name in sources()
        for docstring in docstrings((ROOT / name).read_text(encoding="utf-8"))
        for sentence in sentences(docstring)
        if len(sentence.split()) > SENTENCE_WORDS
    ]
    assert not long


def test_no_docstring_or_comment_uses_a_retired_phrase() -> None:
    found = []
    for name in sources():
        text = (ROOT / name).read_text(encoding="utf-8")
        if name not in MAY_USE_RETIRED and RETIRED.search(text):
            prose = (*docstrings(text), *comments(text))
            found += [f"{name}: {line}" for line in prose if RETIRED.search(line)]
    assert not found


def test_sentences_end_at_full_stops_rows_and_blank_lines() -> None:
    docstring = (
        "One of\ntwo lines. Two.\n\n    a code block\n\nrow    three\n       goes on\nrow    four"
    )
    assert [" ".join(s.split()) for s in sentences(docstring) if s] == [
        *("One of two lines.", "Two.", "three goes on", "four")
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
