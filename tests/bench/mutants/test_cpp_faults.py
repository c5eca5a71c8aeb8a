"""C++ faults change one line each and only code that is compiled here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deeptalk_edge.bench.mutants.cpp_faults import code_of, cpp_faults
from tests.places import ROOT


@pytest.mark.parametrize(
    ("operator", "before", "after"),
    [
        ("comparison", "if (a < b) return;", "if (a <= b) return;"),
        ("arithmetic", "x = a * b[i];", "x = a / b[i];"),
        ("and, or", "return a && b;", "return a || b;"),
        ("constant", "for (int i = 0; i < n; ++i) f(i);", "for (int i = 1; i < n; ++i) f(i);"),
        ("constant", "y = 0.5f;", "y = 5.0f;"),
        ("dropped not", "if (!done) return;", "if (done) return;"),
        ("opposite function", "n = std::min(a, b);", "n = std::max(a, b);"),
        ("removed statement", "a.push_back(b);", ";"),
    ],
)
def test_an_operator_changes_one_place(operator: str, before: str, after: str) -> None:
    faults = cpp_faults("x.cpp", before)
    assert [f.after for f in faults if f.operator == operator] == [after]


@pytest.mark.parametrize(
    "text",
    [
        "// a < 1",
        "/* a\n < 1 */",
        "#define A 1",
        "static_assert(a < 1);",
        'throw Refusal("1 < 2");',
        "std::vector<int> f(const float* x);",
        "#if defined(__CUDACC__)\na = b + 1;\n#endif",
        "#ifdef __aarch64__\na = b + 1;\n#endif",
    ],
)
def test_code_that_no_test_here_can_run_has_no_faults(text: str) -> None:
    assert cpp_faults("x.cpp", text, machine="x86_64") == []


def test_the_branch_that_this_machine_compiles_is_code() -> None:
    text = (
        "#if defined(__aarch64__)\na = 1;\n#elif defined(__x86_64__)\nb = 2;\n#else\nc = 3;\n#endif"
    )
    seen = [line for line in code_of(text, "aarch64") if line.strip()]
    assert seen == ["a = 1;"]
    text = "#ifdef __CUDACC__\na = 1;\n#else\nb = 2;\n#endif"
    assert [line for line in code_of(text, "x86_64") if line.strip()] == ["b = 2;"]


def test_most_faults_of_a_real_source_compile() -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    path = Path(ROOT, "native/cpu/latent_cache.cpp")
    text = path.read_text("utf-8")
    faults = cpp_faults("native/cpu/latent_cache.cpp", text)
    assert len({fault.operator for fault in faults}) >= 6
    for fault in faults[:: len(faults) // 3]:
        faulty = fault.planted_in(text)
        changed = [a != b for a, b in zip(text.split("\n"), faulty.split("\n"), strict=True)]
        assert sum(changed) == 1
        command = [
            compiler,
            "-std=c++17",
            "-fsyntax-only",
            "-I",
            str(path.parent),
            "-x",
            "c++",
            "-",
        ]
        assert subprocess.run(command, input=faulty, text=True, check=False).returncode == 0
