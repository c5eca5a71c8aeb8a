"""The golden check: does this device compute what the exporter did?

Run at every load, on small inputs through every graph; it warms the sessions up besides. A wrong
driver, a broken library or a damaged file that its hash missed ends here and not in a wrong answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.bundle.manifest import GOLDEN, NATIVE_WEIGHTS, Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.model.features import max_samples, num_frames
from deeptalk_edge.runtime.backends.cpu.engine import NativeEngine
from deeptalk_edge.runtime.lm.codec_stream import CodecGraph
from deeptalk_edge.runtime.lm.encoder import Encoder
from deeptalk_edge.runtime.lm.engine import Engine

Array = NDArray[np.float32]

TOLERANCE = 1e-3
"""Largest error over the largest value. Float32 kernels of other CPUs differ by about 1e-5; a wrong
weight, a wrong order of ids or a lost cache row by 0.1 and more.
"""

INT8_TOLERANCE = 0.05
"""The same for an encoder in int8: a rounding of an activation that falls the other way is a step
of 1/255.
"""

NATIVE_TOLERANCE = 0.1
"""The same for the native kernels, beside a reference of the weights as they hold them: they round
every product's activations to int8. 0.01 to 0.02 was measured on the tiny checkpoint, 0.05 on
random weights of the official size; a wrong scale or order gives 0.5 and more.
"""


def check_golden(bundle: Bundle, *, encoder: Encoder, engine: Engine, codec: CodecGraph) -> None:
    """Compare with `golden.npz`. The engine must be fresh, and is reset.

    Raises ArtifactError if the file lacks something, BackendError naming the graph that differs.
    """
    golden = _read(bundle)
    graphs = bundle.manifest.ort_graphs
    heard = golden["near_features"]  # in a window of their own: a whole one takes seconds
    features = encoder.hear_window(golden["pcm"], len(heard))
    is_int8 = bundle.manifest.precision["encoder"] == "int8"
    _compare(graphs.encoder, features, heard, INT8_TOLERANCE if is_int8 else TOLERANCE)

    mask = golden["audio_mask"]
    engine.prefill(golden["rows"][0], golden["features"][: mask.sum()], mask)
    decoder = f"{graphs.embed}, {graphs.segments[0]} to {graphs.segments[-1]}, {graphs.head}"
    tolerance, prefix = TOLERANCE, ""
    if isinstance(engine, NativeEngine):
        decoder, tolerance, prefix = NATIVE_WEIGHTS, NATIVE_TOLERANCE, "native_"
    for row in range(2):
        logits = engine.decode_step(golden["next_row"][0]) if row else engine.logits()
        _compare(decoder, logits.text[0], golden[f"{prefix}text_logits"][row], tolerance)
        _compare(decoder, logits.codes[0], golden[f"{prefix}code_logits"][row], tolerance)
    engine.reset()

    codes, entry = golden["codes"], bundle.manifest.codec
    feeds = {
        "codes": codes,
        "position": np.array(0, np.int64),
        "length": np.array(len(codes), np.int64),
        "state": np.zeros(entry.state_size, np.float32),
    }
    for block, rate in enumerate(entry.noise_rates):
        feeds[f"noise_{block}"] = np.zeros(len(codes) * rate, np.float32)
    _compare(graphs.codec, codec.run(feeds)[0], golden["sound"])


def _compare(graph: str, found: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    scale = float(np.abs(expected).max()) or 1.0
    error = (
        float(np.abs(found - expected).max()) / scale if found.shape == expected.shape else np.inf
    )
    if not error <= tolerance:  # NaN is no agreement
        raise BackendError(
            f"{graph}: this device computes something else than the exporter did (relative error "
            f"{error:.1e}, allowed {tolerance:.0e}); export the bundle again on this device"
        )


def _read(bundle: Bundle) -> dict[str, NDArray[Any]]:
    path, model = bundle.file(GOLDEN), bundle.manifest.model
    golden = read_arrays(path, _forms(bundle.manifest))
    num_marked, num_heard = int(golden["audio_mask"].sum()), len(golden["near_features"])
    num_samples = len(golden["pcm"])
    if num_samples > max_samples(model.encoder) or num_heard != num_frames(num_samples):
        raise ArtifactError(
            f"{path}: near_features has {num_heard} frames for pcm of {num_samples} samples; "
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
            f"{path}: audio_mask marks {num_marked} rows, near_features has {num_heard} frames; "
            "export the bundle again"
        )
    return golden


def _forms(manifest: Manifest) -> dict[str, Form]:
    """The arrays and their shapes. Source: docs/bundle.md."""
    vocabulary, width = manifest.model.vocabulary, manifest.model.decoder.width
    codebooks, text = vocabulary.num_codebooks, vocabulary.text_size
    forms: dict[str, Form] = {
        "pcm": (np.float32, ("N",)),
        "rows": (np.int64, (1, "T", codebooks + 1)),
        "audio_mask": (np.bool_, ("T",)),
        "next_row": (np.int64, (1, 1, codebooks + 1)),
        "codes": (np.int64, ("A", codebooks)),
        "features": (np.float32, ("n", width)),
        "near_features": (np.float32, ("n", width)),
        "text_logits": (np.float32, (2, text)),
        "code_logits": (np.float32, (2, codebooks, vocabulary.codebook_block)),
        "sound": (np.float32, ("S",)),
    }
    if manifest.target.backend == "native":
        for name in ("text_logits", "code_logits"):
            forms[f"native_{name}"] = forms[name]
    return forms
