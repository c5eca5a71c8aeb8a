"""Engines from graphs: TensorRT's builder in a child process, its end told from its success.

The builder may end by a signal, so it never runs in the exporter. An engine is written under a
hidden name and renamed when the child has said that it is whole.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeptalk_edge.devices.profile import RTX_TARGETS
from deeptalk_edge.errors import BackendError

EngineBackend = Literal["tensorrt_rtx", "tensorrt"]

_BUILDER = Path(__file__).with_name("builder.py")
_LAST_LINES = 12
_WAY_OUT = {
    "tensorrt_rtx": "pip install 'deeptalk-edge[tensorrt-rtx]'",
    "tensorrt": "it comes with JetPack, so export on the device; a virtual environment there needs "
    "--system-site-packages",
}

Shape = Sequence[int]
ShapeProfile = Mapping[str, Sequence[Shape]]
"""For every input with a free dimension: its least, usual and greatest shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How engines are built, whatever the graph."""

    backend: EngineBackend
    targets: tuple[str, ...] = ()
    """Compute capabilities that one engine serves. TensorRT-RTX compiles for all of them, or for
    every card from sm_80 on if there are none; TensorRT builds for the device it runs on."""
    version: str | None = None
    """What TensorRT's version must begin with, "10.16" say; None takes any."""
    plugins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.backend == "tensorrt_rtx":
            if unknown := [target for target in self.targets if target not in RTX_TARGETS]:
                raise BackendError(
                    f"TensorRT-RTX builds nothing for {', '.join(unknown)}, only for "
                    f"{', '.join(RTX_TARGETS)}; a Jetson takes --backend tensorrt, on the device"
                )
        elif self.targets:
            raise ValueError(
                "targets: TensorRT builds for the device that it runs on, for no other"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What the builder says of an engine."""

    version: str
    """TensorRT's own."""
    bytes: int
    seconds: float
    peak_bytes: int
    """The child's greatest resident memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupportedNode:
    """A node that TensorRT's parser cannot take."""

    operator: str
    node: str
    reason: str


def build_engine(
    graph: Path, engine: Path, profiles: Sequence[ShapeProfile], settings: EngineSettings
) -> BuiltEngine:
    """Build `graph` for the settings' targets into the file `engine`.

    Raises BackendError, naming graph, target and the builder's last lines, if there is no engine.
    """
    staging = engine.with_name(f".{engine.name}.partial")
    job = {"what": "build", "engine": str(staging), "profiles": list(profiles)}
    try:
        said = _run_builder(graph, job, settings)
        staging.replace(engine)
    finally:
        staging.unlink(missing_ok=True)
    return BuiltEngine(**said)


def unsupported_nodes(graph: Path, settings: EngineSettings) -> list[UnsupportedNode]:
    """The nodes of a graph that TensorRT cannot take, in the parser's own words."""
    said = _run_builder(graph, {"what": "check"}, settings)
    return [UnsupportedNode(**node) for node in said["unsupported"]]


def is_installed(backend: EngineBackend) -> bool:
    return importlib.util.find_spec(backend) is not None


def require_installed(backend: EngineBackend, failure: str) -> None:
    """Raises BackendError if TensorRT's Python package is not here; `failure` says what for."""
    if not is_installed(backend):
        raise BackendError(f"{failure}: {backend} is not installed here; {_WAY_OUT[backend]}")


def _run_builder(graph: Path, job: Mapping[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """One child from begin to end: its answer, or BackendError."""
    where = ", ".join(settings.targets) or "this device"
    if settings.backend == "tensorrt_rtx" and not settings.targets:
        where = "sm_80 and later"
    failure = f"{graph.name}: {settings.backend} built no engine for {where}"
    require_installed(settings.backend, failure)
    request = {
        **job,
        "backend": settings.backend,
        "graph": str(graph),
        "targets": settings.targets,
        "version": settings.version,
        "plugins": [str(plugin) for plugin in settings.plugins],
    }
    with _short_names(settings.backend) as libraries:
        child = subprocess.run(
            [sys.executable, str(_BUILDER), json.dumps(request)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
    said = _answer(child.stdout) if child.returncode == 0 else None
    if said is not None and "problem" not in said:
        return said
    if said is not None:
        reason = said["problem"]
    elif child.returncode < 0:
        reason = f"the builder was ended by {signal.Signals(-child.returncode).name}"
    else:
        reason = f"the builder ended with status {child.returncode}"
    last = "\n  ".join(child.stderr.strip().splitlines()[-_LAST_LINES:])
    raise BackendError(f"{failure}: {reason}" + (f"; its last lines:\n  {last}" if last else ""))


def _answer(stdout: str) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return answer


@contextmanager
def _short_names(backend: EngineBackend) -> Iterator[str]:
    """A library path on which TensorRT-RTX finds itself under the name that its parser opens.

    The wheel has libtensorrt_rtx.so.1 alone; with plugins the parser needs libtensorrt_rtx.so
    and, refused, ends the process.
    """
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    libraries = importlib.util.find_spec("tensorrt_rtx_libs") if backend == "tensorrt_rtx" else None
    if libraries is None or not libraries.submodule_search_locations:
        yield inherited
        return
    with tempfile.TemporaryDirectory(prefix="deeptalk-edge-") as links:
        for library in Path(libraries.submodule_search_locations[0]).glob("lib*.so.1"):
            (Path(links) / library.stem).symlink_to(library)
        yield f"{links}:{inherited}" if inherited else links
