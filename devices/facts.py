"""What is known of a device, each fact with its source.

    memory_bandwidth_gb_per_s = { value = 102, source = "datasheet", confirmed = true,
                                  address = "https://...", date = "2026-11-30" }

A fact is confirmed by an address and the date on which it was read there, or by `measured`, the
command that measured it. Anything else is a claim or a guess, and what rests on it is marked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from deeptalk_edge.devices.tables import fields, positive

Value = TypeVar("Value", covariant=True)

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4", "float8", "float4")
"""Of products, as `precisions` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact(Generic[Value]):
    """Something said of a device."""

    value: Value
    source: str
    """Where it was read or how it was reckoned."""
    confirmed: bool
    """Read at `address` on `date`, or measured; else written down from memory, or a guess: look it
    up before you rest a decision on it."""
    address: str | None = None
    date: str | None = None
    """2026-11-30."""
    measured: str | None = None
    """The command that measured it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """None: the device has no such thing, or nothing is known before it runs."""

    compute_capabilities: Fact[tuple[str, ...]] | None = None
    """Of its GPU, as compilers spell them: `sm_87`."""
    memory_bytes: Fact[int] | None = None
    usable_memory_bytes: Fact[int] | None = None
    """What is left for one process beside the system."""
    memory_shared: Fact[bool] | None = None
    """CPU and GPU share one memory."""
    memory_bandwidth_gb_per_s: Fact[float] | None = None
    """In the best power mode."""
    float32_tflops: Fact[float] | None = None
    """Dense rates, here and below."""
    float16_tflops: Fact[float] | None = None
    int8_tops: Fact[float] | None = None
    int4_tops: Fact[float] | None = None
    float8_tflops: Fact[float] | None = None
    float4_tflops: Fact[float] | None = None
    activations_g_per_s: Fact[float] | None = None
    """10^9 of the codec's Snake activations in a second, through our CPU kernels."""
    precisions: Fact[tuple[str, ...]] | None = None
    """What its products can be computed in."""
    pcie: Fact[str] | None = None
    """Generation and lanes: `4.0 x8`."""
    host_link_gb_per_s: Fact[float] | None = None
    """Pinned host memory to the device's own."""
    disk_read_gb_per_s: Fact[float] | None = None
    """Sequential, of the disk that such a device usually has; measure it at install."""
    storage: Fact[tuple[str, ...]] | None = None
    """Kinds of disk that it takes: nvme, sd, emmc."""
    jetpack: Fact[str] | None = None
    tensorrt: Fact[str] | None = None
    cuda: Fact[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMode:
    """A mode of nvpmodel. Set it by name: the numbers differ between boards."""

    name: str
    source: str
    confirmed: bool
    id: int | None = None
    watts: float | None = None
    gpu_max_mhz: int | None = None
    """None: not capped, or not known."""
    memory_bandwidth_gb_per_s: float | None = None
    """Where the mode caps the memory clock; else the device's."""
    is_default: bool = False
    address: str | None = None
    date: str | None = None


def parse_facts(content: Mapping[str, Any]) -> DeviceFacts:
    """Of the table `facts`. Raises ValueError naming the fact that is wrong."""
    found = fields(DeviceFacts, content, "facts")
    return DeviceFacts(**{name: _fact(name, found[name]) for name in found})


def parse_power_modes(content: Any) -> tuple[PowerMode, ...]:
    """Of the tables `[[power_modes]]`. Raises ValueError naming the mode that is wrong."""
    if not isinstance(content, list):
        raise ValueError(f"power_modes is {content!r}, expected tables: [[power_modes]]")
    modes = tuple(_power_mode(table) for table in content)
    if len({mode.name for mode in modes}) < len(modes):
        raise ValueError("power_modes: two have one name")
    return modes


def _power_mode(content: Any) -> PowerMode:
    parts = fields(PowerMode, {"power_modes": content}, "power_modes")
    place = f"power_modes {parts['name']!r}"
    _check_source(place, parts)
    for name, kind in (("watts", float), ("gpu_max_mhz", int)):
        if name in parts:
            positive(f"{place}: {name}", kind, parts[name])
    if "memory_bandwidth_gb_per_s" in parts:
        positive(f"{place}: memory_bandwidth_gb_per_s", float, parts["memory_bandwidth_gb_per_s"])
    return PowerMode(**parts)


def _fact(name: str, content: Any) -> Fact[Any]:
    parts = fields(Fact, {name: content}, name)
    kind = get_args(get_args(get_type_hints(DeviceFacts)[name])[0])[0]
    _check_source(name, parts)
    return Fact(**{**parts, "value": _checked(name, kind, parts["value"])})


def _check_source(name: str, parts: Mapping[str, Any]) -> None:
    if not isinstance(parts["source"], str) or not parts["source"].strip():
        raise ValueError(f"{name}.source is {parts['source']!r}: say where the value comes from")
    if not isinstance(parts["confirmed"], bool):
        raise ValueError(f"{name}.confirmed is {parts['confirmed']!r}, expected true or false")
    for key in ("address", "date", "measured"):
        if not isinstance(parts.get(key, ""), str):
            raise ValueError(f"{name}.{key} is {parts[key]!r}, expected text")
    date, address = parts.get("date", ""), parts.get("address", "")
    if date and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        raise ValueError(f"{name}.date is {date!r}, expected a day such as 2026-11-30")
    is_read = address.startswith(("https://", "http://")) and date
    if parts["confirmed"] and not (is_read or parts.get("measured")):
        raise ValueError(
            f"{name} is confirmed without evidence: give the address and the date on which you "
            "read it, or the command that measured it; else confirmed = false"
        )


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A fact's value in its type; amounts are above zero."""
    if get_origin(kind) is tuple:
        return _names(name, value)
    if kind in (int, float):
        return positive(f"{name}.value", kind, value)
    if not isinstance(value, kind):
        expected = "true or false" if kind is bool else "text"
        raise ValueError(f"{name}.value is {value!r}, expected {expected}")
    return value


_EXAMPLES = {
    "compute_capabilities": '["sm_87"]',
    "precisions": '["float16", "int8"]',
    "storage": '["nvme"]',
}


def _names(name: str, value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if not is_list or not all(map(_RULES[name], value)):
        raise ValueError(f"{name}.value is {value!r}, expected a list such as {_EXAMPLES[name]}")
    return tuple(value)


_RULES = {
    "compute_capabilities": lambda item: item.startswith("sm_") and item[3:].isdigit(),
    "precisions": lambda item: item in PRECISIONS,
    "storage": lambda item: item in ("nvme", "sata", "sd", "emmc"),
}
