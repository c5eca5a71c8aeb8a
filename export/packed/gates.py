"""`gates.npz`: the decoder's routers beside the graphs, for guesses at the next layer's experts.

gates   (L, E, C), the routers of the layers with routed experts
norms   (L, C), the weights of the norms before them
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from deeptalk_edge.checkpoint.reader import Checkpoint


def write_gates(checkpoint: Checkpoint, path: Path) -> None:
    """Write both arrays in float32, a layer at a time."""
    spec = checkpoint.spec.decoder
    num_layers, width = len(spec.moe_layers), spec.width
    arrays = {
        "gates": ("mlp.gate", (num_layers, spec.num_experts, width)),
        "norms": ("post_attention_layernorm", (num_layers, width)),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, (tensor, shape) in arrays.items():
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            # An entry of no date: the same checkpoint gives the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for layer in spec.moe_layers:
                    values = checkpoint.tensor(f"model.layers.{layer}.{tensor}.weight")
                    file.write(values.astype("<f4", copy=False).tobytes())
