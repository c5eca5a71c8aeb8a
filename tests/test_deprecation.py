"""Old public names work, and warn once."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from deeptalk_edge import deprecation
from deeptalk_edge.deprecation import OldKeys, old_classes, old_fields, old_method, old_property


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "_warned", set())


def new_name() -> str:
    return "new"


@old_fields(old="new")
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    new: int = 1

    def new_method(self) -> int:
        return self.new

    an_old_method = old_method("an_old_method", "new_method")
    an_old_property = old_property("an_old_property", "new")


USES: dict[str, tuple[Callable[[], Any], Any]] = {
    "class": (lambda: old_classes(__name__, old_name="new_name")("old_name"), new_name),
    "keyword": (lambda: Settings(**{"old": 3}), Settings(new=3)),
    "field": (lambda: operator.attrgetter("old")(Settings(new=4)), 4),
    "replaced field": (lambda: replace(Settings(), **{"old": 5}), Settings(new=5)),
    "method": (lambda: Settings(new=6).an_old_method(), 6),
    "property": (lambda: Settings(new=7).an_old_property, 7),
    "key": (lambda: OldKeys({"new": 8}, old="new")["old"], 8),
}


@pytest.mark.parametrize("kind", USES)
def test_an_old_name_does_what_the_new_one_does_and_warns_once(kind: str) -> None:
    use, expected = USES[kind]
    with pytest.warns(DeprecationWarning, match="is called new") as caught:
        assert use() == expected
    assert (caught[0].filename == __file__) is (kind != "replaced field")  # dataclasses calls it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use() == expected


def test_a_name_that_never_existed_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        old_classes(__name__, old="new")("other")
    with pytest.raises(KeyError, match="other"):
        OldKeys({"new": 8}, old="new")["other"]


def test_counts_are_written_to_json_only_by_their_new_keys() -> None:
    assert json.dumps(OldKeys({"new": 8}, old="new")) == '{"new": 8}'
