"""Truncating a bundle's file does not end a running process or change its results."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.ort.mapped_files import own_mapped_files

CHILD = """
import os, sys
from pathlib import Path
import numpy as np
from deeptalk_edge.runtime.backends.ort import mapped_files
from deeptalk_edge.runtime.backends.ort import graph as ort

mapped_files.MOST_BYTES = int(sys.argv[3])
replaced = []
ort.own_mapped_files = lambda place: replaced.append(mapped_files.own_mapped_files(place))
place, graph = Path(sys.argv[1]), sys.argv[2]
embed = ort.OrtGraph(place / graph, threads=1)
feeds = {"rows": np.arange(24, dtype=np.int64).reshape(1, 3, 8)}
feeds["features"] = np.zeros((3, 24), np.float32)
feeds["audio_mask"] = np.zeros(3, np.bool_)
before = embed.run(feeds)[0]
for file in place.iterdir():
    os.truncate(file, 0)
assert (embed.run(feeds)[0] == before).all()
print(sum(replaced))
"""


def run(place: Path, most_bytes: int) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CHILD, str(place), "embed.onnx", str(most_bytes)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("linked", [False, True])
def test_weights_survive_the_truncation_of_their_file(
    own_copy: Path, tmp_path: Path, linked: bool
) -> None:
    if linked:
        own_copy = own_copy.rename(tmp_path / "elsewhere")
        (tmp_path / "bundle").symlink_to(own_copy)
        own_copy = tmp_path / "bundle"
    done = run(own_copy, 1 << 40)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_weights_that_stay_mapped_end_the_process_with_their_file(own_copy: Path) -> None:
    """Shows the crash that the module prevents."""
    assert run(own_copy, 0).returncode < 0


@pytest.mark.parametrize("offset", [0, mmap.ALLOCATIONGRANULARITY])
def test_every_byte_of_a_mapping_stays_as_it_was(offset: int, tmp_path: Path) -> None:
    place, content = tmp_path / "weights", bytes(range(1, 251)) * 40
    place.write_bytes(content)
    with (
        place.open("rb") as file,
        mmap.mmap(
            file.fileno(),
            len(content) - offset,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ,
            offset=offset,
        ) as mapped,
    ):
        assert own_mapped_files(tmp_path) >= len(mapped)
        assert mapped[:] == content[offset:]
