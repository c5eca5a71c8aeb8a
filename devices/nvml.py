"""NVIDIA cards by NVML, through the optional package `nvidia-ml-py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deeptalk_edge.devices.reading import Reading

EXTRA = "pip install deeptalk-edge[nvml] (nvidia-ml-py) reads power, clocks and memory of the card"


class Card:
    """The first card. Open it with `open_card`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> dict[str, Reading[Any]]:
        """What the card says now; a question that it refuses is a missing reading."""
        nvml, handle = self._nvml, self._handle
        ask = self._ask
        return {
            "name": ask(lambda: _text(nvml.nvmlDeviceGetName(handle))),
            "driver": ask(lambda: _text(nvml.nvmlSystemGetDriverVersion())),
            "compute_capability": ask(
                lambda: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
            ),
            "memory_bytes": ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)),
            "memory_used_bytes": ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)),
            "pcie": ask(
                lambda: (
                    f"{nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)}.0 "
                    f"x{nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)}"
                )
            ),
            "gpu_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            "power_w": ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "energy_j": ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
            "throttle_reasons": ask(
                lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
            ),
        }

    def _ask(self, question: Callable[[], Any]) -> Reading[Any]:
        try:
            return Reading(question())
        except (self._nvml.NVMLError, AttributeError) as error:
            return Reading(None, f"NVML: {error}")


def open_card() -> Reading[Card]:
    """None without the package, a driver or a card."""
    try:
        import pynvml
    except ImportError:
        return Reading(None, f"nvidia-ml-py is not installed; {EXTRA}")
    try:
        pynvml.nvmlInit()
        return Reading(Card(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError as error:
        return Reading(None, f"NVML: {error}")


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
