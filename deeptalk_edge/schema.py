"""JSON into frozen dataclasses: every type, range and field name is checked on the way.

A field's annotation is the whole rule: a dataclass, `Literal`, `tuple[X, ...]`, `Mapping[str, X]`,
`X | None`, a scalar, or `Annotated` with the values it may have. A field with a default may be
missing; an unknown one is refused.

    num_layers: Annotated[int, Between(1, 1024)]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import open_input

T = TypeVar("T")

_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_SHOWN_CHARACTERS = 60
_MAX_DEPTH = 64
_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Between:
    """A number from `low` to `high`, both included."""

    low: float
    high: float

    def holds(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Text:
    """Text that a pattern matches as a whole; `what` names it in messages."""

    pattern: str
    what: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True, slots=True)
class Items:
    """A list or an object with `low` to `high` entries."""

    low: int
    high: int

    def holds(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"{self.low} to {self.high} entries"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises ArtifactError if the file is missing or is not a JSON object.
    """
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json_value(path: Path) -> Any:
    """Read JSON of any kind.

    Raises ArtifactError if the file is missing or is not JSON.
    """
    try:
        with open_input(path) as file:
            text = file.read().decode("utf-8")
        _check_depth(text)
        return json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error


def from_json(kind: type[T], content: object, where: str = "") -> T:
    """Build a dataclass from the JSON form that `dataclasses.asdict` gives.

    `where` begins the names of fields in messages. Raises ArtifactError naming the first field that
    is missing, unknown, of another type or out of range.
    """
    built: T = _object(kind, content, where)
    return built


def from_config(kind: type[T], config: object, names: Mapping[str, str], where: str) -> T:
    """Build a dataclass from foreign JSON. `names` has its name for each field; fields
    without one keep their default, and what else the JSON holds is left alone. Messages use its
    names.

    Raises ArtifactError as `from_json` does.
    """
    if not isinstance(config, dict):
        raise _refusal(where, config, "an object")
    untyped: Any = kind
    hints, values = _hints(untyped), {}
    for field in dataclasses.fields(untyped):
        name = names.get(field.name)
        if name in config:
            values[field.name] = checked(hints[field.name], config[name], f"{where}: {name}")
        elif not _has_default(field):
            raise ArtifactError(f"{where}: the field {name!r} is missing")
    built: T = _built(kind, values, where)
    return built


def _object(kind: type, content: object, where: str) -> Any:
    if not isinstance(content, dict):
        raise _refusal(where or kind.__name__, content, "an object")
    hints = _hints(kind)
    if unknown := content.keys() - hints.keys():
        raise ArtifactError(f"{_join(where, _shown(min(unknown)))}: no such field")
    values = {name: checked(hints[name], v, _join(where, name)) for name, v in content.items()}
    for field in dataclasses.fields(kind):
        if field.name not in values and not _has_default(field):
            raise ArtifactError(f"{_join(where, field.name)} is missing")
    return _built(kind, values, where or kind.__name__)


def _built(kind: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValueError as error:  # the dataclass's own check
        raise ArtifactError(f"{where}: {error}") from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    has_value = field.default is not dataclasses.MISSING
    return has_value or field.default_factory is not dataclasses.MISSING


def checked(hint: Any, content: object, where: str) -> Any:
    """One value as its annotation says it. Raises ArtifactError naming it, as `where` does."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = checked(arguments[0], content, where)
        for rule in arguments[1:]:
            if not rule.holds(value):
                raise _refusal(where, content, str(rule))
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if content is None else checked(inner, content, where)
    if origin is Literal:
        if not (isinstance(content, str) and content in arguments):
            raise _refusal(where, content, "one of " + ", ".join(map(str, arguments)))
        return content
    if origin is tuple:
        if not isinstance(content, list):
            raise _refusal(where, content, "a list")
        return tuple(checked(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(content))
    if origin is Mapping or hint is Mapping:
        if not isinstance(content, dict):
            raise _refusal(where, content, "an object")
        return {k: checked(arguments[1], v, _join(where, _shown(k))) for k, v in content.items()}
    if dataclasses.is_dataclass(hint):
        return _object(hint, content, where)  # type: ignore[arg-type]
    return _scalar(hint, content, where)


def _scalar(kind: type, content: object, where: str) -> Any:
    """A bool is no number here, and a whole number serves as a float."""
    if kind is float and type(content) is int and abs(content) < 1 << 1000:
        content = float(content)
    if type(content) is not kind or (isinstance(content, float) and not math.isfinite(content)):
        raise _refusal(where, content, _KINDS[kind])
    return content


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _check_depth(text: str) -> None:
    """Before the parser sees it: that one recurses, and what runs at its end (a garbage collection,
    say) has no stack left."""
    depth, in_string = 0, False
    for found in _MARKS.finditer(text):
        mark = found[0]
        if mark == '"':
            in_string = not in_string
        elif not in_string and mark in "[{":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        elif not in_string and mark in "]}":
            depth -= 1


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _shown(content: object) -> str:
    """A value as far as a message has room for it; a deep one is never spelled out."""
    if isinstance(content, (list, dict)):
        return f"a list of {len(content)}" if isinstance(content, list) else "an object"
    text = json.dumps(content) if not isinstance(content, str) else content
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _refusal(where: str, content: object, expected: str) -> ArtifactError:
    found = f'"{_shown(content)}"' if isinstance(content, str) else _shown(content)
    return ArtifactError(f"{where} = {found}: expected {expected}")
