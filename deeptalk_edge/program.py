"""How a program of ours ends: with one line for an error that the user can act on, and whole files.

exit codes   0 done, 1 an error that the user can act on (one line on stderr), 2 a wrong flag,
             130, 143, 129 ended by Ctrl-C, SIGTERM, SIGHUP
signals      all three end a program alike: what was said is kept, files are closed whole. A second
             one changes nothing at first, since systemd and shells send two at once; after
             `_PATIENCE_S` it ends the program on the spot
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE_S = 2.0


def as_program(work: Callable[[], int | None]) -> int:
    """Run `work` as all of a program; returns the exit code (None counts as 0).

    An EdgeError and what the system refuses become one line on stderr; any other error is a bug
    and keeps its traceback.
    """
    signals = _EndingSignals()
    try:
        with signals.caught(), _every_character_printable():
            return _without_traceback(work)
    except KeyboardInterrupt:
        return 128 + signals.first


def _without_traceback(work: Callable[[], int | None]) -> int:
    from deeptalk_edge.errors import EdgeError
    from deeptalk_edge.files import silence_stdout

    try:
        code = _exit_code(work)
        if sys.stdout:  # None if the caller has closed it
            sys.stdout.flush()
        return code
    except EdgeError as error:
        print(f"deeptalk-edge: {error}", file=sys.stderr)
    except BrokenPipeError:  # `| head` has read enough
        silence_stdout()
    except OSError as error:
        print(f"deeptalk-edge: {_said_by_the_system(error)}", file=sys.stderr)
        silence_stdout()
    return 1


def _exit_code(work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _said_by_the_system(error: OSError) -> str:
    said = error.strerror or str(error)
    if error.filename is None:
        return said if _can_print() else f"standard output: {said}"
    name = error.filename if isinstance(error.filename, str) else repr(error.filename)
    return f"{name}: {said}"


def _can_print() -> bool:
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        return False
    return True


class _EndingSignals:
    """Turns SIGTERM and SIGHUP into what Ctrl-C is: a KeyboardInterrupt, once."""

    def __init__(self) -> None:
        self.first: int = signal.SIGINT
        self._first_s: float | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals that have their default handler; under `nohup` SIGHUP stays ignored."""
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) in defaults:
                    old[number] = signal.signal(number, self._end)
        except ValueError:  # only the main thread may; in another one signals stay its caller's
            pass
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._first_s is None:
            self.first, self._first_s = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._first_s > _PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def _every_character_printable() -> Iterator[None]:
    """A file's name or an answer that the terminal cannot show is escaped; it ends nothing."""
    errors = getattr(sys.stdout, "errors", None)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is None or errors != "strict":
        yield
        return
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        reconfigure(errors=errors)
