"""How a run is to go: what the command line and ``taskrun.run`` decide for it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Final

LANE_JOBS: Final = {"thread": 1, "async": 1, "green": 1}
"""How many workers a lane may have unless the person says otherwise."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is to go.

    ``jobs``: slots (``-j``).  ``policy``: ``stop``, ``keep-going`` or ``fail-fast``.
    ``resources``: name -> amount, beside ``cpu`` and ``memory``.  ``output``: ``line``,
    ``group``, ``raw``, ``quiet``.  ``json``: events on stdout.  ``joblog``: a file for a
    row per attempt.  ``start_method``: ``forkserver`` or ``spawn``.  ``inline``: every call
    in this process.  ``grace``: seconds between interrupt, TERM and KILL.  ``listen``: an
    address for others, beside the run's own socket; ``authkey_file``: where their key is;
    ``tls_cert``, ``tls_key``, ``tls_ca``: files in PEM instead of a certificate made for the
    run; ``insecure_plain``: no TLS at that address, wherever it is.
    ``state``: a file in which the shared state is kept.  ``engine``: where calls are executed,
    as ``--engine`` says it; None: by own workers.  ``lane_jobs``: how many workers a lane may
    have, where that is not the usual number.  ``lease``: seconds that a node may be
    silent; ``bundle``: patterns of the data files that nodes need.  ``borrows``: what of the
    resources this run may use is said by a server, which shares them out.
    """

    jobs: int = 1
    policy: str = "stop"
    resources: dict[str, float] = field(default_factory=dict)
    output: str = "line"
    json: bool = False
    joblog: str | None = None
    start_method: str = "forkserver"
    inline: bool = False
    grace: float = 2.0
    listen: str | None = None
    authkey_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    insecure_plain: bool = False
    state: str | None = None
    engine: str | None = None
    lane_jobs: dict[str, int] = field(default_factory=dict)
    lease: float = 15.0
    bundle: tuple[str, ...] = ()
    borrows: bool = False

    @property
    def lanes(self) -> dict[str, int]:
        """How many workers each lane may have that has workers of its own."""
        if self.inline or self.engine is not None:
            return {}
        return {**LANE_JOBS, **self.lane_jobs}


# -- what this machine has -------------------------------------------------------------


def cores_here() -> int:
    """How many cores this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_here() -> float:
    """Bytes of memory that this machine, or this container, has."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
    except OSError:  # no such limit here
        return total
    return min(total, float(limit)) if limit != "max" else total
