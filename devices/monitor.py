"""Power and heat while something runs: a thread that reads a few small files five times a second.

The source of power is the first that this machine has: a card's NVML, a Jetson's INA3221 sensors, a
PC's RAPL counter. None of them is no power, with the reason. The thread's own time is measured and
reported: it must not disturb what it measures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deeptalk_edge import host
from deeptalk_edge.devices import nvml, sensors
from deeptalk_edge.devices.energy import PowerSample, energy_j, watts_of_counter
from deeptalk_edge.devices.reading import Reading

HZ = 5.0
_TOTAL_RAILS = ("VDD_IN", "VIN")


@dataclass(frozen=True, slots=True)
class PowerSource:
    """Where power comes from."""

    method: str
    read: Callable[[], float | None]
    """Watts, or joules so far."""
    is_counter: bool = False
    wrap_j: float | None = None


def power_source(root: Path = Path("/")) -> Reading[PowerSource]:
    """The first source that works here."""
    card = nvml.open_card()
    if card.value is not None and card.value.read()["power_w"].value is not None:
        device = card.value
        return Reading(PowerSource("NVML, the card alone", lambda: device.read()["power_w"].value))
    rails = sensors.ina_power_mw(root)
    if rails.value:
        return Reading(_rails(sensors.ina_rails(root)))
    energy = sensors.rapl_energy_j(root)
    if energy.value is not None:
        return Reading(
            PowerSource(
                "RAPL, the processor packages alone",
                lambda: sensors.rapl_energy_j(root).value,
                is_counter=True,
                wrap_j=sensors.rapl_wrap_j(root).value,
            )
        )
    return Reading(None, f"{card.why}; {rails.why}; {energy.why}")


def _rails(rails: dict[str, sensors.Rail]) -> PowerSource:
    """The rail that carries all of a module's power, or the sum of its rails."""
    total = next((name for name in _TOTAL_RAILS if name in rails), None)
    chosen = list(rails.values()) if total is None else [rails[total]]

    def read() -> float | None:
        values = [sensors.rail_mw(rail) for rail in chosen]
        known = [value for value in values if value is not None]
        return sum(known) / 1000 if len(known) == len(values) else None

    what = "the sum of its rails" if total is None else f"rail {total}, all of the module"
    return PowerSource(f"INA3221, {what}", read)


class Monitor:
    """Samples from `__enter__` to `__exit__`; ask afterwards, or from the thread that made it."""

    def __init__(self, root: Path = Path("/"), hz: float = HZ) -> None:
        self.hz = hz
        self._zones = list(sensors.temperature_files(root).values())
        self._source = power_source(root)
        self._readings: list[tuple[float, float]] = []
        self._hottest_c: float | None = None
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._own_s = self._wall_s = 0.0

    def __enter__(self) -> Monitor:
        host.start_thread(self._thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    @property
    def method(self) -> str | None:
        """How power is read; None where it is not."""
        return self._source.value.method if self._source.value else None

    @property
    def why_no_power(self) -> str | None:
        if self._source.value is None:
            return self._source.why
        return None if self._readings else "no sample was taken in this time"

    @property
    def overhead_share(self) -> float | None:
        """Of one core, the thread's own."""
        return self._own_s / self._wall_s if self._wall_s else None

    @property
    def hottest_c(self) -> float | None:
        """Of any zone, at any sample."""
        return self._hottest_c

    def samples(self) -> list[PowerSample]:
        """Watts by time."""
        source, readings = self._source.value, list(self._readings)
        if source is None:
            return []
        if source.is_counter:
            return watts_of_counter(readings, source.wrap_j)
        return [PowerSample(at_s, watts) for at_s, watts in readings]

    def energy_j(self, start_s: float, end_s: float) -> float | None:
        """Between two moments of `time.monotonic`."""
        return energy_j(self.samples(), start_s, end_s)

    def _run(self) -> None:
        start_s = time.monotonic()
        try:
            while True:
                self._sample()
                if self._stop.wait(1 / self.hz):
                    break
            self._sample()
        except BaseException as error:
            self._failure = error
        self._own_s, self._wall_s = time.thread_time(), time.monotonic() - start_s

    def _sample(self) -> None:
        if self._source.value is not None:
            value = self._source.value.read()
            if value is not None:
                self._readings.append((time.monotonic(), value))
        zones = [sensors.temperature_c(zone) for zone in self._zones]
        if known := [value for value in zones if value is not None]:
            self._hottest_c = max(known if self._hottest_c is None else [*known, self._hottest_c])
