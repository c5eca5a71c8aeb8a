"""The two TensorRTs and what differs between them, as a table: no code asks which one it runs on.

full          TensorRT 10.3 to 11: builds on the device, for it alone
TensorRT-RTX  1.7: builds anywhere, and compiles its kernels when a context is made; they are
              compiled eagerly, shared through one cache, and its own CUDA graphs are off, for ours
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
    """One TensorRT: its Python module and how contexts are made."""

    product: str
    module: str
    series: tuple[str, ...]
    """What its versions begin with, of those whose Python API the contract tests have compared."""
    way_out: str
    """How it is installed."""
    context_choices: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Fields of `IRuntimeConfig`: the enumeration and its member; empty where contexts are made
    without one."""
    says_capturable: bool = False
    """Whether a context tells if its work can be captured in a CUDA graph."""

    def load(self) -> Any:
        """Import the module.

        Raises BackendError if it is not here, does not load, or is of another series.
        """
        if importlib.util.find_spec(self.module) is None:
            raise BackendError(f"{self.product} is not installed here: {self.way_out}")
        try:
            trt = importlib.import_module(self.module)
        except Exception as error:  # a missing library is an ImportError, an old driver may differ
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
"""By the backend that a bundle is made for."""
