"""What NVIDIA's Model Optimizer does with experts that no token reaches: one line of JSON.

    PYTHON modelopt_moe.py CHECKPOINT < TEXTS    texts: a JSON list of strings

int8 (INT8_DEFAULT_CFG) and int4 with AWQ (INT4_AWQ_CFG). Its quantisers of an expert's weights are
a list by expert; those of the inputs belong to all experts of a layer.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from deepseek import counted, given, load, prompts, unseen_of


def main() -> None:
    checkpoint, texts = given()
    ids = prompts(checkpoint, texts)
    found: dict[str, Any] = {"version": version("nvidia-modelopt")}
    for name, config in (("int8", mtq.INT8_DEFAULT_CFG), ("int4_awq", mtq.INT4_AWQ_CFG)):
        with tempfile.TemporaryDirectory() as scratch:
            model = load(checkpoint, Path(scratch))
        with counted(model) as counts:
            model(ids)
        unseen = unseen_of(counts)
        found["experts"] = model.config.n_routed_experts * len(counts)
        found["unseen"] = len(unseen)

        def run(model: Any) -> None:
            for part in ids.split(8):
                model(part)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = mtq.quantize(model, config, run)
        found[f"{name}_warnings"] = len(said)
        layers = {layer: model.model.layers[layer].mlp.experts for layer, _ in unseen}
        found[f"{name}_unseen_without_a_weight_range"] = sum(
            getattr(layers[layer].gate_up_proj_weight_quantizers[expert], "amax", None) is None
            for layer, expert in unseen
        )
        inputs = [experts.gate_up_proj_input_quantizer for experts in layers.values()]
        found[f"{name}_input_ranges_a_layer"] = sum(
            q.is_enabled and q.amax is not None for q in inputs
        ) / len(inputs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
