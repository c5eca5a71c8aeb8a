"""Finds the possible one-line faults of a C++ source, line by line.

Strings, comments, preprocessor lines and code that this machine does not compile are blanked first.
The sources are formatted, so spaces tell an operator from a template's bracket or a pointer's star.
A fault that does not compile is dropped when it is built.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from enum import Enum

from deeptalk_edge.bench.mutants.fault import Fault

_MACROS = {
    "x86_64": {"__x86_64__", "__AVX2__", "__AVXVNNI__", "__AVX512VNNI__", "__AVX512BF16__"},
    "aarch64": {"__aarch64__", "__ARM_FEATURE_DOTPROD", "__ARM_FEATURE_MATMUL_INT8"},
}

_EXCHANGES = (
    ("comparison", " < ", " <= "),
    ("comparison", " <= ", " < "),
    ("comparison", " > ", " >= "),
    ("comparison", " >= ", " > "),
    ("comparison", " == ", " != "),
    ("comparison", " != ", " == "),
    ("and, or", " && ", " || "),
    ("and, or", " || ", " && "),
    ("arithmetic", " + ", " - "),
    ("arithmetic", " - ", " + "),
    ("arithmetic", " * ", " / "),
    ("arithmetic", " / ", " * "),
    ("arithmetic", " % ", " / "),
    ("arithmetic", " += ", " -= "),
    ("arithmetic", " << ", " >> "),
    ("arithmetic", " >> ", " << "),
    ("arithmetic", " & ", " | "),
    ("arithmetic", " | ", " & "),
    ("opposite function", "min_of(", "max_of("),
    ("opposite function", "max_of(", "min_of("),
    ("opposite function", "min(", "max("),
    ("opposite function", "max(", "min("),
)
_LEFT_OUT = re.compile(
    r"static_assert|\bthrow\b|\bassert\(|\busing\b|\btemplate\b|\boperator\b|\bextern\b|\bdelete\b"
)
_NUMBER = re.compile(r"(?<![\w.])(\d+)(?![\w.'])|(?<![\w.])(\d*\.\d+|\d+\.)(f?)(?![\w.])")
_STATEMENT = re.compile(
    r"^\s*(?!return\b|break\b|continue\b|goto\b)[\w:.>\[\]*()-]+(\(| [-+*/|&^]?= ).*;$"
)
_DECLARES = re.compile(r"^\s*(const|constexpr|auto|static|[\w:<>]+[&*]?) [\w*&]+( =|\()")
_NOT = re.compile(r"(?<=[\s(&|])!(?=[\w(])")


class _Branch(Enum):
    """State within an #if: the compiled branch, before it, or after it."""

    WAITING = 0
    TAKEN = 1
    PASSED = 2

    def next(self) -> _Branch:
        return _Branch.WAITING if self is _Branch.WAITING else _Branch.PASSED


def cpp_faults(path: str, text: str, machine: str = platform.machine()) -> list[Fault]:
    """Return all possible faults of `text`, the source of `path`, in the order of its lines."""
    faults = []
    lines, code = text.split("\n"), code_of(text, machine)
    for number, (before, line) in enumerate(zip(lines, code, strict=True), 1):
        if _LEFT_OUT.search(line):
            continue
        previous = next((each for each in reversed(code[: number - 1]) if each.strip()), ";")
        for operator, start, end, new in _changes(line, previous.rstrip()):
            after = before[:start] + new + before[end:]
            faults.append(
                Fault(path=path, line=number, operator=operator, before=before, after=after)
            )
    return sorted(set(faults))


def code_of(text: str, machine: str) -> list[str]:
    """Return the lines of `text` with their lengths, blank where this machine compiles nothing."""
    blanked = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', _blank, text, flags=re.DOTALL)
    branches, lines, is_continued = list[_Branch](), list[str](), False
    for line in blanked.split("\n"):
        directive = re.match(r"\s*#\s*(\w+)(.*)", line)
        if directive:
            _follow(branches, directive[1], directive[2], machine)
        is_code = not directive and not is_continued
        is_code = is_code and all(branch is _Branch.TAKEN for branch in branches)
        lines.append(line if is_code else " " * len(line))
        is_continued = line.endswith("\\") and bool(directive or is_continued)
    return lines


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _follow(branches: list[_Branch], directive: str, condition: str, machine: str) -> None:
    """Follow #if, #else and #endif. Unknown macros count as undefined."""
    defined = _MACROS.get(machine, set()) | {"__cplusplus"}
    names = set(re.findall(r"\b(?!defined\b)[A-Za-z_]\w+", condition))
    holds = names <= defined if directive != "ifndef" else not names <= defined
    if directive in ("if", "ifdef", "ifndef"):
        branches.append(_Branch.TAKEN if holds else _Branch.WAITING)
    elif directive in ("else", "elif"):
        waits = branches[-1] is _Branch.WAITING
        branches[-1] = _Branch.TAKEN if waits and holds else branches[-1].next()
    elif directive == "endif":
        branches.pop()


def _changes(line: str, previous: str) -> Iterator[tuple[str, int, int, str]]:
    """Return (operator, start, end, new text) of each possible change."""
    for operator, old, new in _EXCHANGES:
        boundary = r"\b" if old[0].isalpha() else ""
        for found in re.finditer(boundary + re.escape(old), line):
            yield operator, found.start(), found.end(), new
    for found in _NUMBER.finditer(line):
        if "#" not in line:
            yield "constant", found.start(), found.end(), _other_number(found)
    for found in _NOT.finditer(line):
        yield "dropped not", found.start(), found.end(), ""
    is_whole = line.count("(") == line.count(")") and previous[-1:] in (";", "{", "}", ":", "")
    if is_whole and _STATEMENT.match(line) and not _DECLARES.match(line):
        indent = len(line) - len(line.lstrip())
        yield "removed statement", indent, len(line.rstrip()), ";"


def _other_number(found: re.Match[str]) -> str:
    if found[1] is not None:
        return str(int(found[1]) + 1)
    value = float(found[2])
    return f"{value * 10 if value else 1.0!r}{found[3]}"
