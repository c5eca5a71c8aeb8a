"""The backend's assumptions about CUDA and TensorRT, tested on the emulator and on real ones.

Tests on real ones are skipped without a GPU, with the reason. `make gpu-check` runs them first.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deeptalk_edge.errors import BackendError, EdgeError
from deeptalk_edge.export.engines.build import EngineSettings, build_engine
from deeptalk_edge.runtime.backends.tensorrt.device import make_log
from deeptalk_edge.runtime.backends.tensorrt.flavour import FLAVOURS
from deeptalk_edge.runtime.cuda import Cudart
from tests.runtime.backends.tensorrt.emulation import gpu, tensorrt_module

Bytes = NDArray[np.uint8]


@pytest.fixture(params=["emulated late", "emulated eager", "true"])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cudart]:
    with ExitStack() as stack:
        if request.param != "true":
            stack.enter_context(gpu(mode=request.param.split()[1]))
        try:
            yield Cudart()
        except EdgeError as error:
            pytest.skip(f"no CUDA here: {error}")


class Memory:
    """Pinned and device memory of a test."""

    def __init__(self, cuda: Cudart) -> None:
        self._cuda, self._stack = cuda, ExitStack()
        self.stream = cuda.make_stream()
        self._stack.callback(cuda.destroy_stream, self.stream)

    def device(self, num_bytes: int) -> int:
        pointer = self._cuda.malloc(num_bytes)
        self._stack.callback(self._cuda.free, pointer)
        return pointer

    def pinned(self, content: Any) -> tuple[int, Bytes]:
        array = np.asarray(content, np.uint8)
        pointer = self._cuda.host_malloc(array.size)
        self._stack.callback(self._cuda.host_free, pointer)
        view = np.frombuffer(
            memoryview((ctypes.c_char * array.size).from_address(pointer)).cast("B"), np.uint8
        )
        view[:] = array
        return pointer, view

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        self._cuda.synchronize(self.stream)
        self._stack.close()


def test_addresses_are_aligned_to_256_bytes(cuda: Cudart) -> None:
    with Memory(cuda) as memory:
        assert [memory.device(n) % 256 for n in (1, 3, 300)] == [0, 0, 0]


def test_a_stream_does_its_work_in_order(cuda: Cudart) -> None:
    with Memory(cuda) as memory:
        source, _ = memory.pinned(range(8))
        target, found = memory.pinned([0] * 8)
        place, other = memory.device(8), memory.device(8)
        cuda.copy_to_device(place, source, 8, memory.stream)
        cuda.copy_on_device(other, place, 8, memory.stream)
        cuda.begin_memset(place, 9, 8, memory.stream)
        cuda.copy_to_host(target, other, 4, memory.stream)
        cuda.copy_to_host(target + 4, place, 4, memory.stream)
        cuda.synchronize(memory.stream)
        assert found.tolist() == [0, 1, 2, 3, 9, 9, 9, 9]


def test_rows_are_copied_at_their_pitches(cuda: Cudart) -> None:
    with Memory(cuda) as memory:
        source, _ = memory.pinned(range(12))
        target, found = memory.pinned([255] * 10)
        place, other = memory.device(12), memory.device(10)
        cuda.copy_to_device(place, source, 12, memory.stream)
        cuda.begin_memset(other, 0, 10, memory.stream)
        cuda.copy_rows(other, 5, place + 1, 4, row_bytes=2, num_rows=2, stream=memory.stream)
        cuda.copy_to_host(target, other, 10, memory.stream)
        cuda.synchronize(memory.stream)
        assert found.tolist() == [1, 2, 0, 0, 0, 5, 6, 0, 0, 0]


def test_a_graph_runs_only_when_launched_and_reads_the_memory_of_that_time(
    cuda: Cudart,
) -> None:
    with Memory(cuda) as memory:
        source, given = memory.pinned([1])
        target, found = memory.pinned([0])
        place = memory.device(1)
        cuda.begin_capture(memory.stream)
        cuda.copy_to_device(place, source, 1, memory.stream)
        cuda.copy_to_host(target, place, 1, memory.stream)
        graph = cuda.end_capture(memory.stream)
        cuda.synchronize(memory.stream)
        assert found.tolist() == [0]
        for value in (5, 6):
            given[0] = value
            cuda.launch(graph, memory.stream)
            cuda.synchronize(memory.stream)
            assert found.tolist() == [value]
        cuda.destroy_graph(graph)


def test_a_capture_refuses_to_wait(cuda: Cudart) -> None:
    with Memory(cuda) as memory:
        cuda.begin_capture(memory.stream)
        with pytest.raises(BackendError, match=r"CUDA error 90\d"):
            cuda.synchronize(memory.stream)
        with suppress(BackendError):  # a real device invalidates the capture
            cuda.destroy_graph(cuda.end_capture(memory.stream))


def test_an_event_is_done_when_all_earlier_work_is(cuda: Cudart) -> None:
    with Memory(cuda) as memory:
        source, _ = memory.pinned([7])
        place = memory.device(1)
        first, last = (cuda.make_event(is_timed=True) for _ in range(2))
        cuda.record(first, memory.stream)
        cuda.copy_to_device(place, source, 1, memory.stream)
        cuda.record(last, memory.stream)
        cuda.wait(last)
        assert cuda.is_done(first)
        assert cuda.is_done(last)
        assert cuda.elapsed_ms(first, last) >= 0.0
        for event in (first, last):
            cuda.destroy_event(event)


def test_an_urgent_stream_has_a_higher_priority(cuda: Cudart) -> None:
    streams = [cuda.make_stream(), cuda.make_stream(is_urgent=True)]
    assert len({*streams}) == 2
    for stream in streams:
        cuda.destroy_stream(stream)


# TensorRT -----------------------------------------------------------------------------------------


class Engines:
    """A small engine y = relu(x), x (T, 4), T from 1 to 8, by one TensorRT."""

    def __init__(self, trt: Any, cuda: Cudart, content: bytes, *, has_config: bool) -> None:
        self.trt, self.cuda = trt, cuda
        self.log = make_log(trt)
        self.runtime = trt.Runtime(self.log)
        self.content = content
        self.engine = self.runtime.deserialize_cuda_engine(content)
        self._has_config = has_config

    def context(self, scratch: int) -> Any:
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        given = strategy
        if self._has_config:
            given = self.engine.create_runtime_config()
            given.set_execution_context_allocation_strategy(strategy)
        context = self.engine.create_execution_context(given)
        context.set_device_memory(scratch, self.engine.device_memory_size_v2)
        return context


@pytest.fixture(params=["emulated", "tensorrt", "tensorrt_rtx"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    name = "tensorrt" if request.param == "emulated" else request.param
    with ExitStack() as stack:
        if request.param == "emulated":
            stack.enter_context(tensorrt_module(tmp_path))
            stack.enter_context(gpu(mode="eager"))
        elif importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} here")
        try:
            cuda = Cudart()
        except EdgeError as error:
            pytest.skip(f"no CUDA here: {error}")
        graph = tmp_path / "relu.onnx"
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ("T", 4)) for n in "xy")
        nodes = [helper.make_node("Relu", ["x"], ["y"])]
        made = helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        onnx.save(made, graph)
        targets = (cuda.compute_capability,) if name == "tensorrt_rtx" else ()
        backend: Any = name
        settings = EngineSettings(backend=backend, targets=targets)
        shapes = {"x": ((1, 4), (2, 4), (8, 4))}
        build_engine(graph, tmp_path / "relu.engine", [shapes], settings)
        yield Engines(
            importlib.import_module(name),
            cuda,
            (tmp_path / "relu.engine").read_bytes(),
            has_config=bool(FLAVOURS[name].context_choices),
        )


def test_an_engine_describes_its_tensors(engines: Engines) -> None:
    engine, trt = engines.engine, engines.trt
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["x", "y"]
    assert engine.get_tensor_mode("x") == trt.TensorIOMode.INPUT
    assert engine.get_tensor_mode("y") == trt.TensorIOMode.OUTPUT
    assert np.dtype(trt.nptype(engine.get_tensor_dtype("x"))) == np.float32
    assert tuple(engine.get_tensor_shape("x")) == (-1, 4)
    assert [tuple(s) for s in engine.get_tensor_profile_shape("x", 0)] == [(1, 4), (2, 4), (8, 4)]


def test_a_file_that_is_not_an_engine_gives_none_and_a_reason(engines: Engines) -> None:
    for content in (b"nonsense" * 600, b""):
        assert engines.runtime.deserialize_cuda_engine(content) is None
    assert engines.log.take_errors() != "TensorRT gives no reason"


def test_a_shape_outside_of_the_profile_is_refused_and_the_last_shape_stays(
    engines: Engines,
) -> None:
    with Memory(engines.cuda) as memory:
        context = engines.context(memory.device(max(engines.engine.device_memory_size_v2, 256)))
        assert context.set_optimization_profile_async(0, memory.stream)
        assert context.set_input_shape("x", (8, 4))
        assert not context.set_input_shape("x", (9, 4))
        assert not context.set_tensor_address("z", memory.device(4))


def test_a_run_computes_at_the_addresses_bound_and_can_be_captured_after_the_first(
    engines: Engines,
) -> None:
    cuda = engines.cuda
    with Memory(cuda) as memory:
        context = engines.context(memory.device(max(engines.engine.device_memory_size_v2, 256)))
        assert context.set_optimization_profile_async(0, memory.stream)
        values = np.arange(-4, 4, dtype=np.float32)
        source, given = memory.pinned(values.view(np.uint8))
        target, found = memory.pinned(np.zeros(32, np.uint8))
        x, y = memory.device(32), memory.device(32)
        assert context.set_input_shape("x", (2, 4))
        assert not context.execute_async_v3(memory.stream)  # nothing is bound
        assert context.set_tensor_address("x", x)
        assert context.set_tensor_address("y", y)

        def run() -> None:
            cuda.copy_to_device(x, source, 32, memory.stream)
            assert context.execute_async_v3(memory.stream)
            cuda.copy_to_host(target, y, 32, memory.stream)

        run()
        cuda.synchronize(memory.stream)
        assert found.view(np.float32).tolist() == np.maximum(values, 0).tolist()
        cuda.begin_capture(memory.stream)
        run()
        graph = cuda.end_capture(memory.stream)
        assert context.set_tensor_address("y", memory.device(32))  # a graph keeps the old one
        given[:] = (values + 2).view(np.uint8)
        cuda.launch(graph, memory.stream)
        cuda.synchronize(memory.stream)
        assert found.view(np.float32).tolist() == np.maximum(values + 2, 0).tolist()
        cuda.destroy_graph(graph)
