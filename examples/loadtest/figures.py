"""How long requests took, in a histogram that can be added to that of another process.

Percentiles cannot be averaged: of two processes' 99th percentiles nobody can tell the one of
both.  Lists of all times could be joined, and would grow with every request.  An HDR histogram
stays at a few KB, is right to one part in a thousand from a microsecond to a minute, and is
added to others without any loss.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

try:
    from hdrh.histogram import HdrHistogram
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "the load test needs hdrhistogram: pip install 'taskrun[examples]'"
    ) from None

MICROSECOND = 1e-6
MINUTE = 60_000_000  # µs


class Latencies:
    """A histogram of seconds, which can be pickled."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, MINUTE, 3)

    def record(self, seconds: float) -> None:
        """Add one; more than a minute counts as a minute."""
        self._histogram.record_value(min(MINUTE, max(1, round(seconds / MICROSECOND))))

    def add(self, other: Latencies) -> None:
        """Add all of another histogram."""
        self._histogram.add(other._histogram)

    def at(self, percentile: float) -> float:
        """So many seconds or less took ``percentile`` % of them; 100 gives the longest."""
        return self._histogram.get_value_at_percentile(percentile) * MICROSECOND

    def __getstate__(self) -> bytes:
        return self._histogram.encode()

    def __setstate__(self, state: bytes) -> None:
        self._histogram = HdrHistogram.decode(state)


@dataclass
class Load:
    """What one process has found out, or all of them together."""

    requests: int = 0
    seconds: float = 0.0
    latencies: Latencies = field(default_factory=Latencies)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Load) -> None:
        """Add what another process has found out in the same time."""
        self.requests += other.requests
        self.seconds = max(self.seconds, other.seconds)
        self.latencies.add(other.latencies)
        self.errors += other.errors

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0


@dataclass
class Held:
    """Of so many sockets that were to be open at once: those with the right answer, and why not."""

    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Held) -> None:
        """Add another process's sockets."""
        self.right += other.right
        self.errors += other.errors
