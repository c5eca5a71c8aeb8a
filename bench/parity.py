"""Compares a bundle's graphs with the torch reference of its checkpoint, on golden inputs.

It needs torch; the exporter does not. It exits with an error if an output exceeds its tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import BUNDLE, TINY, arguments, measured
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.export.verify.golden import golden_inputs
from deeptalk_edge.export.verify.parity import bundle_differences, check
from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import load_snac


def main(argv: Sequence[str] | None = None) -> int:
    """Print the differences as Markdown.

    Raises ParityError if one exceeds its tolerance.
    """
    parser = arguments("parity", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--checkpoint", type=Path, default=TINY)
    args = parser.parse_args(argv)
    with measured(args) as figures:
        reference = torch_outputs(
            load_model(args.checkpoint).eval(),
            load_snac(args.checkpoint / "snac"),
            Bundle.open(args.bundle).manifest.codec.delay_samples,
        )
        differences = bundle_differences(args.bundle, reference)
        print("| output | shape | greatest value | greatest difference | tolerance |")
        print("|---|---|---|---|---|")
        for one in differences:
            expected = reference[one.name]
            print(
                f"| {one.name} | {expected.shape} | {np.abs(expected).max():.2f} | "
                f"{one.greatest:.1e} | {one.tolerance:.0e} |"
            )
        figures["greatest_difference"] = {one.name: float(one.greatest) for one in differences}
        check(differences)
    return 0


@torch.inference_mode()
def torch_outputs(
    model: DeepTalk, codec: Snac, delay_samples: int
) -> dict[str, NDArray[np.float32]]:
    """Return torch's outputs for the golden inputs, by the names in golden.npz."""
    spec = model.spec
    inputs = golden_inputs(spec)
    mel = torch.from_numpy(log_mel(inputs.pcm, spec.encoder))
    features = model.encode(mel[None])[0, : num_frames(len(inputs.pcm))]
    rows = torch.from_numpy(np.concatenate([inputs.rows, inputs.next_row], axis=1))
    mask = torch.zeros(1, rows.shape[1], dtype=torch.bool)
    mask[0, : len(inputs.audio_mask)] = torch.from_numpy(inputs.audio_mask)
    spread = torch.zeros(1, rows.shape[1], spec.decoder.width)
    spread[mask] = features[: int(mask.sum())]
    hidden = model(rows, spread, mask)[0]
    sound = codec.decode(torch.from_numpy(inputs.codes)[None])[0]
    return {
        "features": features.numpy(),
        "hidden": hidden.numpy(),
        "text_logits": model.text_logits(hidden[-2:]).numpy(),
        "code_logits": model.code_logits(hidden[-2:]).numpy(),
        "sound": np.pad(sound.numpy(), (delay_samples, 0))[: len(sound)],
    }
