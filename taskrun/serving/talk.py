"""What a server and its clients say to each other about runs.

A frame begins with its kind.  Requests and answers are JSON objects; what a run writes comes
as it is.  A client asks once, ``{"do": "submit", ...}`` followed by the bundle, or
``{"do": "attach", "run": "r1"}``.  It is answered ``{"run": "r1"}`` or ``{"error": "..."}``; then
come the run's output, ``{"skipped": lines}`` where some of it is not kept any more, and at
the end ``{"ended": status}``.  Meanwhile the client may say ``{"do": "interrupt"}``.

A Pool asks ``{"do": "lend", ...}``.  It is told its name and its lease, ``{"shares": ...}``
whenever its slots are others, ``{"dealt": ...}`` when it has its first share, ``{"come": true}``
for each node that waits for it, and ``{"over": "..."}`` when it gets nothing more.  At its end it
says ``{"do": "close"}``.
"""

from __future__ import annotations

import json
from typing import Any, Final

SUBMIT: Final = b"submit"
"""The role of such a client; see ``taskrun.transport``."""


JSON: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
BUNDLE: Final = 3


def line_of(pool: str) -> bytes:
    """The role of a Pool's connections for the nodes that have come for it."""
    return b"pool@" + pool.encode()


def said(**what: Any) -> bytes:
    """A frame that says so."""
    return bytes([JSON]) + json.dumps(what).encode()


def heard(frame: memoryview | bytes) -> dict[str, Any]:
    """What such a frame says.  Raises ValueError where it is none."""
    if not frame or frame[0] != JSON:
        raise ValueError("that is not said in JSON")
    found = json.loads(bytes(frame[1:]))
    if not isinstance(found, dict):
        raise ValueError("that is no JSON object")
    return found
