"""How much memory workers may use, and how much they do."""

from __future__ import annotations

import os
import sys
from typing import Any, Final, NamedTuple

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LINUX: Final = sys.platform == "linux"


class Limits(NamedTuple):
    """Bytes: above ``soft`` a worker is replaced when its call has ended, above ``hard`` at
    once.  None: any."""

    soft: int | None = None
    hard: int | None = None


def limits(maxrss: Any) -> Limits:
    """What ``Pool(maxrss=)`` says: a size, or a pair of them.  Raises ValueError."""
    soft, hard = maxrss if isinstance(maxrss, tuple) else (maxrss, None)
    if hard is not None and not _LINUX:
        raise ValueError("maxrss: a hard limit needs /proc, which only Linux has")
    return Limits(_size(soft), _size(hard))


def _size(value: Any) -> int | None:
    if value is None:
        return None
    from taskrun.parameters import amount  # imports much

    try:
        return int(amount("memory", value))
    except ValueError as error:
        raise ValueError(f"maxrss: {error}") from None


def used(pid: int | None = None) -> int:
    """Bytes of memory in which a process is (None: this one), without what it shares with
    others through files; 0 where it has ended."""
    if not _LINUX:
        import resource  # tells the most that it ever was, which serves as well

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb") as file:
            _, resident, shared = file.read().split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def shown(size: int) -> str:
    """``812 MB``."""
    return f"{size / 1e6:,.0f} MB"
