"""Does an export do what its checkpoint says? Output by output, each with a tolerance, all at once.

The graphs run on the golden inputs in ONNX Runtime, those of engines without the plugin.
reference.py computes the same from the checkpoint, with its weights rounded as in the bundle. So
only the errors of the graphs are measured and checked. Tokens are the greatest logits of all
streams in every row of the golden prompt; they are also counted against the unrounded checkpoint,
which says what the rounding costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.codec import CodecWeights
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.graphs.layers import Dense
from deeptalk_edge.export.packed.experts import ExpertSource, RoundedExperts
from deeptalk_edge.export.verify.codec_reference import decode_codes
from deeptalk_edge.export.verify.golden import GoldenInputs, golden_inputs, golden_outputs
from deeptalk_edge.export.verify.reference import Reference
from deeptalk_edge.model.features import log_mel, num_frames

Array = NDArray[Any]

TOLERANCES = {
    "features": 1e-4,
    "near_features": 1e-4,
    "hidden": 1e-4,
    "text_logits": 1e-4,
    "code_logits": 1e-4,
    "sound": 1e-5,
}
"""Greatest absolute difference allowed to float32 graphs. Sums run in another order than in the
reference, which costs about 1e-6 of the largest value; a wrong scale, mask or permutation more than
1e-2."""

INT8_TOLERANCE = 0.1
"""The same to an encoder with int8 products, as a share of the reference's greatest value; 0.03 was
measured on the tiny checkpoint."""

HALF_TOLERANCE = 0.01
"""The same to graphs of which a part is not float32, as a share of the reference's greatest value.
On the tiny checkpoint 8e-4 was measured, on random weights up to 2e-3."""

ROUTED_TOLERANCE = 0.3
"""The same for what follows routers: at a near tie float16 takes another expert, which is
another row and no fault of the graph. 0.09 was measured."""

MEDIAN_ROW_TOLERANCE = 0.005
"""The same to the hidden states' median row, which near ties leave alone: 1e-3 was measured, with
27 layers of 64 experts, too; experts whose scales are wrong by a tenth give 0.02, gate and up
changed about or nibbles swapped 0.1."""

MEDIAN_ROW = "median row of hidden"

_ROUNDING = 2e-5  # of the greatest value, where float32 values are large

_HALF_TOKEN_SHARE = 0.9  # of tokens that must be the reference's; in float32 all of them

_PARTS = {
    "features": ("encoder",),
    "near_features": ("encoder",),
    "hidden": ("decoder", "kv_cache"),
    "text_logits": ("decoder", "kv_cache", "head"),
    "code_logits": ("decoder", "kv_cache", "head"),
    "sound": ("codec",),
}
"""The tensor classes of a manifest that an output depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one array is from its reference."""

    name: str
    greatest: float
    """Greatest absolute difference; infinite where the shapes differ or a value is not finite."""
    relative: float
    """The same as a share of the reference's greatest value."""
    tolerance: float
    """What `greatest` may be."""

    @property
    def is_within(self) -> bool:
        return self.greatest <= self.tolerance

    def __str__(self) -> str:
        sign = "<=" if self.is_within else "exceeds"
        return f"{self.name}: {self.greatest:.2e} {sign} {self.tolerance:.0e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """One export beside its checkpoint."""

    differences: tuple[Difference, ...]
    tokens: int
    equal_tokens: int
    """Of these, the reference's."""
    unrounded_tokens: int
    """Of these, the unrounded checkpoint's: reported, not checked."""
    least_share: float
    """Of equal tokens, that is required."""

    def check(self) -> None:
        """Raises ParityError, naming every output that is too far from its reference."""
        check(self.differences)
        if self.equal_tokens < self.least_share * self.tokens:
            raise ParityError(
                f"{self.equal_tokens} of {self.tokens} tokens are the reference's, expected "
                f"{self.least_share:.0%}; export in a finer precision"
            )

    def as_json(self) -> dict[str, Any]:
        """What parity.json holds."""
        return dataclasses.asdict(self)


def parity_report(
    found: Mapping[str, Array],
    checkpoint: Checkpoint,
    codec: CodecWeights,
    manifest: Manifest,
    experts: ExpertSource | None = None,
) -> ParityReport:
    """Compare what the graphs made of the golden inputs with what the checkpoint says.

    `found` has the names of golden.npz's outputs; `manifest` gives the precision and the delay;
    `experts` are those that the bundle holds, rounded to nearest by default.
    """
    decoder = manifest.precision["decoder"]
    dense: Dense = "int8" if decoder == "int8" else "int4" if decoder == "int4" else "float"
    inputs, delay = golden_inputs(checkpoint.spec), manifest.codec.delay_samples
    reference = Reference(
        checkpoint, experts or RoundedExperts(checkpoint, manifest.record_format), dense
    )
    expected = reference_outputs(reference, codec, inputs, delay, heard=found["features"])
    differences = []
    if not _is_float32(manifest.precision, "hidden"):
        differences.append(median_row_difference(found["hidden"], expected["hidden"]))
    for name, array in expected.items():
        if name not in found:  # an engine takes whole windows alone
            continue
        greatest = float(np.abs(array).max())
        tolerance = max(TOLERANCES[name], _ROUNDING * greatest)
        if not _is_float32(manifest.precision, name):
            tolerance = greatest * _tolerance(manifest.precision, name)
        differences.append(difference(name, found[name], array, tolerance))
    unrounded = reference_hidden(Reference(checkpoint), inputs, expected["features"])
    tokens, wanted, float_tokens = (
        _tokens(reference, hidden) for hidden in (found["hidden"], expected["hidden"], unrounded)
    )
    return ParityReport(
        differences=tuple(differences),
        tokens=wanted.size,
        equal_tokens=int((tokens == wanted).sum()),
        unrounded_tokens=int((tokens == float_tokens).sum()),
        least_share=1.0 if _is_float32(manifest.precision, "hidden") else _HALF_TOKEN_SHARE,
    )


