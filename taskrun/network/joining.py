"""How a node joins: what both sides say first, in JSON, which every version understands.

    node:         hello     its versions, what it offers, which session it was in
    coordinator:  welcome   the session, how much of it was received, the lease
                  or refused, with the reason
    server:       hosting   the node is one for several runs; see ``taskrun.workers.host``

A node that comes back within its lease says how much it has received, and both go on from
there.  A node that meets another session than its own ends what it did for that.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeAlias

from taskrun.errors import WireError
from taskrun.network.channels import VERSION, Offer, offer_from
from taskrun.network.conversation import JOIN


class Hello(NamedTuple):
    """What a node says first.  ``received``: frames of ``session``."""

    offer: Offer
    session: str
    received: int


class Welcome(NamedTuple):
    """What it is answered.  ``resumed``: the node's session goes on, and so many of its
    frames were received; else it is a new one.  ``lease``: seconds."""

    session: str
    resumed: bool
    received: int
    lease: float
    name: str


class Refused(NamedTuple):
    """... or this.  ``later``: it may try again."""

    reason: str
    later: bool


class Hosting(NamedTuple):
    """... or this, where a server is.  ``session``: it comes back with that."""

    name: str
    session: str
    hosts: bool


Answer: TypeAlias = Welcome | Refused | Hosting


def hello_frame(hello: Hello) -> bytes:
    """A hello, to be sent."""
    return _frame(
        {
            **versions(),
            **hello.offer._asdict(),
            "session": hello.session,
            "received": hello.received,
        }
    )


def versions() -> dict[str, Any]:
    """What the two sides of a connection have to agree about."""
    return {
        "wire": VERSION,
        "python": list(sys.version_info[:2]),
        "taskrun": sys.modules["taskrun"].__version__,
    }


def check_versions(said: dict[str, Any]) -> None:
    """Raises ValueError with the reason why who says so cannot take part here."""
    if said.get("wire") != VERSION:
        raise ValueError(
            f"its taskrun {said.get('taskrun')} speaks wire version {said.get('wire')}, and this "
            f"one {VERSION}: install the same taskrun on both"
        )
    python = said.get("python")
    if python != list(sys.version_info[:2]):
        theirs = ".".join(map(str, python)) if isinstance(python, list) else python
        raise ValueError(
            f"it has Python {theirs}, and the coordinator Python "
            f"{sys.version_info[0]}.{sys.version_info[1]}: functions and values cannot travel "
            "between them"
        )


def read_hello(frame: memoryview) -> Hello:
    """Raises ValueError with the reason why this node cannot take part."""
    said = _said(frame)
    check_versions(said)
    received = said.get("received", 0)
    if not isinstance(received, int):
        raise ValueError("it does not say how much it has received")
    return Hello(offer_from(said), str(said.get("session", "")), received)


def answer_frame(answer: Answer) -> bytes:
    """An answer, to be sent."""
    return _frame(answer._asdict())


def read_answer(frame: memoryview) -> Answer:
    """Raises WireError where it is none."""
    try:
        said = _said(frame)
        if "hosts" in said:
            return Hosting(**said)
        return Refused(**said) if "reason" in said else Welcome(**said)
    except (TypeError, ValueError) as error:
        raise WireError(f"the coordinator answers what is no answer: {error}") from None


def _frame(said: dict[str, Any]) -> bytes:
    import json  # at most a few times per connection

    return bytes([JOIN]) + json.dumps(said).encode()


def _said(frame: memoryview) -> dict[str, Any]:
    import json

    if not frame or frame[0] != JOIN:
        raise ValueError("it does not say hello")
    try:
        said = json.loads(bytes(frame[1:]))
    except RecursionError:
        raise ValueError("what it says is nested too deeply") from None
    if not isinstance(said, dict):
        raise ValueError("it says hello in a form that is not known")
    return said
