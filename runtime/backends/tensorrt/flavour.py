"""The differences between the two TensorRT products, as a table, so that no code tests for one.

full          TensorRT 10.3 to 11: builds on the device, for it alone
TensorRT-RTX  1.7: builds anywhere, and compiles its kernels when a context is made. We compile them
              eagerly, share them through one cache, and turn its own CUDA graphs off, because ours
              span several engines
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deeptalk_edge.errors import BackendError


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One TensorRT product: its Python module, and how contexts are made."""

    product: str
    module: str
    series: tuple[str, ...]
    """Prefixes of the versions whose Python API the contract tests have compared."""
    way_out: str
    """How to install it, for messages."""
    context_choices: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Fields of `IRuntimeConfig`: the enumeration and its member; empty if contexts are made
    without a config."""
    says_capturable: bool = False
    """Whether a context reports if a CUDA graph can capture its work."""

    def load(self) -> Any:
        """Import the module.

        Raises BackendError if it is not installed, does not load, or is of another series.
        """
        if importlib.util.find_spec(self.module) is None:
            raise BackendError(f"{self.product} is not installed here: {self.way_out}")
        try:
            trt = importlib.import_module(self.module)
        except Exception as error:  # an old driver may raise other types
            raise BackendError(
                f"{self.product}: its Python module {self.module} does not load ({error}); "
                f"install it again: {self.way_out}"
            ) from error
        version = str(trt.__version__)
        if not f"{version}.".startswith(tuple(f"{series}." for series in self.series)):
            raise BackendError(
                f"{self.product} {version}: this runtime works with {', '.join(self.series)}; "
                f"install one of these: {self.way_out}"
            )
        return trt


FLAVOURS = {
    "tensorrt": Flavour(
        product="TensorRT",
        module="tensorrt",
        series=("10.3", "10.13", "10.16", "11"),
        way_out="it comes with JetPack; a virtual environment there needs --system-site-packages",
    ),
    "tensorrt_rtx": Flavour(
        product="TensorRT-RTX",
        module="tensorrt_rtx",
        series=("1.7",),
        way_out="pip install 'deeptalk-edge[tensorrt-rtx]'",
        context_choices={
            "cuda_graph_strategy": ("CudaGraphStrategy", "DISABLED"),
            "dynamic_shapes_kernel_specialization_strategy": (
                "DynamicShapesKernelSpecializationStrategy",
                "EAGER",
            ),
        },
        says_capturable=True,
    ),
}
"""Product by the backend that a bundle is made for."""
