"""Names of earlier versions. They still work; each one warns once in a process.

module      __getattr__ = old_classes(__name__, BargedIn="Interrupted")
method      make_room = old_method("make_room", "idle")
property    was_on_trial = old_property("was_on_trial", "was_speculative")
settings    @old_fields(sure_log_p="confident_log_p"), above `dataclass`
counts      OldKeys(counts, whole_passes="all_resident_passes")
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

_warned: set[str] = set()


def warn_once(old: str, new: str) -> None:
    """Say, the first time, that the caller's caller uses an old name."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)


def old_classes(module: str, **names: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: old name to new name."""

    def getattr_of_module(old: str) -> Any:
        if old not in names:
            raise AttributeError(f"module {module!r} has no attribute {old!r}")
        warn_once(f"{module}.{old}", names[old])
        return getattr(sys.modules[module], names[old])

    return getattr_of_module


def old_method(old: str, new: str) -> Callable[..., Any]:
    """A method that calls the one of the new name."""

    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        warn_once(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    return method


def old_property(old: str, new: str) -> Any:
    """A property that reads the one of the new name."""

    def read(self: object) -> Any:
        warn_once(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(read)


def old_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """A decorator of a dataclass: the constructor and the attributes know old fields, too."""

    def decorate(cls: type[T]) -> type[T]:
        create = cls.__init__

        @wraps(create)
        def init(self: T, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                warn_once(f"{cls.__name__}.{old}", names[old])
                kwargs[names[old]] = kwargs.pop(old)
            create(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[assignment]
        for old, new in names.items():
            setattr(cls, old, old_property(old, new))
        return cls

    return decorate


class OldKeys(dict[str, Any]):
    """A dict that can be read by old keys; they are not among its keys, so JSON lacks them."""

    def __init__(self, content: Mapping[str, Any], **names: str) -> None:
        super().__init__(content)
        self._names = names

    def __missing__(self, old: str) -> Any:
        new = self._names.get(old)
        if new is None:
            raise KeyError(old)
        warn_once(f"the key {old}", new)
        return self[new]
