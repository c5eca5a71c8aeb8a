"""Which machine this is: its kind, its names, and the profile that describes such machines.

Jetson   device tree and L4T release; the memory tells apart modules that share a name
card     what NVML says of an NVIDIA GPU; without nvidia-ml-py, what the driver's /proc says
CPU      /proc/cpuinfo
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge import host
from deeptalk_edge.devices.reading import Reading, first_of, integer, read_file

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What stays the same until someone changes the hardware."""

    kind: str
    """jetson, nvidia or cpu."""
    model: Reading[str]
    processor: str
    architecture: str
    num_cores: int
    """That this process may use."""
    memory_bytes: Reading[int]
    storage: Reading[str]
    """The disk under the working directory: name and model."""
    gpu: Reading[str]
    l4t: Reading[str]
    profile: str
    """The name of the profile that is nearest."""

    @property
    def key(self) -> str:
        """Short and stable: the same machine with the same memory and disk."""
        model = f"{self.model.value or self.processor} {self.gpu.value or ''}"
        text = "\n".join((model, str(self.memory_bytes.value or 0), self.storage.value or ""))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def identify(root: Path = Path("/"), place: Path | None = None) -> Machine:
    """Identify the machine whose files lie below `root`; `place` is where bundles are read from."""
    model = first_of(
        [
            read_file(root / "proc/device-tree/model"),
            read_file(root / "sys/class/dmi/id/product_name"),
        ],
        "no device tree and no DMI",
    )
    l4t = read_file(root / "etc/nv_tegra_release").then(l4t_release, "nv_tegra_release")
    memory = read_file(root / "proc/meminfo").then(total_memory, "meminfo")
    gpu = nvidia_gpu(root)
    is_jetson = l4t.value is not None or is_tegra(model.value or "")
    kind = "jetson" if is_jetson else "nvidia" if gpu.value else "cpu"
    architecture = platform.machine()
    return Machine(
        kind=kind,
        model=model,
        processor=host.processor(),
        architecture=architecture,
        num_cores=host.num_cores(),
        memory_bytes=memory,
        storage=disk_of(place or Path.cwd(), root),
        gpu=gpu,
        l4t=l4t,
        profile=nearest_profile(kind, model.value, gpu.value, memory.value, architecture),
    )


def l4t_release(text: str) -> str | None:
    """`36.4.3` of `# R36 (release), REVISION: 4.3, GCID: ...`."""
    found = re.search(r"R(\d{1,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3})*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def total_memory(text: str) -> int | None:
    """Bytes of `MemTotal`."""
    found = re.search(r"^MemTotal:\s+(\d{1,15}) kB", text, re.MULTILINE)
    return integer(found[1]) * 1024 if found else None


def is_tegra(model: str) -> bool:
    """By the device tree's model."""
    return re.search(r"\b(Jetson|Orin|AGX Thor)\b", model) is not None


def nvidia_gpu(root: Path = Path("/")) -> Reading[str]:
    """The name of the first GPU, as the driver's /proc has it."""
    folder = root / "proc/driver/nvidia/gpus"
    try:
        places = sorted(folder.iterdir())
    except OSError:
        return Reading(None, f"{folder}: not there; no NVIDIA driver is loaded")
    readings = [
        read_file(place / "information").then(
            lambda text: (
                found[1].strip()
                if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))
                else None
            ),
            "the GPU's model",
        )
        for place in places
    ]
    return first_of(readings, f"{folder}: empty")


_JETSONS = (
    # Part of the model's name, memory in GiB from which on, profile.
    ("thor", 80, "thor"),
    ("thor", 0, "thor-t4000"),
    ("t5000", 0, "thor"),
    ("t4000", 0, "thor-t4000"),
    ("agx orin", 40, "agx-orin-64gb"),
    ("agx orin", 0, "agx-orin-32gb"),
    ("orin nx", 10, "orin-nx-16gb"),
    ("orin nx", 0, "orin-nx-8gb"),
    ("orin nano", 5, "orin-nano-8gb"),
    ("orin nano", 0, "orin-nano-4gb"),
)
_CARDS = (
    *("rtx 3060", "rtx 4060", "rtx 4070", "rtx 4090", "rtx 5060", "rtx 5090"),
    *("rtx 4000 ada", "h100", "h200"),
)


def nearest_profile(
    kind: str, model: str | None, gpu: str | None, memory_bytes: int | None, architecture: str
) -> str:
    """The shipped profile for such a machine; a CPU's where no other is nearer."""
    name, gib = (model or "").lower(), (memory_bytes or 0) / _GIB
    if kind == "jetson":
        for part, least_gib, profile in _JETSONS:
            if part in name and gib >= least_gib:
                return profile
    card = (gpu or "").lower()
    if "gb10" in card:
        return "dgx-spark"
    if "a2000" in card:
        return "rtx-a2000-12gb"
    for part in _CARDS:
        if re.search(rf"{part}(?! ti| super)", card):
            return part.replace(" ", "-")
    return "arm-cpu" if architecture in ("aarch64", "arm64") else "cpu-int8"


def disk_of(place: Path, root: Path = Path("/")) -> Reading[str]:
    """The disk below a path: its device's name and, where the kernel says it, its model."""
    try:
        device = os.stat(place).st_dev
    except OSError as error:
        return Reading(None, f"{place}: {error.strerror}")
    folder = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    try:
        block = folder.resolve(strict=True)
    except OSError:
        return Reading(None, f"{place}: on no block device that this system shows")
    for candidate in (block, block.parent):
        model = read_file(candidate / "device/model")
        if model.value:
            return Reading(f"{candidate.name} {model.value}")
    return Reading(block.name)
