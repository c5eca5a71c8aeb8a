"""llama.cpp and ik_llama.cpp as contenders.

bench/cpu/peers.sh installs their Python packages in a separate folder. Weights are read into memory
and not mapped, so that malloc puts them on huge pages if GLIBC_TUNABLES says so.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bench.cpu.sizes import Form

MODULES = {"llama.cpp": "llama_cpp.llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}

Q4_0 = Form(weight_bits=4.5, cache_value_bytes=2)

_BATCH_ROWS = 512
_IK_LAYERS = 27


class LlamaDecoder:
    """One of the two libraries with a model loaded."""

    def __init__(
        self, packages: Path, name: str, model: Path, *, num_tokens: int, cache_rows: int
    ) -> None:
        """`num_tokens` is the model's vocabulary.

        Raises ImportError if its package is not installed, ValueError if it does not load the
        model.
        """
        see_packages(packages)
        self._api: Any = importlib.import_module(MODULES[name])
        self._is_ik = name == "ik_llama.cpp"
        self._random, self._num_tokens = np.random.default_rng(2), num_tokens
        self._api.llama_backend_init()
        self._model = self._load(model)
        self._context = self._open_context(cache_rows)
        if not self._model or not self._context:
            raise ValueError(f"{name} does not take {model}")
        self._remove_rows = self._bind_removal()
        self._position = 0

    def use(self, threads: int) -> None:
        self._api._lib.llama_set_n_threads(
            ctypes.c_void_p(self._context), ctypes.c_int32(threads), ctypes.c_int32(threads)
        )

    def fill(self, position: int) -> None:
        """Bring the cache to `position` rows: remove later ones, feed missing ones."""
        if self._position > position:
            self._remove_rows(position)
            self._position = position
        while self._position < position:
            self.feed(min(_BATCH_ROWS, position - self._position))

    def feed(self, num_rows: int) -> None:
        """Decode random tokens and compute the logits of the last."""
        api = self._api
        tokens = self._random.integers(0, self._num_tokens, num_rows).tolist()
        ids = (api.llama_token * num_rows)(*tokens)
        if not self._is_ik:
            status = api.llama_decode(self._context, api.llama_batch_get_one(ids, num_rows))
            api.llama_synchronize(self._context)
        else:
            status = api.llama_decode(self._context, self._batch(ids, num_rows))
        if status:
            raise ValueError(f"llama_decode: {status} at {self._position}")
        self._position += num_rows

    def _batch(self, ids: Any, num_rows: int) -> Any:
        """Make a batch for the older interface of ik_llama.cpp, which needs every field."""
        api = self._api
        sequence = (api.llama_seq_id * 1)(0)
        pointer = ctypes.cast(sequence, ctypes.POINTER(api.llama_seq_id))
        places = range(self._position, self._position + num_rows)
        batch = api.llama_batch()
        batch.n_tokens, batch.token = num_rows, ids
        batch.pos = (api.llama_pos * num_rows)(*places)
        batch.n_seq_id = (ctypes.c_int32 * num_rows)(*[1] * num_rows)
        batch.seq_id = (ctypes.POINTER(api.llama_seq_id) * num_rows)(*[pointer] * num_rows)
        batch.logits = (ctypes.c_int8 * num_rows)(*[0] * (num_rows - 1), 1)
        return batch

    def _load(self, model: Path) -> Any:
        params = self._api.llama_model_default_params()
        if self._is_ik:
            choices = {
                "use_mmap": False,
                "mla": 3,
                "repack_tensors": True,
                "fit": False,
                "ncmoe": 0,
            }
        else:
            choices = {"load_mode": self._api.LLAMA_LOAD_MODE_NONE}
        choose(params, n_gpu_layers=0, **choices)
        return self._api.llama_model_load_from_file(str(model).encode(), params)

    def _open_context(self, cache_rows: int) -> Any:
        if not self._model:
            return None
        params = self._api.llama_context_default_params()
        choose(params, n_ctx=cache_rows, n_batch=_BATCH_ROWS, n_ubatch=_BATCH_ROWS)
        if self._is_ik:
            choose(params, flash_attn=True, mla_attn=3)
            choose(params, fused_moe_up_gate=True, fused_up_gate=True)
        return self._api.llama_init_from_model(self._model, params)

    def _bind_removal(self) -> Any:
        """Return a function that removes all rows from a position on."""
        library, context = self._api._lib, ctypes.c_void_p(self._context)
        if self._is_ik:
            remove, place = library.llama_kv_cache_seq_rm, context
        else:
            library.llama_get_memory.restype = ctypes.c_void_p
            place = ctypes.c_void_p(library.llama_get_memory(context))
            remove = library.llama_memory_seq_rm
        one, end = ctypes.c_int32(0), ctypes.c_int32(-1)
        return lambda position: remove(place, one, ctypes.c_int32(position), end)


def choose(params: Any, **choices: int) -> None:
    """Set fields of a ctypes structure and check their names, which ctypes does not."""
    unknown = choices.keys() - {field[0] for field in params._fields_}
    if unknown:
        raise ValueError(
            f"{type(params).__name__} has no {', '.join(sorted(unknown))}; install the version "
            "that bench/cpu/peers.sh installs"
        )
    for name, value in choices.items():
        setattr(params, name, value)


def takes(name: str, num_layers: int) -> bool:
    """Whether a library takes a DeepSeek-V2-Lite of `num_layers`; ik_llama.cpp aborts otherwise."""
    return name != "ik_llama.cpp" or num_layers == _IK_LAYERS


def see_packages(folder: Path) -> None:
    """Append the folder to this process's import path, after our packages, so that numpy stays
    ours."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
