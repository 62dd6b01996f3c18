"""The crawler of the examples: its parts, and crawls of a small site in both lanes."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "crawler"
MODULES = ("fetching", "reading", "serving")
SECONDS = 60  # the deadline of each run

needs_gevent = pytest.mark.skipif(
    not importlib.util.find_spec("gevent"), reason="gevent is not installed"
)
needs_aiohttp = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"), reason="aiohttp is not installed"
)
LANES = ["async", pytest.param("green", marks=needs_gevent)]
CLIENTS = ["by_urllib", "by_streams", pytest.param("by_aiohttp", marks=needs_aiohttp)]

PAGES = {
    "index.html": '<a href="a.html#top">a</a> <a href="sub/">sub</a> <a href="gone.html">',
    "a.html": '<a href="/">home</a> <a href="http://192.0.2.1/elsewhere">away</a>'
    '<a href="secret/x.html">not for programs</a> <a href="mailto:x@y">mail</a>',
    "sub/index.html": '<a href="../a.html">a</a> <a href="b c.html">with a space</a>',
    "sub/b c.html": "x" * 5000,
    "secret/x.html": "secret",
    "robots.txt": "User-agent: *\nDisallow: /secret/\n",
}


@pytest.fixture
def example() -> Iterator[Any]:
    """The modules beside the example's task file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a small site."""
    root = tmp_path / "site"
    for name, text in PAGES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def execute(cwd: Path, *parameters: str) -> subprocess.CompletedProcess[str]:
    options = [word for parameter in parameters for word in ("-p", parameter)]
    program = [sys.executable, "-m", "taskrun", "exec", str(FOLDER / "tasks.py"), "-j", "2"]
    return subprocess.run(
        [*program, "--output", "raw", *options],
        cwd=cwd, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


# -- the whole ------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_a_crawl_finds_every_page_and_what_is_broken(lane: str, site: Path, tmp_path: Path) -> None:
    done = execute(tmp_path, f"folder={site}", f"lane={lane}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "never awaited" not in done.stderr and "Unclosed" not in done.stderr
    first, broken, source, *rest = done.stdout.splitlines()
    assert first.startswith("5 pages, 8 links on them, 1 broken, 1 lead to other sites")
    assert broken.startswith("broken   404 Not Found: ") and broken.endswith("/gone.html")
    assert source.startswith("         linked from http://127.0.0.1:") and source.endswith("/")
    largest = [line for line in rest if line.startswith("largest")]
    assert largest[0].endswith("/sub/b%20c.html")
    assert "secret" not in done.stdout


@pytest.mark.parametrize("lane", LANES)
def test_a_server_that_is_not_there_is_a_broken_link(lane: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = execute(tmp_path, f"url=http://127.0.0.1:{port}/", f"lane={lane}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1 pages, 0 links on them, 1 broken")
    assert "broken   no answer" in done.stdout


@pytest.mark.parametrize(
    "parameter",
    ["url=nonsense", "url=example.org/x", "url=ftp://h/", "url=http://", "url=http://h:port/",
     "url=http://[h/", "most=0", "delay=nan"],
)  # fmt: skip
def test_what_cannot_be_crawled_is_an_error_that_says_so(parameter: str, tmp_path: Path) -> None:
    done = execute(tmp_path, parameter)
    assert done.returncode == 1
    name, _, value = parameter.partition("=")
    says = {
        "url": f"nothing can be crawled at {value!r}",
        "most": "most=0: a crawl gets one page at least",
        "delay": "delay=nan: it is in seconds",
    }
    assert says[name] in done.stderr and done.stdout.startswith("0 pages")


def test_a_crawl_stops_at_so_many_pages(site: Path, tmp_path: Path) -> None:
    done = execute(tmp_path, f"folder={site}", "most=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 pages, ")


def test_a_folder_without_an_index_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = execute(tmp_path, f"folder={tmp_path}")
    assert done.returncode == 1
    assert f"no index.html in {tmp_path}; set -p folder=..." in done.stderr


# -- its parts ------------------------------------------------------------------------


def get(example: Any, client: str, url: str) -> Any:
    """Get a page by one of the clients."""
    if client == "by_urllib":
        return example.fetching.by_urllib(url)
    if client == "by_streams":
        return asyncio.run(example.fetching.by_streams(url))

    generator = example.fetching.client()

    async def get_it() -> Any:
        fetch = next(generator)
        return await fetch(url)

    with asyncio.Runner() as loop:
        try:
            return loop.run(get_it())
        finally:
            next(generator, None)


@pytest.mark.parametrize("client", CLIENTS)
def test_all_clients_give_the_same_answers(example: Any, site: Path, client: str) -> None:
    with example.serving.serving(site, delay=0.01) as url:
        found = get(example, client, f"{url}a.html")
        assert found.url == f"{url}a.html"
        assert (found.status, found.kind) == (200, "text/html")
        assert found.body == PAGES["a.html"].encode()
        assert 0.01 <= found.seconds < SECONDS
        assert found.size == len(found.body)
        missing = get(example, client, f"{url}nothing.html")
        assert missing.status == 404


@pytest.mark.parametrize("client", ["by_urllib", pytest.param("by_aiohttp", marks=needs_aiohttp)])
def test_what_is_not_text_is_not_read(example: Any, site: Path, client: str) -> None:
    (site / "film.mp4").write_bytes(bytes(100_000))
    with example.serving.serving(site, delay=0.0) as url:
        found = get(example, client, f"{url}film.mp4")
    assert (found.kind, found.size, found.body) == ("video/mp4", 100_000, b"")


@pytest.mark.parametrize("client", CLIENTS)
def test_what_does_not_speak_http_is_an_os_error(example: Any, client: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 mail.example ESMTP\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError):
            get(example, client, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join(SECONDS)


def test_links_are_absolute_without_fragments_and_each_once(example: Any) -> None:
    html = b"""<a href="x.html#1"><a href=" x.html#2 "><A HREF='?q=a b'><area href="/y">
    <a href="javascript:void(0)"><a name="z"><a href="http://[bad/"><a href="http://h:port/">
    <link href="style.css"><a href="//other.example/">"""
    assert example.reading.links(html, "http://site.example/d/index.html") == [
        "http://site.example/d/x.html",
        "http://site.example/d/index.html?q=a%20b",
        "http://site.example/y",
        "http://other.example/",
    ]


def test_nonsense_in_a_page_ends_its_links_and_nothing_else(example: Any) -> None:
    html = b'<a href="x.html"><![nonsense[x]]><a href="y.html">'
    assert example.reading.links(html, "http://x.example/") == ["http://x.example/x.html"]


def test_a_base_moves_the_links_after_it(example: Any) -> None:
    html = b'<base href="/deep/"><a href="x.html">'
    assert example.reading.links(html, "http://site.example/") == [
        "http://site.example/deep/x.html"
    ]


def test_made_up_pages_can_all_be_reached(example: Any, tmp_path: Path) -> None:
    example.serving.make_up(tmp_path)
    reached, found = {"index.html"}, ["index.html"]
    while found:
        page = tmp_path / found.pop()
        if page.is_file():
            names = {
                link.rpartition("/")[2]
                for link in example.reading.links(page.read_bytes(), "http://x/")
            }
            found += names - reached
            reached |= names
    assert {path.name for path in tmp_path.iterdir()} < reached
    assert len([name for name in reached if name.startswith("gone")]) == 6
