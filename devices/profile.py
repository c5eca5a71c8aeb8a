"""Device profiles: what a bundle is made for, and what is known of the device and from where.

A profile is a TOML file: the choices of the export above, the facts of the device below, each fact
with its source and whether someone has confirmed it. An unknown key is refused.

    name = "orin-nano-8gb"
    summary = "Jetson Orin Nano 8 GB, Super"
    backend = "tensorrt"        # ort, cpu, tensorrt_rtx or tensorrt
    moe = "plugin"              # split, plugin or operators
    expert_residency = "paged"  # resident or paged

    [precision]
    encoder = "float16"
    ...

    [facts]                     # see devices/facts.py
    memory_bandwidth_gb_per_s = { value = 102, source = "a datasheet", confirmed = false }
    ...

    [[power_modes]]             # of a Jetson
    ...

    [paging]                    # estimates for `routes replay`, see devices/paging.py
    ...
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from deeptalk_edge.bundle.precision import CPU_KERNELS, FLOAT32, Precision
from deeptalk_edge.bundle.target import MoeForm, TargetBackend, current_name
from deeptalk_edge.devices.facts import (
    DeviceFacts,
    PowerMode,
    parse_facts,
    parse_power_modes,
)
from deeptalk_edge.devices.paging import PagingEstimates, parse_paging
from deeptalk_edge.devices.tables import fields
from deeptalk_edge.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Residency = Literal["resident", "paged"]
"""All experts stay in memory, or as many as fit, the rest read when they are needed."""

RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""What TensorRT-RTX 1.7 compiles for; no Jetson is among them."""

