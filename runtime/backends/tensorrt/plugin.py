"""Checks that a bundle's plugin fits this machine, before TensorRT loads it.

The function `dt_moe_build` of libdt_moe_plugin.so needs neither TensorRT nor a GPU and returns:

    {"abi": 1, "sm": "80 86 87 89 90 100 110 120", "ptx": "120"}

abi    version of the node's attributes and the records' layout; with another one, experts would be
       read wrongly
sm     compute capabilities with machine code in the library
ptx    compute capability of the PTX code, which the driver compiles for it and later ones
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from deeptalk_edge.errors import BackendError

PLUGIN_ABI = 1
"""ABI of this runtime: `DT_MOE_ABI` of native/tensorrt_plugin/moe_launch.h."""

_AGAIN = "build it again with `make plugin` and export the bundle with it"


def check_plugin(path: Path, compute_capability: str) -> None:
    """Raises BackendError if the library is missing, is not our plugin, has another ABI, or has no
    code for this GPU."""
    if not path.is_file():
        raise BackendError(f"{path}: the plugin is missing; copy the bundle again")
    try:
        library = ctypes.CDLL(str(path))
        build = library.dt_moe_build
    except OSError as error:
        raise BackendError(f"{path}: not a library for this machine ({error}); {_AGAIN}") from error
    except AttributeError as error:
        raise BackendError(f"{path}: not our plugin, or of an older build; {_AGAIN}") from error
    build.restype = ctypes.c_char_p
    said = json.loads(build())
    if said["abi"] != PLUGIN_ABI:
        raise BackendError(
            f"{path}: a plugin of ABI {said['abi']}, this runtime wants {PLUGIN_ABI}; {_AGAIN}"
        )
    capability = int(compute_capability.removeprefix("sm_"))
    has_code = any(_runs(int(sm), capability) for sm in said["sm"].split())
    if not has_code and capability < int(said["ptx"]):
        raise BackendError(
            f"{path}: holds code for sm {said['sm']}, this GPU is {compute_capability}; {_AGAIN}"
        )


def _runs(sm: int, capability: int) -> bool:
    """Whether machine code for `sm` runs: it serves its own and later minor versions of one major
    version."""
    return sm // 10 == capability // 10 and sm <= capability
