"""A site to crawl: HTML that this machine has, or that is made up, served on loopback."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that may wait to be accepted


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, each after ``delay`` seconds."""

    protocol_version = "HTTP/1.1"  # connections may stay open
    timeout = 5  # but not idle for longer

    def __init__(self, *args: object, delay: float, directory: str) -> None:
        self.delay = delay
        super().__init__(*args, directory=directory)

    def do_GET(self) -> None:
        time.sleep(self.delay)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """The crawl has its own report."""


@contextmanager
def serving(folder: Path, delay: float) -> Iterator[str]:
    """Serve a folder while it lasts; gives the URL."""
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(f"no index.html in {folder}; set -p folder=...")
    if not 0 <= delay < 60:
        raise ValueError(f"delay={delay}: it is in seconds, 0 or more and less than 60")
    with Server(("127.0.0.1", 0), partial(Handler, delay=delay, directory=str(folder))) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def chosen(folder: Path | None) -> Iterator[Path]:
    """A folder with a site: this one, or documentation that is installed here, or made up."""
    folder = folder or documentation()
    if folder:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made_up:
        make_up(Path(made_up))
        yield Path(made_up)


def documentation() -> Path | None:
    """The HTML of Python's documentation if it is installed, else the longest that is."""
    roots = [Path(sys.base_prefix) / "share/doc", Path("/usr/share/doc")]
    for pattern in ("python3*/html", "*/html"):
        found = [folder.parent for root in roots for folder in root.glob(f"{pattern}/index.html")]
        if found:
            return max(found, key=lambda folder: len(list(folder.glob("*.html"))))
    return None


def make_up(folder: Path, pages: int = 60) -> None:
    """Write so many pages that link to each other, always the same; every tenth has a broken
    link."""
    names = ["index.html", *(f"page{n}.html" for n in range(1, pages))]
    for n, name in enumerate(names):
        chance = random.Random(n)
        targets = [*names[2 * n + 1 : 2 * n + 3], *chance.sample(names, 3)]
        if n % 10 == 5:
            targets.append(f"gone{n}.html")
        links = "\n".join(f'<li><a href="{target}">{target}</a>' for target in targets)
        text = "lorem ipsum " * chance.randrange(10, 1000)
        (folder / name).write_text(f"<title>{name}</title>\n<ul>\n{links}\n</ul>\n<p>{text}\n")
