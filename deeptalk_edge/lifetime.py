"""How long an object may be used: until it is closed, in the process that opened it.

closed    every further use is a UsageError; closing again does nothing
process   threads do not survive a fork: a child's use is a UsageError at once, and its `close`
          touches nothing that is the parent's
busy      what one thread at a time may use refuses a second one
memory    what is closed in the middle of a use goes when that use ends, never under it
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from deeptalk_edge.errors import UsageError


class Lifetime:
    """The lifetime of one object, and as a context one use of it. For any thread."""

    def __init__(self, name: str, give_back: Callable[[], None] | None = None) -> None:
        """`give_back` is called once: when the object is closed and in no use."""
        self._name, self._give_back = name, give_back
        self._process = os.getpid()
        self._is_closed = False
        self._inside = threading.Lock()  # once all is given back, for ever

    @property
    def is_open(self) -> bool:
        """Whether this process may use the object."""
        return not self._is_closed and self.is_ours

    @property
    def is_ours(self) -> bool:
        """Whether this process opened the object."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raises UsageError if the object is closed or belongs to another process."""
        if self._is_closed or self._process != os.getpid():
            self.check_process()
            raise UsageError(f"{self._name} is closed; open another one")

    def check_process(self) -> None:
        """Raises UsageError if the object belongs to another process."""
        if not self.is_ours:
            raise UsageError(
                f"{self._name} belongs to process {self._process}, this is its child "
                f"{os.getpid()}, which has none of its threads; open another one after the fork, "
                "or start processes with spawn"
            )

    def __enter__(self) -> None:
        """Use the object, which stays whole for the block.

        Raises UsageError as `check` does, and if another use is not over.
        """
        self.check()
        if not self._inside.acquire(False):
            self.check()  # a thread that closed it meanwhile holds the lock for ever
            raise UsageError(f"{self._name} is busy in another call; wait until that has returned")
        if self._is_closed:
            self.__exit__()
            self.check()

    def __exit__(self, *error: object) -> None:
        self._inside.release()
        if self._is_closed:
            self._finish()

    def close(self) -> None:
        """Refuse every further use, and give everything back: now, or when the use at hand ends."""
        is_first, self._is_closed = not self._is_closed, True
        if is_first and self.is_ours:
            self._finish()

    def _finish(self) -> None:
        if self._inside.acquire(blocking=False):
            give_back = self._give_back
            self._give_back = None  # often the owner's method: they would keep each other
            if give_back is not None:
                give_back()


class _Lives(Protocol):
    _lifetime: Lifetime


SelfT = TypeVar("SelfT", bound=_Lives)
P = ParamSpec("P")
R = TypeVar("R")


def while_open(
    method: Callable[Concatenate[SelfT, P], R],
) -> Callable[Concatenate[SelfT, P], R]:
    """A method that is one use of its object's `_lifetime`."""

    @wraps(method)
    def guarded(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lifetime:
            return method(self, *args, **kwargs)

    return guarded


_left_to_parents: WeakSet[Any] = WeakSet()


def leave_to_parent(thing: Any) -> None:
    """Never destroy this in a child: its destructor would wait for threads that are not there."""
    _watch_forks()
    _left_to_parents.add(thing)


@cache
def _watch_forks() -> None:
    """Keep forked children from destroying what only their parent can destroy.

    A child's `exit` skips the destructors of C++ libraries: ONNX Runtime's wait for its threads.
    """
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        for thing in _left_to_parents:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
        if hasattr(libc, "on_exit"):  # glibc's; the last one that is registered runs first
            libc.on_exit(libc._exit, None)
            libc.on_exit(libc.fcloseall, None)

    os.register_at_fork(after_in_child=in_child)
