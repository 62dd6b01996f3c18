"""Calls of a task with ``lane="green"`` are greenlets of one process, thousands at a time,
that gevent switches whenever one waits. gevent patches that worker before anything is
imported, so plain ``time.sleep``, sockets and urllib switch by themselves. Use it for
blocking code that waits in very many places at once, without rewriting it with ``await``.
"""

import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.request import urlopen

from taskrun import each, per_worker, result, task


class Slow(BaseHTTPRequestHandler):
    """Answers after a tenth of a second."""

    def do_GET(self) -> None:
        time.sleep(0.1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that may wait to be accepted


def slow_server() -> Iterator[str]:
    """A server with a thread per connection; where gevent has patched, those are greenlets."""
    with Server(("127.0.0.1", 0), Slow) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@task(lane="green", timeout=30)
def fetch(
    n: int = each(range(100)), url: str = per_worker(slow_server)
) -> tuple[int, float, float]:
    """Plain blocking code, executed a hundred times at once."""
    began = time.monotonic()
    with urlopen(f"{url}/{n}") as answer:
        assert answer.read() == b"/%d" % n
    return os.getpid(), began, time.monotonic()


@task
def report(fetched: list[tuple[int, float, float]] = result(fetch)) -> None:
    """Compare how long the calls took with how long it took."""
    pids, began, ended = zip(*fetched, strict=True)
    took = max(ended) - min(began)
    print(
        f"{len(fetched)} calls in {len(set(pids))} process waited {sum(ended) - sum(began):.1f} s"
    )
    print(f"all together took {took:.1f} s")
