"""A report loads nothing from outside and shows its content as text."""

from __future__ import annotations

from html.parser import HTMLParser

from deeptalk_edge.report.page import Point, heat_map, page, scatter, section, table, text, verdict

HOSTILE = '<script src="http://x.test/a.js"></script>&"\''


class Outside(HTMLParser):
    """Collects the URLs that a page would fetch, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.fetched.append(str(value))
            assert not name.startswith("on")


def test_content_is_escaped_and_nothing_is_fetched() -> None:
    content = page(
        HOSTILE,
        [
            section(HOSTILE, text(HOSTILE), verdict(HOSTILE, good=False)),
            table((HOSTILE,), [(HOSTILE,), (None,), (0.123456,)]),
            heat_map([HOSTILE], [(HOSTILE, [0.0])], low=1, marked=[(0, 0)]),
            scatter([Point(1.0, 2.0, HOSTILE)], HOSTILE, HOSTILE),
        ],
    )
    outside = Outside()
    outside.feed(content)
    assert outside.fetched == []
    assert "script" not in outside.tags
    assert "0.1235" in content
    assert "default-src 'none'" in content
