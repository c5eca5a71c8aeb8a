"""The precision of each class of tensors in a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, ExpertDtype

PARTS = ("encoder", "decoder", "experts", "head", "codec", "kv_cache")

DenseDtype = Literal["float32", "float16", "bfloat16", "int8"]
CodecDtype = Literal["float32", "float16"]
CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision of each class of tensors."""

    encoder: DenseDtype
    decoder: DenseDtype
    """Attention, norms, dense and shared FFNs; the router stays in float32."""
    experts: ExpertDtype
    head: DenseDtype
    """The table of embeddings, which is the head as well."""
    codec: CodecDtype
    """Never bfloat16: TensorRT has no such deconvolution."""
    kv_cache: CacheDtype
    """int8 rows, with a scale for each of a row's two parts, on the native backend alone."""
    expert_group: int | None = None
    """Weights that share a scale; int4 experts only."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Precision).items():
            known = get_args(kind)
            if get_origin(kind) is Literal and getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: known are {', '.join(known)}")
        if (self.experts == "int4") is not (self.expert_group in INT4_GROUPS):
            raise ValueError(
                f"{self.experts} experts with expert_group = {self.expert_group}: int4 needs "
                f"one of {', '.join(map(str, INT4_GROUPS))}, every other precision none"
            )

    def changed(self, changes: Sequence[str]) -> Precision:
        """With other choices, each "part=dtype"; "experts=int4:128" names int4's group as well.

        Raises ValueError if a part or its precision is unknown.
        """
        values: dict[str, Any] = dataclasses.asdict(self)
        for change in changes:
            part, _, dtype = change.partition("=")
            if part not in PARTS or not dtype:
                raise ValueError(
                    f"precision {change!r}: expected PART=DTYPE, a part of {', '.join(PARTS)}"
                )
            values[part], _, group = dtype.partition(":")
            if part == "experts":
                values["expert_group"] = int(group) if group.isdigit() else None
        return Precision(**values)

    def spelled(self) -> dict[str, str]:
        """By part, int4's group beside it."""
        group = f" g{self.expert_group}" if self.expert_group else ""
        return {part: getattr(self, part) for part in PARTS} | {"experts": self.experts + group}


FLOAT32 = Precision(
    encoder="float32",
    decoder="float32",
    experts="float32",
    head="float32",
    codec="float32",
    kv_cache="float32",
)
"""What a bundle for ONNX Runtime holds."""

CPU_KERNELS = Precision(
    encoder="float32",
    decoder="int8",
    experts="int8",
    head="int8",
    codec="float32",
    kv_cache="bfloat16",
)
"""What the CPU's own kernels compute with; experts may be int4, cache and encoder int8 as well."""
