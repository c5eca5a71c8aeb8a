"""MoExtend: audio experts are added beside the text experts, instead of found among them.

The new experts start as evenly spaced text experts, their router rows likewise. That is done once:
the official script does it again at each start, and so throws away what a stage has learnt.

Source: DeepTalk `moextend.py`, `train_moextend.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.training.experts import MixtureOfExperts
from deeptalk_edge.training.model import DeepTalk


@torch.no_grad()
def with_audio_experts(model: DeepTalk, count: int) -> DeepTalk:
    """A model with `count` experts more in each MoE layer, after its own.

    Raises SettingsError if `count` is not between top_k and the number of experts.
    """
    decoder = model.spec.decoder
    if not decoder.top_k <= count <= decoder.num_experts:
        raise SettingsError(
            f"num_audio_experts = {count}: expected {decoder.top_k} to {decoder.num_experts}"
        )
    spec = replace(model.spec, decoder=replace(decoder, num_experts=decoder.num_experts + count))
    extended = DeepTalk(spec)
    old, new = model.state_dict(), extended.state_dict()
    for name, tensor in new.items():
        if name in old and old[name].shape == tensor.shape:
            tensor.copy_(old[name])
    sources = [i * decoder.num_experts // count for i in range(count)]
    for index in decoder.moe_layers:
        ours, theirs = (m.model.layers[index].mlp for m in (model, extended))
        assert isinstance(ours, MixtureOfExperts)
        assert isinstance(theirs, MixtureOfExperts)
        rows = ours.gate.weight
        theirs.gate.weight.copy_(torch.cat([rows, rows[sources]]))
        for place, source in enumerate(sources, decoder.num_experts):
            theirs.experts[place].load_state_dict(ours.experts[source].state_dict())
    return extended


def added_experts(decoder: DecoderSpec, count: int) -> list[list[int]]:
    """The split of an extended model: the last `count` experts of each layer."""
    first = decoder.num_experts - count
    return [list(range(first, decoder.num_experts)) for _ in decoder.moe_layers]
