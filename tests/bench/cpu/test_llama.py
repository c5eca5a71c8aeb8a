"""Settings for the llama.cpp family are applied or refused."""

from __future__ import annotations

import ctypes

import pytest

from deeptalk_edge.bench.cpu.llama import choose, takes


class Params(ctypes.Structure):
    _fields_ = (("n_ctx", ctypes.c_uint32), ("load_mode", ctypes.c_int))


def test_a_setting_that_a_version_no_longer_has_is_refused() -> None:
    params = Params()
    choose(params, n_ctx=512)
    assert params.n_ctx == 512
    with pytest.raises(ValueError, match="Params has no use_mmap"):
        choose(params, load_mode=0, use_mmap=0)


def test_ik_llama_cpp_is_left_out_where_it_would_abort() -> None:
    assert takes("ik_llama.cpp", 27)
    assert not takes("ik_llama.cpp", 5)
    assert takes("llama.cpp", 5)
