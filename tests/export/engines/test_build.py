"""The builder in its child process: engines, refusals, and its error if it dies."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from deeptalk_edge.errors import BackendError
from deeptalk_edge.export.engines import build as builds
from deeptalk_edge.export.engines.build import EngineSettings, build_engine, unsupported_nodes
from deeptalk_edge.export.engines.inspect import read_plan

RTX = EngineSettings(backend="tensorrt_rtx", targets=("sm_86", "sm_89", "sm_120"))
PROFILES = [{"x": ((1, 16), (2, 16), (8, 16))}]


def write_graph(path: Path, operator: str = "Relu", **attributes: str) -> Path:
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", **attributes)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("T", 16)) for name in ("x", "y")
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("deeptalk", 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_one_engine_serves_every_target(tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    built = build_engine(write_graph(tmp_path / "a.onnx"), engine, PROFILES, RTX)
    assert built.bytes == engine.stat().st_size
    assert built.version.startswith("1.7.")
    assert built.peak_bytes > 2**20
    assert [graph.targets for graph in read_plan(engine)] == [("sm_86", "sm_89", "sm_120")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "a.onnx"]


def test_without_targets_an_engine_serves_every_card_from_sm_80_on(tmp_path: Path) -> None:
    graph, engine = write_graph(tmp_path / "a.onnx"), tmp_path / "a.engine"
    build_engine(graph, engine, PROFILES, replace(RTX, targets=()))
    assert [graph.targets for graph in read_plan(engine)] == [("sm_80",)]


def test_float32_is_not_rounded_to_tf32_on_the_way(tmp_path: Path) -> None:
    """The plan records how its kernels are compiled."""
    engine = tmp_path / "a.engine"
    build_engine(write_graph(tmp_path / "a.onnx"), engine, PROFILES, RTX)
    assert set(re.findall(rb"\stf32=(\d)", engine.read_bytes())) == {b"0"}


def test_a_graph_that_tensorrt_cannot_take_is_named_with_the_node(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "odd.onnx", "Nothing", domain="deeptalk")
    (node,) = unsupported_nodes(graph, RTX)
    assert (node.operator, node.node) == ("Nothing", "the_node")
    with pytest.raises(
        BackendError,
        match=r"odd\.onnx: tensorrt_rtx built no engine for sm_86, sm_89, sm_120: "
        r"the_node \(Nothing\)",
    ):
        build_engine(graph, tmp_path / "odd.engine", PROFILES, RTX)
    assert unsupported_nodes(write_graph(tmp_path / "a.onnx"), RTX) == []


def test_a_build_without_shapes_quotes_the_builders_last_error(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "a.onnx")
    with pytest.raises(BackendError, match=r"gave no engine; its last lines:\n(.*\n)*.*profile"):
        build_engine(graph, tmp_path / "a.engine", [], RTX)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("print('terminate called', file=__import__('sys').stderr); exit(3)", "status 3; its last"),
        ("print('{')", "status 0"),
    ],
)
def test_a_builder_that_dies_leaves_an_error_and_no_engine(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(program)
    monkeypatch.setattr(builds, "_BUILDER", dying)
    graph = write_graph(tmp_path / "a.onnx")
    with pytest.raises(BackendError, match=rf"a\.onnx: .* sm_89.*{said}"):
        build_engine(graph, tmp_path / "a.engine", PROFILES, RTX)
    assert not list(tmp_path.glob("*.engine*"))


def test_a_file_that_is_not_a_plugin_is_named(tmp_path: Path) -> None:
    library = tmp_path / "libother.so"
    library.write_bytes(b"no library")
    settings = replace(RTX, plugins=(library,))
    with pytest.raises(BackendError, match=r"libother\.so: not a plugin library"):
        build_engine(write_graph(tmp_path / "a.onnx"), tmp_path / "a.engine", PROFILES, settings)


def test_a_target_that_rtx_does_not_know_is_refused_at_once() -> None:
    with pytest.raises(BackendError, match=r"nothing for sm_87.*, on the device"):
        EngineSettings(backend="tensorrt_rtx", targets=("sm_87",))


def test_without_tensorrt_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "a.onnx")
    with pytest.raises(BackendError, match="tensorrt is not installed here; it comes with JetPack"):
        build_engine(graph, tmp_path / "a.engine", PROFILES, EngineSettings(backend="tensorrt"))


def test_another_version_than_the_targets_builds_nothing(
    tmp_path: Path, full_tensorrt: Path
) -> None:
    graph = write_graph(tmp_path / "a.onnx")
    for version, is_right in (("10.16", True), ("10.1", False), ("10.3", False)):
        settings = EngineSettings(backend="tensorrt", version=version)
        if is_right:
            built = build_engine(graph, tmp_path / "a.engine", PROFILES, settings)
            assert built.version == "10.16.2.1"
            continue
        with pytest.raises(
            BackendError, match=rf"10\.16\.2\.1 \(JetPack 7\.2\), .* wants {version}"
        ):
            build_engine(graph, tmp_path / "b.engine", PROFILES, settings)
