"""JSON becomes dataclasses field by field; an error names the field and the expected value."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import Between, Items, Text, from_config, from_json, read_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Annotated[float, Between(0.5, 8)]
    name: Annotated[str, Text("[a-z]+", "lower-case letters")] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: Annotated[int, Between(1, 64)]
    is_on: bool
    kind: Literal["left", "right"]
    inner: Inner
    maybe: Inner | None
    places: Annotated[tuple[int, ...], Items(1, 3)]
    by_name: Mapping[str, Inner]

    def __post_init__(self) -> None:
        if self.size < len(self.places):
            raise ValueError(f"size = {self.size}: {len(self.places)} places")


WHOLE: dict[str, Any] = {
    "size": 3,
    "is_on": True,
    "kind": "left",
    "inner": {"rate": 2, "name": "b"},
    "maybe": None,
    "places": [1, 2],
    "by_name": {"x": {"rate": 0.5}},
}


def changed(**changes: Any) -> dict[str, Any]:
    return WHOLE | changes


def test_a_whole_object_is_read_and_written_back() -> None:
    found = from_json(Outer, WHOLE)
    assert found.inner == Inner(rate=2.0, name="b")
    assert type(found.inner.rate) is float
    assert from_json(Outer, json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "Outer = a list of 0: expected an object"),
        (changed(size=65), "size = 65: expected 1 to 64"),
        (changed(size=10**12), "size = 1000000000000: expected 1 to 64"),
        (changed(size=2.0), "size = 2.0: expected a whole number"),
        (changed(size=True), "size = true: expected a whole number"),
        (changed(size=None), "size = null: expected a whole number"),
        (changed(size=1), "Outer: size = 1: 2 places"),
        (changed(is_on=1), "is_on = 1: expected true or false"),
        (changed(kind="up"), 'kind = "up": expected one of left, right'),
        (changed(kind=[]), "kind = a list of 0: expected one of left, right"),
        (changed(inner={"rate": float("nan")}), "inner.rate = NaN: expected a finite number"),
        (changed(inner={"rate": 10**400}), r"inner.rate = 10+\.\.\.: expected a finite number"),
        (changed(inner={"rate": 9}), "inner.rate = 9: expected 0.5 to 8"),
        (changed(inner={}), "inner.rate is missing"),
        (changed(inner={"rate": 1, "name": "B\n"}), r'inner.name = "B\\n": expected lower-case'),
        (changed(maybe=3), "maybe = 3: expected an object"),
        (changed(places=[]), "places = a list of 0: expected 1 to 3 entries"),
        (changed(places=[1, "2"]), r'places\[1\] = "2": expected a whole number'),
        (changed(places={"a": 1}), "places = an object: expected a list"),
        (changed(by_name={"x": 1}), "by_name.x = 1: expected an object"),
        (changed(by_name=None), "by_name = null: expected an object"),
        (changed(more=1), "more: no such field"),
        ({k: v for k, v in WHOLE.items() if k != "kind"}, "kind is missing"),
    ],
)
def test_a_value_that_does_not_fit_is_named(content: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_json(Outer, content)


def test_another_programs_field_names_are_used_in_messages() -> None:
    names = {"rate": "theirRate"}
    assert from_config(Inner, {"theirRate": 4, "other": 1}, names, "config.json").rate == 4
    with pytest.raises(ArtifactError, match=r"config\.json: theirRate = 9: expected 0\.5 to 8"):
        from_config(Inner, {"theirRate": 9}, names, "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json: the field 'theirRate' is missing"):
        from_config(Inner, {}, names, "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*WHOLE, "rate"]), inner),
)


@given(JSON)
def test_no_json_ends_in_anything_but_a_value_or_a_refusal(content: object) -> None:
    for each in (content, changed(inner=content), changed(by_name={"x": content})):
        with contextlib.suppress(ArtifactError):
            assert isinstance(from_json(Outer, each), Outer)


def test_a_deep_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text('{"quoted": "[[[[", "a": ' + "[" * 40 + "]" * 40 + "}")
    assert read_json(path)["quoted"] == "[[[["
    path.write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(ArtifactError, match=r"deep\.json: not readable as JSON \(nested more"):
        read_json(path)
