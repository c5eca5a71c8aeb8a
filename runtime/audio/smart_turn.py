"""Smart Turn v3 models: from the last 8 s, an ONNX model estimates whether the turn is over.

The user names the file; nothing is downloaded. The input `input_features` (1, 80, 800) is Whisper's
log-mel of normalised sound that ends now; the output is one probability.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.model.features import RATE_HZ, log_mel, max_samples
from deeptalk_edge.model.spec import EncoderSpec
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph

Array = NDArray[np.float32]

# Whisper tiny's encoder with a window of 8 s; only the bins and the window are used here.
_SPEC = EncoderSpec(
    num_mel_bins=80, width=384, num_layers=4, num_heads=6, ffn_width=1536, max_frames=400
)
_NUM_SAMPLES = 8 * RATE_HZ


class SmartTurn:
    """A `TurnCue`. One owner; not thread-safe."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError if the file is not such a model."""
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; name a Smart Turn v3 ONNX model")
        try:
            self._graph = OrtGraph(path, threads=1)
            p = self.p_complete(np.zeros(1, np.float32))
        except BackendError as error:
            raise ArtifactError(
                f"{path}: expected a Smart Turn v3 model, 'input_features' (1, 80, 800) to one "
                f"probability; {error}"
            ) from error
        if not 0 <= p <= 1:
            raise ArtifactError(f"{path}: expected a model that gives a probability, found {p:.3g}")

    def p_complete(self, utterance: Array) -> float:
        heard = utterance[-_NUM_SAMPLES:]
        heard = np.pad(heard, (_NUM_SAMPLES - len(heard), 0))
        heard = (heard - heard.mean()) / np.sqrt(heard.var() + 1e-7)
        mel = log_mel(heard[: max_samples(_SPEC)], _SPEC)  # 8 s less one sample
        return float(self._graph.run({"input_features": mel[None]})[0].item())
