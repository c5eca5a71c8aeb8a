"""The plan reader, on text as TensorRT-RTX 1.7 writes it; other tests read real plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.engines.inspect import EngineGraph, read_plan

HEADER = """header {
  version = 5
  region = { name=devmem_topdown_0 size=4096 alignment=128 instance=0 type=user }
  region = { name=devmem_topdown_1 size=1024 alignment=128 instance=0 type=user }
  region = { name=__mye21-consts size=999 alignment=128 instance=0 type=system constant=true }
  accelerators={sm86 sm120 }
"""
DESCRIPTORS = """descriptors {
  tensor={ alignment=4 dims={ "rows.1" 192 } mem_prop=0 name="x.1" offset=0 rank0=0 region="" \
stride_order={ 1 0 } strides={ 192 1 } type=float }
  tensor={ alignment=128 dims={ 192 500 } name="weight" offset=2 region=__mye21-consts type=half }
  tensor={ alignment=128 dims={ 6 192 500 } name="gathered" offset=0 region="devmem_topdown_0" \
strides={ 1 } type=half }
  tensor={ alignment=128 dims={ 900000 } is_scratchspace=1 name="__scratch_space_stream0" \
region="devmem_topdown_1" strides={ 1 } type=int8 }
"""
MAIN = """main {
 label bb1:
  shape_call={ name="__mye365_0" stream=0 }
  function={ name=__myl_MoveTran fqn=__myl_MoveTran_0x6a args={ "weight" "gathered" } \
input_args={ "weight" } output_args={ "gathered" } stream=0
  function={ name=__myl_CastMulSum fqn=x input_args={ "weight" "x.1" } output_args={ "y" } stream=0
  function={ name=_gemv_mha_v1 fqn=x input_args={ "x.1" } output_args={ "y" } stream=0
  custom_layer={ name="moe_1" output={"y" } input={"x.1" "gathered" } stream=0
shape_main {
  copy={ name="copy_d2s" output={"s" } input={"weight" } stream=0 }
"""


def read(tmp_path: Path, *texts: str, end: bytes = b"\0") -> list[EngineGraph]:
    path = tmp_path / "a.plan"
    path.write_bytes(b"\xff\xfe\0" + b"".join(text.encode() + end + b"\x80" * 9 for text in texts))
    return read_plan(path)


def test_targets_memory_and_operations_are_read(tmp_path: Path) -> None:
    (graph,) = read(tmp_path, HEADER + DESCRIPTORS + MAIN)
    assert graph.targets == ("sm_86", "sm_120")
    assert graph.scratch_bytes == 5120
    assert [operation.name for operation in graph.fused_attentions] == ["_gemv_mha_v1"]
    assert [operation.inputs for operation in graph.plugins] == [("x.1", "gathered")]
    x = graph.tensors[0]
    assert (x.dims, x.dtype, x.least_elements) == (("rows.1", 192), "float", 192)


def test_a_copied_weight_and_a_large_temporary_are_found(tmp_path: Path) -> None:
    (graph,) = read(tmp_path, HEADER + DESCRIPTORS + MAIN)
    assert [move.name for move in graph.moves_of(192 * 500)] == ["__myl_MoveTran"]
    assert graph.moves_of(192 * 501) == []
    assert [tensor.name for tensor in graph.temporaries_of(192 * 500)] == ["gathered"]


def test_each_profile_is_a_graph_and_operations_within_a_kernel_are_not(tmp_path: Path) -> None:
    whole = HEADER + DESCRIPTORS + MAIN
    inner = whole.replace("sm86 sm120 ", "* ")
    assert len(read(tmp_path, whole, inner, whole)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no graph found"),
        ("not a plan", "no graph found"),
        (HEADER, "0 tensors and 0 operations"),
        (HEADER + DESCRIPTORS, "4 tensors and 0 operations"),
        (HEADER + MAIN, "0 tensors and 4 operations"),
        (HEADER.replace("accelerators", "targets") + DESCRIPTORS + MAIN, "1.7 can be read"),
    ],
)
def test_a_file_that_is_not_a_plan_or_of_another_version_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path, text)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.plan"
    path.touch()
    with pytest.raises(ArtifactError, match="no graph found"):
        read_plan(path)
