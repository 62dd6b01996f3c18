"""What is in a page: its links."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import quote, urldefrag, urljoin, urlsplit

SAFE = "%/:?#[]@!$&'()*+,;=~"  # stays as it is in a URL


def links(html: bytes, url: str) -> list[str]:
    """The absolute http and https links of the page at ``url``, without fragments, each once."""
    parser = _Links(url)
    try:
        parser.feed(html.decode("utf-8", "replace"))
    except AssertionError:
        pass  # HTMLParser gives up at "<![" with nonsense behind it: what came before counts
    return list(parser.found)


class _Links(HTMLParser):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.base = url
        self.found: dict[str, None] = {}  # a set that keeps the order

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href is None:
            return
        try:
            link = urldefrag(urljoin(self.base, quote(href.strip(), safe=SAFE))).url
            parts = urlsplit(link)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises as well
        except ValueError:
            return  # such as http://[:80/: nobody could go there
        if tag == "base":
            self.base = link
        elif tag in ("a", "area") and usable:
            self.found[link] = None
