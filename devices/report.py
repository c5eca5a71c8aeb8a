"""What `profile` measured, as the file that travels: JSON of a published, versioned schema.

The dataclasses are the schema: `read_report` checks a file against them, and
devices/schemas/profile-1.json is generated from them (`json_schema`). Units are in the names. A
figure that is not there is null, and `missing` or a `why_...` beside it says why.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import Between, Text, from_json, read_json

SCHEMA = "deeptalk-edge.profile/1"
LEAST_FOR_P99 = 100

Count = Annotated[int, Between(0, 1 << 53)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One figure over all turns that have it."""

    n: Count
    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None
    why_no_p99: str | None = None


def distribution(values: Sequence[float | None]) -> Distribution:
    """Of the values that are there; p99 from 100 samples on."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return Distribution(
            n=0,
            mean=None,
            p50=None,
            p90=None,
            p95=None,
            p99=None,
            max=None,
            why_no_p99="no turn has it",
        )
    p50, p90, p95, p99 = (float(np.percentile(known, percent)) for percent in (50, 90, 95, 99))
    is_enough = len(known) >= LEAST_FOR_P99
    return Distribution(
        n=len(known),
        mean=float(np.mean(known)),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99 if is_enough else None,
        max=max(known),
        why_no_p99=None if is_enough else f"{len(known)} samples, needs {LEAST_FOR_P99}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How the machine was set and how it felt, at the start or at the end."""

    power_mode: str | None
    governor: str | None
    cpu_mhz: float | None
    """Mean of the cores."""
    gpu_mhz: float | None
    emc_mhz: float | None
    hottest_c: float | None
    throttled: int | None
    """Times so far, or bits of the reasons that hold now."""
    missing: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The machine."""

    profile: str
    """Of such machines."""
    kind: Literal["jetson", "nvidia", "cpu"]
    model: str | None
    processor: str
    num_cores: Count
    memory_bytes: Count | None
    storage: str | None
    gpu: str | None
    l4t: str | None
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleUsed:
    """What ran, and how."""

    path: str
    sha256: str
    backend: str
    kernel_path: str | None
    threads: Count
    mode: str
    precision: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What was asked."""

    port: Literal["wav", "microphone"]
    turns: Count
    warmup_turns: Count
    cut_s: float | None
    """Answers are interrupted after so much sound; None: heard to their end."""
    questions: tuple[str, ...]
    """Files, each as `name sha256`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What paging did in all counted turns; null where the backend does not say."""

    hits: Count | None
    misses: Count | None
    hit_share: float | None
    """Null where nothing was requested: every expert was in memory."""
    loaded_bytes: Count | None
    stall_ms: float | None
    slots: Count | None
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """By source."""

    peak_resident_mb: float | None
    before_mb: float | None
    """Of the process before the bundle was opened."""
    parts_mb: Mapping[str, float] = field(default_factory=dict)
    """Computed from the bundle: weights, cache, workspace, experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """While turns ran."""

    method: str | None
    mean_w: float | None
    energy_j_per_turn: Distribution | None
    """From the question's first sample to the answer's last, the listening included."""
    hz: float
    overhead_share: float | None
    """Of one core, spent on sampling."""
    hottest_c: float | None
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of a profile."""

    schema: Annotated[str, Text("deeptalk-edge\\.profile/1", SCHEMA)]
    started: str
    """RFC 3339."""
    source: Literal["measured"]
    device: Device
    state_start: State
    state_end: State
    bundle: BundleUsed
    workload: Workload
    metrics: Mapping[str, Distribution]
    stages: Mapping[str, Distribution]
    """Parts of the wait and of the compute, in ms."""
    underruns: Count
    failed_turns: Count
    experts: Experts
    memory: Memory
    power: Power
    samples: str | None
    """The file of raw samples, one JSON object a turn."""
    warnings: tuple[str, ...] = ()


def report_json(report: Report) -> str:
    """The file's text; checked as a reader will check it.

    Raises ArtifactError if it does not keep to the schema.
    """
    content = json.loads(json.dumps(dataclasses.asdict(report)))
    from_json(Report, content)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Read and check a report.

    Raises ArtifactError naming the file and the field if it is none of this schema.
    """
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path}: schema = {str(content.get('schema'))[:60]!r}, this version reads {SCHEMA}"
        )
    try:
        return from_json(Report, content)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def json_schema(kind: Any = Report) -> dict[str, Any]:
    """A JSON Schema (2020-12) of the report, for readers in other languages."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        **_schema_of(kind),
    }


_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = _schema_of(arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, Between):
                schema |= {"minimum": rule.low, "maximum": rule.high}
            if isinstance(rule, Text):
                schema |= {"pattern": f"^(?:{rule.pattern})$"}
        return schema
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return {"anyOf": [_schema_of(inner), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    if dataclasses.is_dataclass(hint):
        return _object_schema(hint)
    return {"type": _SCALARS[hint]}


def _object_schema(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    needed = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    return {
        "type": "object",
        "properties": {name: _schema_of(hint) for name, hint in hints.items()},
        "required": needed,
        "additionalProperties": False,
    }
