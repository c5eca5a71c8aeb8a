"""Is a bundle's plugin for this machine? Asked of the library itself, before TensorRT loads it.

`dt_moe_build` is a function of libdt_moe_plugin.so that needs neither TensorRT nor a GPU:

    {"abi": 1, "sm": "80 86 87 89 90 100 110 120", "ptx": "120"}

abi    of the node's attributes and the records' layout; another one reads experts wrongly
sm     compute capabilities that it holds machine code for
ptx    code that the driver compiles for this one and later ones
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from deeptalk_edge.errors import BackendError

PLUGIN_ABI = 1
"""Of this runtime: `DT_MOE_ABI` of native/tensorrt_plugin/moe_launch.h."""

_AGAIN = "build it again with `make plugin` and export the bundle with it"


def check_plugin(path: Path, compute_capability: str) -> None:
    """Raises BackendError if the library is missing, not ours, of another build, or without code
    for this GPU."""
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
    """Machine code serves the minor versions from its own on, within one major version."""
    return sm // 10 == capability // 10 and sm <= capability
