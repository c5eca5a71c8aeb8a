"""An export holds one layer at a time: its peak does not follow the number of layers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.export.checkpoints import write_checkpoint
from tests.places import ROOT
from tests.specs import PLAIN

MB = 10**6

WIDE = replace(
    PLAIN.decoder,
    width=512,
    dense_ffn_width=1024,
    expert_ffn_width=512,
    num_experts=8,
    num_shared_experts=2,
)
LAYER_MB = 12 * 3 * 512 * 512 * 4 / MB  # experts, shared ones and attention, roughly

# Peak anonymous memory, sampled: mapped pages of checkpoint and bundle are the kernel's to drop.
PROGRAM = """
import re, sys, threading, time
from pathlib import Path
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle

settings = ExportSettings(profile=load_profile(sys.argv[3]))

def held_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

peak = 0.0
def watch():
    global peak
    while True:
        peak = max(peak, held_mb())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), settings)
print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("device", ["cpu", "cpu-int8", "agx-orin-64gb"])
def test_the_peak_does_not_follow_the_number_of_layers(device: str, tmp_path: Path) -> None:
    peaks = {layers: _peak_mb(layers, device, tmp_path) for layers in (2, 8)}
    print(peaks)  # shown by pytest -rP
    assert peaks[8] - peaks[2] < LAYER_MB / 2


def _peak_mb(num_layers: int, device: str, tmp_path: Path) -> float:
    spec = replace(PLAIN, decoder=replace(WIDE, num_layers=num_layers))
    checkpoint = write_checkpoint(tmp_path / f"{num_layers} layers", spec).place
    arguments = [str(checkpoint), str(tmp_path / f"b{num_layers}"), device]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    # glibc keeps up to 32 MB of freed pieces each for reuse, between 0 and 100 MB from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(finished.stdout)
