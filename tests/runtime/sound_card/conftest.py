"""A private sound card for each test, with programs that play into it and record it.

The card is a private PulseAudio daemon (`virtual_card.sh`). Without it or PyAudio these tests are
skipped, with the reason. A test that hangs ends the run with every thread's traceback.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort
from deeptalk_edge.sound.wav import WavWriter

Array = NDArray[np.float32]

SCRIPT = Path(__file__).with_name("virtual_card.sh")
WATCHDOG_S = 120.0
_FIRST = ("nice", "-n", "-11")  # sound needs the highest allowed priority


def _missing() -> str | None:
    if shutil.which("pulseaudio") is None or shutil.which("pactl") is None:
        return "pulseaudio is not installed: apt install pulseaudio pulseaudio-utils"
    if importlib.util.find_spec("pyaudio") is None:
        return "PyAudio is not installed: pip install 'deeptalk-edge[sound]'"
    return None


class Card:
    """The daemon and its helper processes."""

    def __init__(self, place: Path, tmp_path: Path) -> None:
        self._place, self._tmp_path = place, tmp_path
        self._speaking: list[subprocess.Popen[bytes]] = []
        self._echo_ms: int | None = None

    def start(self, *, echo_ms: int | None = None) -> None:
        self._echo_ms = echo_ms
        knobs = {"CARD_DIR": str(self._place), "CARD_MAX_S": "120"}
        if echo_ms is not None:
            knobs["ECHO_MS"] = str(echo_ms)
        subprocess.run([SCRIPT, "start"], env={**os.environ, **knobs}, check=True, timeout=40)

    def stop(self) -> None:
        for speaker in self._speaking:
            speaker.terminate()
            speaker.wait(5)
        self._speaking.clear()
        knobs = {"CARD_DIR": str(self._place)}
        subprocess.run([SCRIPT, "stop"], env={**os.environ, **knobs}, check=True, timeout=20)

    def restart(self) -> None:
        """Restart the card as it was started."""
        self.stop()
        self.start(echo_ms=self._echo_ms)

    def kill_daemon(self) -> None:
        os.kill(int((self._place / "pid").read_text()), 15)

    def say(self, pcm: Array, rate_hz: int = 16_000) -> None:
        """Play into the microphone; returns at once."""
        path = self._tmp_path / f"said-{len(self._speaking)}.wav"
        with WavWriter(path, rate_hz) as writer:
            writer.write(pcm)
        command = [*_FIRST, "paplay", "--device=vair", "--latency-msec=200", str(path)]
        self._speaking.append(subprocess.Popen(command))

    def listen(self) -> Listener:
        return Listener(self._tmp_path / "heard.raw")


class Listener:
    """Records the loudspeaker's sound at 24 kHz."""

    def __init__(self, path: Path) -> None:
        command = [*_FIRST, "parec", "--device=vspk.monitor", "--rate=24000", "--channels=1"]
        self._path = path
        with path.open("wb") as out:
            self._recorder = subprocess.Popen(
                [*command, "--format=s16le", "--latency-msec=20"], stdout=out
            )
        while path.stat().st_size == 0:
            assert self._recorder.poll() is None
            time.sleep(0.01)

    def stop(self) -> Array:
        self._recorder.terminate()
        self._recorder.wait(5)
        pcm: Array = np.frombuffer(self._path.read_bytes(), "<i2").astype(np.float32)
        return pcm / np.float32(2**15)


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def _card_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One place for all tests, because ALSA reads its settings once."""
    if reason := _missing():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("sound") / "card"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PULSE_SERVER", f"unix:{place}/native")
        patch.setenv("ALSA_CONFIG_PATH", f"{place}/asound.conf")
        # With 40 ms, what two busy cores can do to a callback makes PortAudio restart its streams.
        patch.setenv("PULSE_LATENCY_MSEC", os.environ.get("PULSE_LATENCY_MSEC", "80"))
        patch.setenv("JACK_NO_START_SERVER", "1")
        yield place


@pytest.fixture(scope="session", autouse=True)
def _come_first() -> Iterator[None]:
    """The sound threads inherit it."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -11)
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


@pytest.fixture
def stopped_card(_card_place: Path, tmp_path: Path) -> Iterator[Card]:
    """For tests that start the card themselves."""
    card = Card(_card_place, tmp_path)
    yield card
    card.stop()


@pytest.fixture
def card(stopped_card: Card) -> Card:
    stopped_card.start()
    return stopped_card


@pytest.fixture
def port() -> Iterator[PyAudioPort]:
    """A port that is not open. It has long limits, because a busy machine may delay a callback by
    half a second."""
    port = PyAudioPort(DeviceSettings(input_name="vmic", output_name="vspk", lost_after_ms=3000))
    yield port
    port.close()
