"""The lock of a pager that works: who holds it may decide, and wait for what the loader brings."""

from __future__ import annotations

import threading

from deeptalk_edge.errors import ExpertUnavailable
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.experts.loader import Loader


class PagerLock:
    """A context that raises UsageError if the pager is closed or another process's, and
    ExpertUnavailable if nothing is loaded any more."""

    def __init__(
        self, lock: threading.Lock, lifetime: Lifetime, loader: Loader, source_name: str
    ) -> None:
        """`lock` is the loader's."""
        self.unchecked = lock
        """The lock alone, for calls that a closed pager still allows, such as a release."""
        self._lifetime, self._loader, self._source_name = lifetime, loader, source_name

    def __enter__(self) -> None:
        self._lifetime.check()  # before the lock, which a thread of a parent may hold for ever
        self.unchecked.acquire()
        try:
            self.expect_work()
        except BaseException:
            self.unchecked.release()
            raise

    def __exit__(self, *error: object) -> None:
        self.unchecked.release()

    @property
    def is_ours(self) -> bool:
        """Whether this process opened the pager."""
        return self._lifetime.is_ours

    def check(self) -> None:
        """Raises UsageError as entering does, without the lock."""
        self._lifetime.check()

    def expect_work(self) -> None:
        """Raises, lock in hand, if nothing that is waited for can come any more."""
        self._lifetime.check()
        failure = self._loader.failure
        if failure is not None:
            raise ExpertUnavailable(
                f"{self._source_name}: reading experts ended by a fault of ours "
                f"({type(failure).__name__}: {failure}); report it, and open the bundle again"
            ) from failure

    def wait(self) -> None:
        """Wait, lock in hand, until something has moved."""
        self._loader.moved.wait()
        self.expect_work()

    def notify(self) -> None:
        """Something has moved: wake, lock in hand, who waits."""
        self._loader.moved.notify_all()
