"""`golden.npz`: small inputs of every graph, and what the exporter computed for them.

One definition of its arrays for the exporter, which writes them, and for the self-check of every
backend, which compares with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.bundle.manifest import GOLDEN, Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.features import max_samples, num_frames

FEATURES, NEAR_FEATURES = "features", "near_features"
"""Of the encoder's whole window, and of one that ends with the utterance."""

CPU_PREFIX = "native_"
"""Before the names of the logits that the weights of our CPU kernels give."""


def golden_forms(
    manifest: Manifest, *, features: str = FEATURES, logits_prefix: str = ""
) -> dict[str, Form]:
    """The arrays and their shapes: those of `features`, of the logits, and of those under a
    prefix."""
    vocabulary, width = manifest.model.vocabulary, manifest.model.decoder.width
    codebooks = vocabulary.num_codebooks
    text: Form = (np.float32, (2, vocabulary.text_size))
    codes: Form = (np.float32, (2, codebooks, vocabulary.codebook_block))
    return {
        "pcm": (np.float32, ("N",)),
        "rows": (np.int64, (1, "T", codebooks + 1)),
        "audio_mask": (np.bool_, ("T",)),
        "next_row": (np.int64, (1, 1, codebooks + 1)),
        "codes": (np.int64, ("A", codebooks)),
        FEATURES: (np.float32, ("n", width)),
        features: (np.float32, ("n", width)),
        "text_logits": text,
        "code_logits": codes,
        f"{logits_prefix}text_logits": text,
        f"{logits_prefix}code_logits": codes,
        "sound": (np.float32, ("S",)),
    }


def write_golden(directory: Path, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays, and read them as a runtime will.

    Raises ArtifactError if one is missing or has another shape.
    """
    given: dict[str, Any] = dict(arrays)
    np.savez(directory / GOLDEN, **given)
    features = NEAR_FEATURES if manifest.graphs is not None else FEATURES
    prefixes = ("", CPU_PREFIX) if manifest.target.backend == "cpu" else ("",)
    for prefix in prefixes:
        forms = golden_forms(manifest, features=features, logits_prefix=prefix)
        read_arrays(directory / GOLDEN, forms)


def read_golden(
    bundle: Bundle, *, features: str = FEATURES, logits_prefix: str = ""
) -> dict[str, NDArray[Any]]:
    """Raises ArtifactError if an array is missing, or its shape does not fit the others."""
    path, model = bundle.file(GOLDEN), bundle.manifest.model
    forms = golden_forms(bundle.manifest, features=features, logits_prefix=logits_prefix)
    golden = read_arrays(path, forms)
    num_marked, num_heard = int(golden["audio_mask"].sum()), len(golden[features])
    num_samples = len(golden["pcm"])
    if num_samples > max_samples(model.encoder) or num_heard != num_frames(num_samples):
        raise ArtifactError(
            f"{path}: {features} has {num_heard} frames for pcm of {num_samples} samples; "
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
            f"{path}: audio_mask marks {num_marked} rows, {features} has {num_heard} frames; "
            "export the bundle again"
        )
    return golden
