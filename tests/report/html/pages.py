"""Reads pages as a browser would, and keeps what a person could be harmed by."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

_DOCUMENT = ("html", "head", "meta", "title", "style", "body", "script")
_TEXT = ("header", "main", "aside", "section", "h1", "h2", "h3", "p", "div", "span", "b", "br")
_LISTS = ("dl", "dt", "dd", "pre", "kbd", "strong", "figure", "figcaption", "button", "input")
_TABLES = ("table", "thead", "tbody", "tr", "th", "td")
_DRAWING = ("svg", "g", "path", "rect", "text", "line", "defs", "marker")
TAGS = frozenset((*_DOCUMENT, *_TEXT, *_LISTS, *_TABLES, *_DRAWING))


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.code: dict[str, str] = {}
        self.bare = page
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            tag = self._open[-1]
            self.code[tag] = self.code.get(tag, "") + data
        else:
            self.texts.append(data)

    def having(self, tag: str, name: str) -> list[dict[str, str]]:
        """The attributes of every such tag that has an attribute."""
        return [found for t, found in self.attributes if t == tag and name in found]


def check_is_harmless(page: str) -> Page:
    """One script and one style, ours, by their hashes; no network, no handler, no odd tag."""
    read = Page(page)
    assert not read._open
    assert set(read.tags) <= TAGS
    assert read.tags["script"] == read.tags["style"] == 1
    policy = next(a["content"] for t, a in read.attributes if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(read.code[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attributes in read.attributes:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "src", "href", "action", "srcdoc", "data")
            assert "url(" not in value or value == "url(#tip)"
    assert not re.search(r"url\(|@import|https?:", read.code["style"])
    assert not re.search(r"https?:|fetch|innerHTML|eval|XMLHttp|import", read.code["script"])
    ids = Counter(a["id"] for _, a in read.attributes if "id" in a)
    assert max(ids.values()) == 1
    # A page shows its text; what acts on a reader (bidirectional marks, controls) shows as escapes.
    assert all(c.isprintable() or c == "\n" for c in page)
    return read
