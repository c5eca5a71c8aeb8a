"""Reads TOML tables into dataclasses: no key unknown, none missing, amounts above zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def fields(kind: type[Any], content: Mapping[str, Any], table: str) -> dict[str, Any]:
    """The keys of `content[table]`, which are fields of `kind`.

    Raises ValueError if it is no table, a key is unknown, or one without a default is missing.
    """
    found = content.get(table, {})
    if not isinstance(found, dict):
        raise ValueError(f"{table} is {found!r}, expected a table")
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := found.keys() - known.keys():
        raise ValueError(
            f"{table} has no {', '.join(sorted(unknown))}; known are {', '.join(known)}"
        )
    needed = {
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := needed - found.keys():
        raise ValueError(f"{table} lacks {', '.join(sorted(missing))}")
    return dict(found)


def positive(name: str, kind: type[Any], value: Any) -> Any:
    """An int or a float above zero; an int passes for a float.

    Raises ValueError for anything else.
    """
    allowed = (int, float) if kind is float else (kind,)
    is_right = isinstance(value, allowed) and not isinstance(value, bool)
    if not is_right or not 0 < value < float("inf"):
        expected = "a whole number above 0" if kind is int else "a number above 0"
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return value
