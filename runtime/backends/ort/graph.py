"""One graph in an ONNX Runtime session, and buffers bound to it."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import BackendError
from deeptalk_edge.lifetime import Lifetime, leave_to_parent
from deeptalk_edge.runtime.backends.ort.mapped_files import own_mapped_files

_POLL_S = 0.1
_STUCK_S = 3.0  # time with only some of a session's threads; all start within microseconds


class OrtGraph:
    """One graph in one session. Errors of ONNX Runtime become BackendError."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Raises BackendError if ONNX Runtime refuses the graph or does not start its threads."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan per shape, and every row changes it
        # Sessions run one after the other: an idle session that spins takes a core from the active
        # one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        keep_int8_exact(options)
        self.name = path.name
        self._session: Any = _open_session(path, options, threads)
        leave_to_parent(self._session)
        own_mapped_files(path.parent)
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._lifetime = Lifetime(self.name)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on arrays; returns the outputs in the graph's order.

        Raises BackendError if that fails, UsageError if the graph is closed or belongs to another
        process.
        """
        self._lifetime.check()
        try:
            outputs: list[NDArray[Any]] = self._session.run(None, dict(feeds))
        except Exception as error:
            raise BackendError(f"{self.name}: failed to run ({error})") from error
        return outputs

    def binding(self) -> OrtBinding:
        """Raises UsageError if the graph is closed or belongs to another process."""
        self._lifetime.check()
        return OrtBinding(self.name, self._session)

    def close(self) -> None:
        """Release the session; bindings keep it alive. Idempotent."""
        self._lifetime.close()
        self._session = None


def _open_session(path: Path, options: onnxruntime.SessionOptions, threads: int) -> Any:
    """Open a session, from a new thread if it has threads: if the system gives ONNX Runtime only
    some of them, its constructor waits forever.

    Raises BackendError in that case and for every error of ONNX Runtime.
    """
    session: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def open_it() -> None:
        try:
            providers = ["CPUExecutionProvider"]
            session.set_result(onnxruntime.InferenceSession(path, options, providers=providers))
        except BaseException as error:
            session.set_exception(error)

    if threads == 1:
        open_it()
    else:
        before = set(os.listdir("/proc/self/task"))
        host.start_thread(threading.Thread(target=open_it, name=f"open {path.name}", daemon=True))
        if not _is_done(session, before, threads):
            raise _too_many_threads(path, threads)
    try:
        return session.result()
    except Exception as error:  # the binding's errors have no closer common base
        if "pthread_create" in str(error):
            raise _too_many_threads(path, threads) from error
        raise BackendError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} refuses it ({error})"
        ) from error


def _is_done(session: concurrent.futures.Future[Any], before: set[str], threads: int) -> bool:
    """Wait for a session; False if it has had only some of its threads for `_STUCK_S`."""
    num_stuck = 0
    while num_stuck * _POLL_S < _STUCK_S:
        if concurrent.futures.wait([session], timeout=_POLL_S).done:
            return True
        num_new = len(set(os.listdir("/proc/self/task")) - before) - 1  # less the opening thread
        num_stuck = num_stuck + 1 if 0 < num_new < threads - 1 else 0
    return False


def _too_many_threads(path: Path, threads: int) -> BackendError:
    return BackendError(
        f"{path}: ONNX Runtime wants {threads} threads and the system refuses some of them; "
        f"{host.MORE_THREADS}, or ask for fewer"
    )


@cache
def int8_saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether ONNX Runtime's fast int8 products may overflow: on x86-64 without VNNI."""
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def keep_int8_exact(options: onnxruntime.SessionOptions) -> None:
    """Choose exact int8 products for this machine, the fast form if it is exact."""
    if int8_saturates():  # the exact form takes 1.5 to 2 times as long
        options.add_session_config_entry("session.x64quantprecision", "1")


class OrtBinding:
    """Buffers bound to a graph's inputs and outputs. The caller keeps the buffers alive."""

    def __init__(self, name: str, session: Any) -> None:
        self._name = name
        self._binding = session.io_binding()
        self._run = partial(session.run_with_iobinding, self._binding)

    def feed(self, name: str, buffer: NDArray[Any]) -> None:
        self._binding.bind_input(
            name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data
        )

    def fetch(self, name: str, buffer: NDArray[Any]) -> None:
        self._binding.bind_output(
            name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data
        )

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            raise BackendError(f"{self._name}: failed to run ({error})") from error
