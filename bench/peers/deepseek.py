"""The decoder of a checkpoint of ours in transformers, its prompts, and a count of its routing.

For environments that have transformers and not deeptalk_edge: nothing of it is imported here.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

PROMPTS, TOKENS = 8, 64
"""The questions one after the other, in rows of TOKENS."""


def load(checkpoint: Path, scratch: Path) -> Any:
    """The decoder in float32, as a DeepSeek-V2 of transformers: written to `scratch` and read from
    there, because tools open the directory that a model came from."""
    fields = json.loads((checkpoint / "config.json").read_text())
    rope = fields.pop("rope_scaling") or {"type": "default"}
    rope = {"rope_type": rope.pop("type"), "rope_theta": fields["rope_theta"], **rope}
    config = DeepseekV2Config(
        **{**fields, "model_type": "deepseek_v2"}, rope_parameters=rope, mlp_bias=False
    )
    deepseek: Any = DeepseekV2ForCausalLM
    deepseek.from_pretrained(checkpoint, config=config, dtype=torch.float32).save_pretrained(
        scratch
    )
    shutil.copyfile(checkpoint / "tokenizer.json", scratch / "tokenizer.json")
    return deepseek.from_pretrained(scratch, dtype=torch.float32).eval()


def prompts(checkpoint: Path, texts: list[str]) -> torch.Tensor:
    """Typed questions as ids (PROMPTS, TOKENS)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = [token for text in texts for token in tokenizer.encode(text).ids]
    ids = ids * (1 + PROMPTS * TOKENS // max(len(ids), 1))
    return torch.tensor(ids[: PROMPTS * TOKENS]).view(PROMPTS, TOKENS)


@contextmanager
def counted(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Tokens by layer and expert, by the router's own weights: (E,) each."""
    counts: dict[int, torch.Tensor] = {}
    hooks = []

    def count(layer: int, top_k: int) -> Any:
        def hook(router: Any, inputs: Any, output: Any) -> None:
            logits = inputs[0].flatten(0, -2).float() @ router.weight.float().T
            chosen = logits.topk(top_k).indices.flatten()
            counts[layer] = counts.get(layer, 0) + chosen.bincount(minlength=logits.shape[1])

        return hook

    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            top_k = model.config.num_experts_per_tok
            hooks.append(block.mlp.gate.register_forward_hook(count(layer, top_k)))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def given() -> tuple[Path, list[str]]:
    """The checkpoint of the command line and the texts of standard input."""
    return Path(sys.argv[1]), json.load(sys.stdin)


def unseen_of(counts: dict[int, torch.Tensor]) -> list[tuple[int, int]]:
    """Layer and expert of those that no token reached."""
    return [
        (layer, expert)
        for layer, count in counts.items()
        for expert in range(len(count))
        if not count[expert]
    ]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; 1 for a matrix of zeros."""
    return float((found - wanted).norm() / wanted.norm())
