"""Low-rank adapters: y = W x + scale * B (A x), with W frozen.

Ours, and not `peft`'s: every expert here is a plain linear layer under its official name, so an
adapter is two more tensors of that layer. `peft` would wrap the model, rename every tensor of the
official layout, and reach stacked experts through `target_parameters`, which we do not have; and
it brings transformers and accelerate along. The adapter file is in `peft`'s layout all the same.

Source: LoRA (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import write_file
from deeptalk_edge.schema import read_json
from deeptalk_edge.training.model import DeepTalk

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; it starts as the layer that it was made from."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        whole: Tensor = super().forward(x)
        return whole + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in)."""
        return self.scale * (self.lora_b @ self.lora_a)


def add_adapters(model: DeepTalk, names: list[str], *, rank: int, alpha: float) -> int:
    """Give an adapter to every linear layer whose weight is named; returns how many got one."""
    wanted, count = set(names), 0
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}.weight".lstrip(".")
            if name in wanted and isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(parent, child_name, LoraLinear(child, rank, alpha))
                count += 1
    return count


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every layer that has an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def lora_delta(model: nn.Module, weight_name: str) -> Tensor | None:
    """What a weight's adapter adds to it, (out, in); None where it has none."""
    module_name, _, last = weight_name.rpartition(".")
    if last != "weight":
        return None
    module = model.get_submodule(module_name)
    return module.delta().detach() if isinstance(module, LoraLinear) else None


@torch.no_grad()
def merge_adapters(model: DeepTalk) -> None:
    """Add every adapter to its weight and take it off."""
    for name, layer in list(adapters(model)):
        parent_name, _, child = name.rpartition(".")
        has_bias = layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
        layer.weight.add_(layer.delta())
        plain.weight, plain.bias = layer.weight, layer.bias
        setattr(model.get_submodule(parent_name), child, plain)


def adapter_tensors(model: DeepTalk) -> dict[str, Tensor]:
    """Both matrices of every adapter, named as `peft` names them."""
    found: dict[str, Tensor] = {}
    for name, layer in adapters(model):
        for letter, matrix in (("A", layer.lora_a), ("B", layer.lora_b)):
            whole = getattr(matrix, "full_tensor", lambda matrix=matrix: matrix)()
            found[f"{_PREFIX}{name}.lora_{letter}.weight"] = whole.detach().cpu().contiguous()
    return found


@torch.no_grad()
def load_adapter_tensors(model: DeepTalk, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a model. Raises ArtifactError, naming the tensor, if one does not
    fit."""
    own = adapter_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            wanted = tuple(own[name].shape) if name in own else "no such adapter"
            raise ArtifactError(f"the adapter's {name} is {found}, expected {wanted}")
    for name, layer in adapters(model):
        layer.lora_a.copy_(tensors[f"{_PREFIX}{name}.lora_A.weight"])
        layer.lora_b.copy_(tensors[f"{_PREFIX}{name}.lora_B.weight"])


def save_adapter(model: DeepTalk, directory: Path, base: str) -> None:
    """Write an adapter in `peft`'s layout. Raises DoesNotFit if the disk is full."""
    layers = dict(adapters(model))
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": first.lora_a.shape[0],
        "lora_alpha": first.scale * first.lora_a.shape[0],
        "target_modules": sorted(layers),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / ADAPTER, save(adapter_tensors(model)))
    write_file(directory / ADAPTER_CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def load_adapter(model: DeepTalk, directory: Path) -> None:
    """Give a model the adapters of a directory.

    Raises ArtifactError if it is missing, or another model's.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    names, rank, alpha = (config.get(k) for k in ("target_modules", "r", "lora_alpha"))
    if not isinstance(names, list) or type(rank) is not int or not isinstance(alpha, (int, float)):
        raise ArtifactError(f"{directory}/{ADAPTER_CONFIG}: no adapter of this project")
    add_adapters(model, [f"{name}.weight" for name in names], rank=rank, alpha=float(alpha))
    try:
        load_adapter_tensors(model, load_file(directory / ADAPTER))
    except OSError as error:
        raise ArtifactError(f"{directory}/{ADAPTER}: not readable ({error})") from error
