"""What is built is kept: once for all who ask, again for other sources or flags."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from native.cpu import build as builds


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_other_sources_flags_or_paths_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(target: Path, *_: object, **__: object) -> None:
        built.append(target)
        target.touch()

    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.h").write_text("1")
    monkeypatch.setattr(builds, "SOURCES", sources)
    monkeypatch.setattr(builds, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(builds, "build", build)
    first = builds.kept()
    assert builds.kept() == builds.kept(shutil.which("c++") or "") == first
    assert built == [first]
    builds.kept(flags=("-O0",))
    builds.kept(x86_paths=["avx2"])
    builds.kept(is_check=True)
    (sources / "a.h").write_text("2")
    builds.kept()
    assert len(set(built)) == len(built) == 5


def test_who_asks_while_it_is_made_waits_for_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(place: Path) -> None:
        made.append(place)
        time.sleep(0.2)
        place.touch()

    place = tmp_path / "folder" / "made"
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: builds.made_once(place, make), range(4))) == [place] * 4
    assert made == [place]
