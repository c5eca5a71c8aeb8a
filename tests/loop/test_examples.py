"""The examples for integrators run as they stand, here on a recording."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.runtime.audio.wav_port import WavPort

ROOT = Path(__file__).resolve().parent.parent.parent
SPOKEN = sorted((ROOT / "checkpoints" / "tiny" / "questions").glob("*.wav"))[0]


class Visit(WavPort):
    """A recording; when it has been over for a while, the operator presses Ctrl-C."""

    def read(self, timeout_s: float) -> MicFrame | None:
        frame = super().read(timeout_s)
        if self._passed > self._num_samples + 4 * 16000:
            raise KeyboardInterrupt
        return frame


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "shown"), [("kiosk", ["(listening)", "(answered within "]), ("announcement", ["\n"])]
)
def test_an_example_talks(
    name: str, shown: list[str], bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        example(name).main(str(bundle_path), Visit(SPOKEN))
    out = capsys.readouterr().out
    assert all(piece in out for piece in shown)
