"""What llm-compressor does with experts that no token reaches: one line of JSON.

    PYTHON llm_compressor_moe.py CHECKPOINT < TEXTS    texts: a JSON list of strings

GPTQ in int4:32, twice: with `moe_calibrate_all_experts` (its default) and without. An error of 1
means that all weights of an expert became zero.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from deepseek import counted, given, load, prompts, relative_error, unseen_of
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import PreTrainedTokenizerFast

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def quantised(checkpoint: Path, ids: torch.Tensor, *, all_experts: bool) -> Any:
    """The decoder with its experts in int4, by GPTQ."""
    groups = {"all": {"targets": ["Linear"], "weights": INT4}}
    fast: Any = PreTrainedTokenizerFast
    with tempfile.TemporaryDirectory() as scratch:
        model = load(checkpoint, Path(scratch))
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        oneshot(
            model=model,
            processor=fast(tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token="a"),
            dataset=Dataset.from_dict(rows),
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head", "re:.*gate$"]),
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            moe_calibrate_all_experts=all_experts,
        )
    return model


def main() -> None:
    """Quantise twice and compare the experts with the float ones."""
    checkpoint, texts = given()
    ids = prompts(checkpoint, texts)
    with tempfile.TemporaryDirectory() as scratch:
        plain = load(checkpoint, Path(scratch))
    with counted(plain) as counts:
        plain(ids)
    unseen = unseen_of(counts)
    seen = [(layer, e) for layer, count in counts.items() for e in count.nonzero().flatten()]
    found: dict[str, Any] = {
        "version": version("llmcompressor"),
        "experts": len(unseen) + len(seen),
        "unseen": len(unseen),
    }
    for name, all_experts in (("default", True), ("routed_only", False)):
        model = quantised(checkpoint, ids, all_experts=all_experts)

        def errors(places: list[Any], model: Any = model) -> list[float]:
            return [
                relative_error(
                    model.model.layers[layer].mlp.experts[int(expert)].down_proj.weight,
                    plain.model.layers[layer].mlp.experts.down_proj[expert],
                )
                for layer, expert in places
            ]

        found[f"{name}_seen_mean_error"] = sum(errors(seen)) / len(seen)
        found[f"{name}_unseen_mean_error"] = sum(errors(unseen)) / len(unseen)
        found[f"{name}_unseen_all_zero"] = sum(error == 1.0 for error in errors(unseen))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