_MOE_FORMS: dict[str, tuple[str, ...]] = {
    "ort": ("split",),
    "cpu": ("split",),
    "tensorrt_rtx": ("operators", "plugin"),
    "tensorrt": ("plugin", "operators"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimits:
    """What the accuracy gate of a calibration allows beside the float model: `[gate]`.

    Means over held-out utterances, on this device's precision. KL divergence is in nats a row.
    """

    text_kl: float = 0.1
    code_kl: float = 0.1
    text_agreement: float = 0.95
    code_agreement: float = 0.85
    router_agreement: float = 0.8
    text_accuracy_drop: float = 0.05
    word_error_rise: float = 0.05

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise ValueError(f"gate.{name} = {value!r}: expected a number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One device and how bundles are made for it."""

    name: str
    summary: str
    backend: TargetBackend
    moe: MoeForm
    expert_residency: Residency
    precision: Precision
    facts: DeviceFacts
    power_modes: tuple[PowerMode, ...] = ()
    paging: PagingEstimates | None = None
    """Of those that `routes replay` can simulate."""
    gate: GateLimits = dataclasses.field(default_factory=GateLimits)

    def __post_init__(self) -> None:
        for name in ("name", "summary"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected text")
        choices = {"backend": TargetBackend, "moe": MoeForm, "expert_residency": Residency}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} = {getattr(self, name)!r}: known are {known}")
        if self.moe not in _MOE_FORMS[self.backend]:
            known = " or ".join(_MOE_FORMS[self.backend])
            raise ValueError(f"moe = {self.moe!r} with backend {self.backend}: expected {known}")
        if self.precision.kv_cache == "int8" and self.backend != "cpu":
            raise ValueError(
                f"kv_cache = int8 with backend {self.backend}: only our CPU kernels keep such a "
                "cache; choose float32 (ort), float16 (engines) or backend cpu"
            )
        if self.backend == "ort" and self.precision != FLOAT32:
            raise ValueError("a bundle for backend ort is float32 throughout; set every precision")
        if self.backend == "cpu" and not _is_for_cpu(self.precision):
            raise ValueError(
                "a bundle for backend cpu has the codec in float32, decoder and head in int8, "
                "the encoder in float32 or int8, experts in int8 or int4, kv_cache in bfloat16 or "
                "int8; set every precision"
            )
        if self.has_engines and not self.targets:
            raise ValueError(
                f"backend {self.backend} needs a GPU and {self.name} states no "
                "compute_capabilities; use backend ort"
            )
        if self.backend == "tensorrt_rtx" and (wrong := set(self.targets) - set(RTX_TARGETS)):
            raise ValueError(
                f"TensorRT-RTX does not build for {', '.join(sorted(wrong))}, only for "
                f"{', '.join(RTX_TARGETS)}; use backend tensorrt on the device"
            )

    @property
    def has_engines(self) -> bool:
        """Its bundles hold TensorRT's engines, not graphs for ONNX Runtime."""
        return self.backend in ("tensorrt_rtx", "tensorrt")

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities to build for; none without a GPU."""
        fact = self.facts.compute_capabilities
        return fact.value if fact else ()

    def on_backend(self, backend: TargetBackend) -> DeviceProfile:
        """The same device through another backend, whose first MoE form it takes.

        Raises SettingsError if the device has none such.
        """
        if backend == self.backend:
            return self
        precision = {"ort": FLOAT32, "cpu": CPU_KERNELS}.get(backend, self.precision)
        moe: Any = _MOE_FORMS[backend][0]
        try:
            return dataclasses.replace(self, backend=backend, moe=moe, precision=precision)
        except ValueError as error:
            raise SettingsError(f"device {self.name}: {error}") from error

    def with_precision(self, changes: Sequence[str]) -> DeviceProfile:
        """The same device with other precisions, each "part=dtype"; "experts=int4:128" names int4's
        group as well.

        Raises SettingsError if a part or its precision is unknown.
        """
        try:
            return dataclasses.replace(self, precision=self.precision.changed(changes))
        except ValueError as error:
            raise SettingsError(f"device {self.name}: {error}") from error


def _is_for_cpu(precision: Precision) -> bool:
    """Our CPU kernels have it, and ONNX Runtime the encoder: they leave encoder, experts and cache
    to be chosen."""
    chosen = dataclasses.replace(
        CPU_KERNELS,
        encoder=precision.encoder,
        experts=precision.experts,
        expert_group=precision.expert_group,
        kv_cache=precision.kv_cache,
    )
    return (
        precision == chosen
        and precision.encoder in ("float32", "int8")
        and precision.experts in ("int8", "int4")
        and precision.kv_cache in ("bfloat16", "int8")
    )


def profile_names() -> list[str]:
    """The profiles that come with the package, and the user's own."""
    entries = [*_shipped().iterdir(), *_own_files()]
    return sorted({e.name.removesuffix(".toml") for e in entries if e.name.endswith(".toml")})


def user_directory() -> Path:
    """Where a user's own profiles are: a file dropped there is a device. Source: the XDG base
    directory specification."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "deeptalk-edge" / "devices"


def load_profile(name_or_path: str) -> DeviceProfile:
    """A profile by its name, the user's own before those of the package, or by the path of its
    TOML file.

    Raises SettingsError if there is none such or it holds something that we cannot use.
    """
    own = {path.name.removesuffix(".toml"): path for path in _own_files()}
    if name_or_path in own:
        return _read_profile(own[name_or_path])
    if name_or_path in (names := profile_names()):
        text = _shipped().joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse_profile(text, name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise SettingsError(
            f"device {name_or_path!r}: neither a profile ({', '.join(names)}) nor a TOML file"
        )
    return _read_profile(path)


def _read_profile(path: Path) -> DeviceProfile:
    try:
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable ({error})") from error


def parse_profile(text: str, place: str) -> DeviceProfile:
    """Read a profile; `place` is named in errors.

    Raises SettingsError if it is not TOML, a key is unknown or missing, or a value is wrong.
    """
    try:
        content = tomllib.loads(text)
        content["precision"] = Precision(**fields(Precision, content, "precision"))
        content["gate"] = GateLimits(**fields(GateLimits, content, "gate"))
        for field in ("backend", "moe"):
            if isinstance(content.get(field), str):
                content[field] = current_name(field, content[field])
        content["facts"] = parse_facts(content)
        if "power_modes" in content:
            content["power_modes"] = parse_power_modes(content["power_modes"])
        if "paging" in content:
            content["paging"] = parse_paging(content)
        return DeviceProfile(**fields(DeviceProfile, {"profile": content}, "profile"))
    except (ValueError, TypeError) as error:  # TOML's own error is a ValueError
        raise SettingsError(f"{place}: {error}") from error


def _shipped() -> Any:
    return resources.files("deeptalk_edge.devices") / "profiles"


def _own_files() -> list[Path]:
    try:
        return [path for path in user_directory().iterdir() if path.suffix == ".toml"]
    except OSError:  # most users have none
        return []
