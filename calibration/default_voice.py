"""Speaks the default corpus with espeak-ng or flite, where one of them is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.calibration.corpus import TYPED
from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.vad import read_utterance

_TIMEOUT_S = 20.0


def spoken_defaults() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The default questions as 16 kHz PCM; none without a synthesiser."""
    voice = next((name for name in ("espeak-ng", "flite") if shutil.which(name)), None)
    if voice is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "question.wav"
        for text in TYPED:
            flags = (
                ["-w", str(path), "--", text]
                if voice == "espeak-ng"
                else ["-t", text, "-o", str(path)]
            )
            done = subprocess.run(
                [voice, *flags], capture_output=True, check=False, timeout=_TIMEOUT_S
            )
            if done.returncode:
                return
            try:
                yield text, read_utterance(path)
            except AudioError:
                continue
