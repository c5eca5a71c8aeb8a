"""Python faults change one line each, compile, and skip code that tests need not notice."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from deeptalk_edge.bench.mutants.python_faults import python_faults
from tests.places import ROOT


def lines_after(text: str, operator: str) -> list[str]:
    return [f.after.strip() for f in python_faults("x.py", text) if f.operator == operator]


@pytest.mark.parametrize(
    ("operator", "before", "after"),
    [
        ("comparison", "a = b < c", "a = b <= c"),
        ("comparison", "a = b is not None", "a = b is None"),
        ("comparison", "a = b not in c", "a = b in c"),
        ("comparison", "a = (b) == (c)", "a = (b) != (c)"),
        ("arithmetic", "a = b + c", "a = b - c"),
        ("arithmetic", "a = b / c", "a = b * c"),
        ("arithmetic", "a = f(b)[0] // c", "a = f(b)[0] * c"),
        ("arithmetic", "a += b", "a -= b"),
        ("and, or", "a = b and c", "a = b or c"),
        ("constant", "a = 7", "a = 8"),
        ("constant", "a = 0.5", "a = 5.0"),
        ("constant", "def f(a=True): return a", "def f(a=False): return a"),
        ("dropped not", "a = not (b or c)", "a = (b or c)"),
        ("opposite function", "a = np.minimum(b, c)", "a = np.maximum(b, c)"),
        ("swapped arguments", "a = f(b, c.d)", "a = f(c.d, b)"),
        ("removed statement", "a.b = c", "pass"),
        ("removed statement", "a.clear()", "pass"),
        ("comparison", 'a = "ä" + b if b < c else d', 'a = "ä" + b if b <= c else d'),
    ],
)
def test_an_operator_changes_one_place(operator: str, before: str, after: str) -> None:
    assert lines_after(before, operator) == [after]


def test_a_guard_loses_its_return_and_its_condition_is_inverted() -> None:
    text = "def f(a):\n    if a:\n        return 1\n    return 2\n"
    assert lines_after(text, "dropped return") == ["pass"]
    assert lines_after(text, "negated condition") == ["if not (a):"]


def test_a_procedure_returns_before_its_end() -> None:
    text = "def f() -> None:\n    a.b()\n    c.d()\n"
    assert lines_after(text, "early return") == ["return"]  # not at the last statement


@pytest.mark.parametrize(
    "text",
    [
        'log.info("%d", 1 + a)',
        "raise ValueError(a + 1)",
        'f"{a + 1}"',
        "assert a < 1",
        "if TYPE_CHECKING:\n    a = 1",
        'if __name__ == "__main__":\n    a = 1',
        "def f(a: int | float) -> int | None: ...",
        "@dataclass(frozen=True)\nclass A: ...",
        "thread(daemon=True)[b]",
        '"""1 + 1"""',
        "import a\nfrom b import c",
    ],
)
def test_code_that_tests_need_not_notice_has_no_faults(text: str) -> None:
    assert python_faults("x.py", text) == []


@pytest.mark.parametrize(
    "path", ["runtime/loop/states.py", "export/graphs/step.py", "deeptalk_edge/schema.py"]
)
def test_a_fault_changes_one_line_of_a_real_source_and_compiles(path: str) -> None:
    text = Path(ROOT, path).read_text("utf-8")
    faults = python_faults(path, text)
    assert len({fault.operator for fault in faults}) >= 8
    for fault in faults[:: len(faults) // 20]:
        faulty = fault.planted_in(text)
        ast.parse(faulty)
        changed = [a != b for a, b in zip(text.split("\n"), faulty.split("\n"), strict=True)]
        assert sum(changed) == 1


def test_a_fault_is_not_planted_in_a_source_that_has_changed() -> None:
    fault = python_faults("x.py", "a = 1")[0]
    assert fault.planted_in("a = 1") == "a = 2"
    with pytest.raises(ValueError, match=r"x\.py:1"):
        fault.planted_in("a = 3")
    assert "-a = 1\n+a = 2" in fault.diff("a = 1")
