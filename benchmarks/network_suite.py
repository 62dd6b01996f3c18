"""The benchmarks of the network and of its transport; see ``suite``.

Their figures come from ``network.py`` and ``transport.py``, each in a process of its own.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

from measure import PYTHON, Benchmark, BenchmarkError, Unavailable, run

HERE = Path(__file__).parent
PEERS = {"dask": "distributed", "ray": "ray"}


def figure(script: str, name: str) -> float:
    """What ``script --figure name`` prints last."""
    sample = run([PYTHON, str(HERE / f"{script}.py"), "--figure", name])
    try:
        return float(sample.out.split()[-1])
    except (IndexError, ValueError):
        raise BenchmarkError(f"{script} printed no figure: {sample.out[-500:]!r}") from None


network = partial(figure, "network")


def peer(name: str) -> float:
    """Calls a second of another library.  Raises Unavailable where it is not installed."""
    if importlib.util.find_spec(PEERS.get(name, "os")) is None:
        raise Unavailable(f"{PEERS[name]} is not installed (pip install 'taskrun[{name}]')")
    return network(name)


def rate(
    name: str, title: str, target: float, *, ours: str = "run", peers: str | None = None
) -> Benchmark:
    what = "of a fan-out" if ours == "run" else "one by one"
    return Benchmark(
        f"network_{name}", f"20,000 trivial calls {what} on a node with two workers, over TLS",
        "calls/s", partial(network, ours), title, partial(peer, peers or name),
        target, at_least=True, rounds=3,
    )  # fmt: skip


BENCHMARKS = (
    rate("pool", "a local Pool(2).apply_async", 5.0, ours="pool", peers="local_pool"),
    rate("run", "a local Pool(2).apply_async", 5.0, peers="local_pool"),
    rate("dask", "Dask distributed, two processes", 50.0),
    rate("ray", "Ray, two CPUs", 20.0),
    Benchmark(
        "network_trip", "round trip of a trivial call over TLS, median", "ms",
        partial(network, "trip"), "1 ms", lambda: 1.0, 1.0, rounds=3,
    ),
    Benchmark(
        "network_once", "100 MB that eight calls of one node take: bytes that cross", "MB",
        partial(network, "crossed"), "once", lambda: 100.0, 1.01, rounds=1,
    ),
    Benchmark(
        "network_beats", "heartbeats of 1,000 nodes", "% of a core",
        partial(network, "beats"), "10 %", lambda: 10.0, 1.0, rounds=1,
    ),
    Benchmark(
        "network_bulk", "bulk over TLS on loopback, the slower direction", "MB/s",
        partial(figure, "transport", "tls"), "200 MB/s", lambda: 200.0, 1.0, at_least=True,
        rounds=3,
    ),
)  # fmt: skip
