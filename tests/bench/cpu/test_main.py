"""The whole bench, at a small size and without peers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.bench.cpu.main import main
from deeptalk_edge.runtime.backends.cpu.library import LIBRARY, CpuLibrary
from tests.places import TINY


@pytest.mark.parametrize("model", ["27", "27x", "0x16", "27x16x1"])
def test_a_model_that_is_not_layers_and_experts_is_refused(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", model])
    assert f"{model}: expected LAYERSxEXPERTS" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library is not built: `make native`")
def test_a_small_model_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--like", str(TINY), "--model", "3x8", "--group", "32", "--work", str(tmp_path)]
    assert main([*flags, "--context", "16", "32", "--prefill", "4", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])["figures"]
    ours = [row for row in figures["rows"] if row["by"] == "native"]
    assert [(row["what"], row["num_rows"], row["threads"]) for row in ours] == [
        ("prefill", 4, 1),
        ("prefill", 4, 2),
        ("step", 16, 1),
        ("step", 16, 2),
        ("step", 32, 1),
        ("step", 32, 2),
    ]
    assert [frame["num_moe_layers"] for frame in figures["frames"]] == [3] * 4
    assert f"SNAC in float32, both on {CpuLibrary().path_names[0]};" in out
    assert "one frame, 1 thread(s)" in out
