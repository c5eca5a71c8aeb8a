"""Which machine it is, and which profile is nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices.identity import identify, l4t_release, nearest_profile, total_memory
from deeptalk_edge.devices.profile import profile_names
from tests.devices.trees import ORIN_NANO, PC, THOR, plant

GIB = 2**30


@pytest.mark.parametrize(
    ("files", "kind", "profile"),
    [(ORIN_NANO, "jetson", "orin-nano-8gb"), (THOR, "jetson", "thor"), (PC, "nvidia", "rtx-4060")],
)
def test_a_machine_is_identified_by_its_files(
    files: dict[str, str], kind: str, profile: str, tmp_path: Path
) -> None:
    machine = identify(plant(tmp_path, files), tmp_path)
    assert (machine.kind, machine.profile) == (kind, profile)
    assert len(machine.key) == 12


def test_the_key_changes_with_the_memory_size(tmp_path: Path) -> None:
    keys = set()
    for name, memory in (("a", "7802332"), ("b", "7802332"), ("c", "3901166")):
        files = ORIN_NANO | {"proc/meminfo": f"MemTotal: {memory} kB\n"}
        keys.add(identify(plant(tmp_path / name, files), tmp_path).key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("model", "gpu", "gib", "profile"),
    [
        ("NVIDIA Jetson Orin NX Developer Kit", None, 7.4, "orin-nx-8gb"),
        ("NVIDIA Jetson Orin NX Developer Kit", None, 15.3, "orin-nx-16gb"),
        ("Jetson AGX Orin", None, 61, "agx-orin-64gb"),
        ("Jetson AGX Orin", None, 30, "agx-orin-32gb"),
        ("Jetson Orin Nano", None, 3.3, "orin-nano-4gb"),
        ("NVIDIA Jetson AGX Thor", None, 60, "thor-t4000"),
        (None, "NVIDIA GeForce RTX 5090", 64, "rtx-5090"),
        (None, "NVIDIA GeForce RTX 4070 Ti", 64, "cpu-int8"),  # another card than the 4070
        (None, "NVIDIA GB10", 120, "dgx-spark"),
        (None, "NVIDIA H200", 500, "h200"),
        (None, None, 16, "cpu-int8"),
    ],
)
def test_the_nearest_profile_is_of_the_same_module(
    model: str | None, gpu: str | None, gib: float, profile: str
) -> None:
    kind = "jetson" if model else "nvidia" if gpu else "cpu"
    found = nearest_profile(kind, model, gpu, int(gib * GIB), "x86_64")
    assert found == profile
    assert found in profile_names()


def test_a_release_is_spelled_as_jetpacks_notes_do() -> None:
    assert l4t_release("# R36 (release), REVISION: 4.3, GCID: 1") == "36.4.3"
    assert l4t_release("# R36") is None


@given(st.text(max_size=100))
def test_garbage_names_no_release_and_no_memory(text: str) -> None:
    assert l4t_release(text) is None or "REVISION" in text
    assert total_memory(text) is None or "MemTotal" in text
    assert nearest_profile("jetson", text, text, None, text) in profile_names()
