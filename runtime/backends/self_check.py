"""The golden check: does this backend compute what the exporter computed?

It runs at every load, on small inputs through every graph, and also warms the sessions up. It finds
a wrong driver, a broken library or damage that hashes missed before any answer is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.golden import FEATURES, read_golden
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.base import Backend, SelfCheck

Array = NDArray[np.float32]

_OF_ROUNDING = 1.25


def check_golden(bundle: Bundle, backend: Backend) -> None:
    """Compare with `golden.npz`. The engine must be new and is reset afterwards.

    Raises ArtifactError if the file lacks an array, BackendError naming the part that differs.
    """
    check = backend.self_check
    if check is None:
        return
    golden = read_golden(bundle, features=check.features, logits_prefix=check.logits_prefix)
    heard = golden[check.features]
    if check.features == FEATURES:
        features = backend.encoder.hear(golden["pcm"])
    else:  # in a short window: the whole window takes seconds on a CPU
        features = backend.encoder.hear_window(golden["pcm"], len(heard))
    _compare(check.encoder, features, heard, check.encoder_tolerance)

    engine, mask, prefix = backend.engine, golden["audio_mask"], check.logits_prefix
    tolerance = _decoder_tolerance(check, golden)
    engine.prefill(golden["rows"][0], golden[FEATURES][: mask.sum()], mask)
    for row in range(2):
        logits = engine.decode_step(golden["next_row"][0]) if row else engine.logits()
        for found, name in ((logits.text[0], "text_logits"), (logits.codes[0], "code_logits")):
            expected = golden[f"{prefix}{name}"][row]
            _compare(check.decoder, found, expected, tolerance)
    engine.reset()

    codes, entry = golden["codes"], bundle.manifest.codec
    sound, _ = backend.codec.decode(
        codes,
        position=0,
        length=len(codes),
        state=np.zeros(entry.state_size, np.float32),
        noise=[np.zeros(len(codes) * rate, np.float32) for rate in entry.noise_rates],
    )
    _compare(check.codec, sound, golden["sound"], check.codec_tolerance)


def _decoder_tolerance(check: SelfCheck, golden: Mapping[str, Array]) -> float:
    """What two processors may differ by: at least the backend's tolerance, and more for a model
    whose logits the weights' rounding moves far. In ten random layers a last bit that differs can
    choose another expert: on AVX2 that moved the logits by 0.21, int4's rounding by 0.21, too."""
    moved = max(
        _error(golden[f"{check.logits_prefix}{name}"], golden[name])
        for name in ("text_logits", "code_logits")
    )
    return max(check.decoder_tolerance, _OF_ROUNDING * moved)


def _error(found: Array, expected: Array) -> float:
    """The largest one, of the largest value."""
    if found.shape != expected.shape:
        return np.inf
    return float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)


def _compare(graph: str, found: Array, expected: Array, tolerance: float) -> None:
    error = _error(found, expected)
    if not error <= tolerance:  # NaN must fail, too
        raise BackendError(
            f"{graph}: this device computes something else than the exporter did (relative error "
            f"{error:.1e}, allowed {tolerance:.0e}); export the bundle again on this device"
        )
