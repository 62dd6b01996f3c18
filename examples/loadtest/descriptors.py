"""How many sockets a process may have open: a descriptor each, and by default often 1,024."""

import resource

SPARE = 100  # for files, pipes and what Python itself has open


class TooFewDescriptors(RuntimeError):
    """The system does not let this process open so many sockets; the message says what to do."""


def allow(sockets: int) -> None:
    """Raise this process's own limit so that it can hold ``sockets``; raises TooFewDescriptors.

    A process may raise its soft limit up to the hard one; only root may raise that.
    """
    needed = sockets + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    high = hard if hard == resource.RLIM_INFINITY else max(hard, needed)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, high))
    except (ValueError, OSError):
        raise TooFewDescriptors(
            f"{sockets:,} sockets need {needed:,} descriptors, and a process may have {hard:,} "
            f"here: raise the limit (ulimit -Hn {needed} as root, or nofile in "
            f"/etc/security/limits.conf), or take -p sockets={max(0, hard - SPARE)}"
        ) from None
