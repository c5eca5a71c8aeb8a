"""What each stage trains, and where its tokens may go: one table for all recipes.

part              tensors
encoder           the Whisper-shaped encoder
projector         audio features to decoder width
embedding         the table of ids, and the head: one tensor where they are tied
dense             layers below the first MoE layer, whole
norms             norms of MoE layers and the last one
attention         self-attention of MoE layers, the norm of its latent included
router            gates; of a barred expert's row nothing moves, as no token reaches it
audio_experts, text_experts, shared_experts

barred            experts that no token may go to, of either modality: the mask is the stage's, not
                  the token's

The rows of the official stages equal DeepTalk's `train_deeptalk.py` (and `alignment.py`,
`train_deeptalk_rl.py`, `train_puremoe.py`); the others are stated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.training.expert_split import text_experts
from deeptalk_edge.training.model import DeepTalk

StageName: TypeAlias = Literal[
    "align",
    "audio_experts",
    "text_experts",
    "joint",
    "preference",
    "puremoe",
    "moextend",
    "random_split",
    "distil",
    "finetune",
]
Part: TypeAlias = Literal[
    "encoder",
    "projector",
    "embedding",
    "dense",
    "norms",
    "attention",
    "router",
    "audio_experts",
    "text_experts",
    "shared_experts",
]
Split: TypeAlias = Sequence[Sequence[int]]
"""The audio experts of every MoE layer."""

_DECODER: frozenset[Part] = frozenset(
    {
        "embedding",
        "dense",
        "norms",
        "attention",
        "router",
        "audio_experts",
        "text_experts",
        "shared_experts",
    }
)
_SPECIAL: frozenset[Part] = _DECODER - {"attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table."""

    trains: frozenset[Part]
    barred: Literal["nothing", "audio", "text"] = "nothing"
    """Which side's experts get no token."""

    needs_split: bool = False
    """Whether the stage can only run once audio experts are known."""


RULES: dict[StageName, Rule] = {
    "align": Rule(trains=frozenset({"projector", "embedding"})),
    "audio_experts": Rule(trains=_SPECIAL - {"text_experts"}, barred="text", needs_split=True),
    "text_experts": Rule(trains=_SPECIAL - {"audio_experts"}, barred="audio", needs_split=True),
    "joint": Rule(trains=_DECODER),
    "preference": Rule(trains=_DECODER),
    # Baselines. Whisper is frozen in every stage; puremoe's script moves all the rest.
    "puremoe": Rule(trains=_DECODER | {"projector"}),
    "moextend": Rule(trains=_SPECIAL - {"text_experts"}, barred="text", needs_split=True),
    "random_split": Rule(trains=_SPECIAL - {"text_experts"}, barred="text", needs_split=True),
    "distil": Rule(trains=_DECODER),
    "finetune": Rule(trains=_DECODER),
}


def part_of(name: str, decoder: DecoderSpec, split: Split | None) -> Part:
    """The part that a tensor belongs to, by its official name. Without a split every routed expert
    is a text expert, as in the model that DeepTalk starts from."""
    if name.startswith("model.audio_encoder."):
        return "encoder"
    if name.startswith("model.audio_mm_projector."):
        return "projector"
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return "embedding"
    if name == "model.norm.weight":
        return "norms"
    _, _, layer, rest = name.split(".", 3)
    index = int(layer)
    if index not in decoder.moe_layers:
        return "dense"
    if rest.startswith("self_attn."):
        return "attention"
    if rest.startswith("mlp.gate."):
        return "router"
    if rest.startswith("mlp.shared_experts."):
        return "shared_experts"
    if rest.startswith("mlp.experts."):
        expert = int(rest.split(".")[2])
        is_audio = split is not None and expert in split[index - decoder.num_dense_layers]
        return "audio_experts" if is_audio else "text_experts"
    return "norms"


def apply_rule(model: DeepTalk, rule: Rule, split: Split | None) -> None:
    """Set what trains and where tokens may go.

    Raises SettingsError if the rule needs a split and there is none, or it is another model's.
    """
    decoder = model.spec.decoder
    if split is not None:
        check_split(split, decoder)
    elif rule.needs_split:
        raise SettingsError(
            "this stage needs to know the audio experts; make the file with `deeptalk-edge train "
            "split` and name it as `experts`"
        )
    barred: Split | None = None
    if split is not None and rule.barred != "nothing":
        barred = split if rule.barred == "audio" else text_experts(split, decoder.num_experts)
    model.set_barred_experts(barred)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, decoder, split) in rule.trains)
    # Sinusoids, which Whisper never trains.
    model.model.audio_encoder.embed_positions.requires_grad_(False)


def check_split(split: Split, decoder: DecoderSpec) -> None:
    """Refuse a split that is not this decoder's.

    Raises SettingsError saying what does not fit.
    """
    if len(split) != len(decoder.moe_layers):
        raise SettingsError(
            f"the split has {len(split)} lists of audio experts, this model "
            f"{len(decoder.moe_layers)} MoE layers; split this model's own experts with "
            "`deeptalk-edge train split`"
        )
    for layer, experts in zip(decoder.moe_layers, split, strict=True):
        if not set(experts) <= set(range(decoder.num_experts)):
            raise SettingsError(
                f"the split names expert {max(experts)} of layer {layer}; this model has experts 0 "
                f"to {decoder.num_experts - 1}"
            )
        fewest = min(len(set(experts)), decoder.num_experts - len(set(experts)))
        if fewest < decoder.top_k:
            raise SettingsError(
                f"layer {layer} has {len(set(experts))} audio experts of {decoder.num_experts}: "
                f"both kinds need at least top_k = {decoder.top_k}"
            )


def trainable(model: nn.Module) -> list[str]:
    """Names of what trains, in the model's order."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def num_trainable(model: nn.Module) -> int:
    """Parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
