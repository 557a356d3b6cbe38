"""Reading a report's page as a reader would."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Table:
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def column(self, name: str) -> dict[str, str]:
        """{first cell: that of a column}"""
        at = self.head.index(name)
        return {row[0]: row[at] for row in self.rows}


class ReadPage(HTMLParser):
    """What stands on a page: texts by the tag they stand in, tables, and addresses."""

    VOID = {"meta", "link", "img", "br", "hr"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.tables: list[Table] = []
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        """Whatever a browser would fetch to show the page."""
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return "\n".join(text for texts in self.texts.values() for text in texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.loaded += [given[name] for name in ("src", "srcset", "poster") if name in given]
        if tag == "img":
            self.images.append(given)
        elif tag == "a":
            self.links.append(given["href"])
        elif "href" in given:
            self.loaded.append(given["href"])
        elif tag == "table":
            self.tables.append(Table())
        elif tag == "tr" and "tbody" in self._open:
            self.tables[-1].rows.append([])
        elif tag == "th":
            self.tables[-1].head.append("")
        elif tag == "td":
            self.tables[-1].rows[-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)
            if tag in ("p", "li", "h1", "h2", "h3", "pre", "figcaption", "title", "summary"):
                self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closed out of order"

    def handle_data(self, data: str) -> None:
        for tag in ("th", "td"):
            if tag in self._open:
                cells = self.tables[-1].head if tag == "th" else self.tables[-1].rows[-1]
                cells[-1] += data
                return
        for tag in reversed(self._open):
            if tag in self.texts:
                self.texts[tag][-1] += data
                return
