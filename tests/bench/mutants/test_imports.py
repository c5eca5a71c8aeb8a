"""Without a recording, the tests nearest to a source by imports are chosen."""

from __future__ import annotations

from pathlib import Path

from deeptalk_edge.bench.mutants.imports import importing

FILES = {
    "runtime/ring.py": "",
    "runtime/loop.py": "import deeptalk_edge.runtime.ring",
    "runtime/command.py": "from deeptalk_edge.runtime import loop",
    "tests/fed.py": "from deeptalk_edge.runtime.ring import Ring",
    "tests/test_ring.py": "from tests.fed import fed",
    "tests/test_loop.py": "import deeptalk_edge.runtime.loop",
    "tests/test_cli.py": 'run("-m", "deeptalk_edge.runtime.command")',
}


def test_a_source_gets_the_nearest_tests_and_those_one_import_farther(
    tmp_path: Path,
) -> None:
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    steps = {test.path: test.steps for test in importing(tmp_path, {})}
    assert steps["tests/test_ring.py"] == {"runtime/ring.py": 0}  # through a helper
    assert steps["tests/test_loop.py"] == {"runtime/loop.py": 0, "runtime/ring.py": 1}
    assert steps["tests/test_cli.py"] == {"runtime/command.py": 0, "runtime/loop.py": 1}
