"""The golden check: does this backend compute here what the exporter did?

Run at every load, on small inputs through every graph; it warms the sessions up besides. A wrong
driver, a broken library or a damaged file that its hash missed ends here and not in a wrong answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.bundle.manifest import GOLDEN, Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.model.features import max_samples, num_frames
from deeptalk_edge.runtime.backends.base import Backend, SelfCheck

Array = NDArray[np.float32]


def check_golden(bundle: Bundle, backend: Backend) -> None:
    """Compare with `golden.npz`. The engine must be fresh, and is reset.

    Raises ArtifactError if the file lacks something, BackendError naming the part that differs.
    """
    check = backend.self_check
    if check is None:
        return
    golden = _read(bundle, check)
    heard = golden[check.features]
    if check.features == "features":
        features = backend.encoder.hear(golden["pcm"])
    else:  # in a window of their own: a whole one takes a CPU seconds
        features = backend.encoder.hear_window(golden["pcm"], len(heard))
    _compare(check.encoder, features, heard, check.encoder_tolerance)

    engine, mask, prefix = backend.engine, golden["audio_mask"], check.logits_prefix
    engine.prefill(golden["rows"][0], golden["features"][: mask.sum()], mask)
    for row in range(2):
        logits = engine.decode_step(golden["next_row"][0]) if row else engine.logits()
        for found, name in ((logits.text[0], "text_logits"), (logits.codes[0], "code_logits")):
            expected = golden[f"{prefix}{name}"][row]
            _compare(check.decoder, found, expected, check.decoder_tolerance)
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


def _compare(graph: str, found: Array, expected: Array, tolerance: float) -> None:
    scale = float(np.abs(expected).max()) or 1.0
    error = (
        float(np.abs(found - expected).max()) / scale if found.shape == expected.shape else np.inf
    )
    if not error <= tolerance:  # NaN is no agreement
        raise BackendError(
            f"{graph}: this device computes something else than the exporter did (relative error "
            f"{error:.1e}, allowed {tolerance:.0e}); export the bundle again on this device"
        )


def _read(bundle: Bundle, check: SelfCheck) -> dict[str, NDArray[Any]]:
    path, model = bundle.file(GOLDEN), bundle.manifest.model
    golden = read_arrays(path, _forms(bundle.manifest, check))
    num_marked, num_heard = int(golden["audio_mask"].sum()), len(golden[check.features])
    num_samples = len(golden["pcm"])
    if num_samples > max_samples(model.encoder) or num_heard != num_frames(num_samples):
        raise ArtifactError(
            f"{path}: {check.features} has {num_heard} frames for pcm of {num_samples} samples; "
            "export the bundle again"
        )
    frame_samples = bundle.manifest.codec.spec.frame_samples
    if len(golden["sound"]) != len(golden["codes"]) * frame_samples:
        raise ArtifactError(
            f"{path}: sound has {len(golden['sound'])} samples for {len(golden['codes'])} frames "
            f"of {frame_samples}; export the bundle again"
        )
    if num_marked > num_heard:
        raise ArtifactError(
            f"{path}: audio_mask marks {num_marked} rows, {check.features} has {num_heard} frames; "
            "export the bundle again"
        )
    return golden


def _forms(manifest: Manifest, check: SelfCheck) -> dict[str, Form]:
    """The arrays and their shapes. Source: docs/bundle.md."""
    vocabulary, width = manifest.model.vocabulary, manifest.model.decoder.width
    codebooks, text = vocabulary.num_codebooks, vocabulary.text_size
    return {
        "pcm": (np.float32, ("N",)),
        "rows": (np.int64, (1, "T", codebooks + 1)),
        "audio_mask": (np.bool_, ("T",)),
        "next_row": (np.int64, (1, 1, codebooks + 1)),
        "codes": (np.int64, ("A", codebooks)),
        "features": (np.float32, ("n", width)),
        check.features: (np.float32, ("n", width)),
        f"{check.logits_prefix}text_logits": (np.float32, (2, text)),
        f"{check.logits_prefix}code_logits": (
            np.float32,
            (2, codebooks, vocabulary.codebook_block),
        ),
        "sound": (np.float32, ("S",)),
    }