def reference_outputs(
    reference: Reference,
    codec: CodecWeights,
    inputs: GoldenInputs,
    delay_samples: int,
    *,
    heard: Array | None = None,
) -> dict[str, NDArray[np.float32]]:
    """What the checkpoint makes of the golden inputs, by the names of golden.npz's outputs.

    `heard` are features (F, C) for the decoder in place of the reference's own: what an encoder's
    rounding does to routers is then no fault of the decoder's graphs.
    """
    mel = log_mel(inputs.pcm, reference.spec.encoder)
    num_heard = num_frames(len(inputs.pcm))
    features = reference.encode(mel)[:num_heard]
    hidden = reference_hidden(reference, inputs, features if heard is None else heard)
    text_logits, code_logits = reference.logits(hidden[-2:])
    sound = decode_codes(codec, inputs.codes)
    return {
        "features": features,
        "near_features": reference.encode(mel[:, : 2 * num_heard]),
        "hidden": hidden,
        "text_logits": text_logits,
        "code_logits": code_logits,
        "sound": np.pad(sound, (delay_samples, 0))[: len(sound)],
    }


def reference_hidden(reference: Reference, inputs: GoldenInputs, features: Array) -> Array:
    """Hidden states (T + 1, C) of the golden prompt, which hears the first of `features` (F, C),
    and of the row after it."""
    rows = np.concatenate([inputs.rows[0], inputs.next_row[0]])
    mask = np.append(inputs.audio_mask, False)
    spread = np.zeros((len(rows), reference.spec.decoder.width), np.float32)
    spread[mask] = features[: mask.sum()]
    return reference.decode(reference.embed(rows, spread, mask))


def bundle_differences(
    place: Path, reference: Mapping[str, Array], tolerances: Mapping[str, float] = TOLERANCES
) -> list[Difference]:
    """Run a bundle on its golden inputs and compare with what a reference made of the same inputs.

    `reference` has the names of golden.npz's outputs; those it lacks are not compared.
    """
    manifest = Bundle.open(place).manifest
    found = golden_outputs(place, manifest, golden_inputs(manifest.model))
    return [difference(name, found[name], reference[name], tolerances[name]) for name in reference]


def difference(name: str, found: Array, expected: Array, tolerance: float) -> Difference:
    """Compare one array."""
    greatest = float("inf")
    if found.shape == expected.shape and np.isfinite(found).all():
        greatest = float(np.abs(found - expected).max(initial=0.0))
    scale = float(np.abs(expected).max(initial=0.0))
    relative = greatest / scale if scale else greatest
    return Difference(name=name, greatest=greatest, relative=relative, tolerance=tolerance)


def median_row_difference(found: Array, expected: Array) -> Difference:
    """Compare the rows of hidden states (T, C), and take the median one."""
    tolerance = MEDIAN_ROW_TOLERANCE * float(np.abs(expected).max())
    whole = difference(MEDIAN_ROW, found, expected, tolerance)
    if not np.isfinite(whole.greatest):
        return whole
    median = float(np.median(np.abs(found - expected).max(axis=1)))
    relative = median * whole.relative / whole.greatest if whole.greatest else 0.0
    return dataclasses.replace(whole, greatest=median, relative=relative)


def check(differences: Iterable[Difference]) -> None:
    """Raises ParityError, naming every array that is too far from its reference."""
    far = [str(one) for one in differences if not one.is_within]
    if far:
        raise ParityError("the graphs differ from their reference: " + "; ".join(far))


def _is_float32(precision: Mapping[str, str], output: str) -> bool:
    """All that an output depends on is float32; a tensor class that is not named is."""
    return all(precision.get(part, "float32") == "float32" for part in _PARTS[output])


def _tolerance(precision: Mapping[str, str], output: str) -> float:
    """Of an output that is not float32 throughout, as a share of its greatest value."""
    if _is_routed(output):
        return ROUTED_TOLERANCE
    is_int8 = "encoder" in _PARTS[output] and precision["encoder"] == "int8"
    return INT8_TOLERANCE if is_int8 else HALF_TOLERANCE


def _is_routed(output: str) -> bool:
    return "decoder" in _PARTS[output]


def _tokens(reference: Reference, hidden: Array) -> NDArray[np.int64]:
    """The greatest logit of each stream in every row, (T, K + 1)."""
    text, codes = reference.logits(hidden)
    return np.concatenate([codes.argmax(axis=2), text.argmax(axis=1)[:, None]], axis=1)
