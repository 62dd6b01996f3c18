"""``taskrun worker``: join this machine's cores to a coordinator."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from taskrun import sessions
from taskrun.cli.options import (
    A_FILE,
    CONTEXT,
    Seconds,
    check_certificates,
    check_jobs,
    check_resources,
    dialling_options,
)
from taskrun.errors import UsageError
from taskrun.model import LANES
from taskrun.telling import tell

if TYPE_CHECKING:
    from taskrun.network.channels import Offer
    from taskrun.reactor import Reactor
    from taskrun.transport.tls import Certificates


@click.command(context_settings=CONTEXT)
@click.argument("address", required=False, metavar="[ADDRESS]")
@click.option(
    "-j",
    "--jobs",
    type=int,
    metavar="N",
    callback=partial(check_jobs, instead="say -j 1 or more"),
    help="How many workers. [default: the cores]",
)
@click.option(
    "--lane",
    type=click.Choice(LANES),
    metavar="LANE",
    help="Their lane, and no other: async, say. [default: what is wanted]",
)
@click.option(
    "--resource",
    "resources",
    multiple=True,
    metavar="NAME=AMOUNT",
    envvar="TASKRUN_RESOURCE",
    callback=check_resources,
    help="What this machine has: gpu=1.",
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word that status shows.")
@click.option("--name", metavar="NAME", help="What it is called. [default: the host's name]")
@click.option("--authkey-file", type=A_FILE, metavar="F", help="Where the coordinator's key is.")
@click.option(
    "--idle-exit", type=Seconds(min=0), metavar="SECONDS",
    help="Leave after so long without anything to do.",
)  # fmt: skip
@dialling_options
@click.pass_context
def worker(
    context: click.Context,
    /,
    address: str | None,
    jobs: int,
    lane: str | None,
    resources: dict[str, float],
    tags: tuple[str, ...],
    name: str | None,
    authkey_file: str | None,
    idle_exit: float | None,
    insecure_plain: bool,
    **tls: str | None,
) -> int:
    """Join N workers of this machine to the coordinator at ADDRESS (HOST:PORT), now and
    whenever there is one, until this is ended. Ctrl-C or SIGTERM lets the calls that run
    end; the second one does not."""
    given = address or os.environ.get("TASKRUN_ADDRESS")
    if not given:
        raise UsageError("say the ADDRESS of the coordinator, HOST:PORT")
    check_certificates(context, given)
    import socket

    from taskrun import addresses
    from taskrun.authkey import authkey
    from taskrun.lanes import lanes_here
    from taskrun.network.channels import Offer
    from taskrun.settings import memory_here
    from taskrun.transport.tls import Certificates

    parsed = addresses.parse(given, insecure_plain=insecure_plain)
    key = authkey(authkey_file)
    files = Certificates(tls["tls_cert"], tls["tls_key"], tls["tls_ca"])
    resources = {"memory": memory_here(), **resources}
    lanes = lanes_here(lane)
    offer = Offer(name or socket.gethostname(), jobs, resources, tags, lanes)
    server = Coordinator(given, parsed, key, files, insecure_plain)
    return _serve(server, offer, idle_exit)


class Coordinator(NamedTuple):
    """Where a node goes: the address as it was given and as it was read, and what is proved
    there."""

    shown: str
    address: Any
    key: bytes
    files: Certificates
    insecure_plain: bool

    def dialler(self, reactor: Reactor, role: bytes) -> Callable[..., object]:
        """What connects by that role, and then calls ``on_peer`` or ``on_failure``."""
        from taskrun import transport
        from taskrun.workers.node import DIAL_SECONDS

        return lambda on_peer, on_failure: transport.dial(
            self.address, self.key, reactor, role, on_peer, on_failure, timeout=DIAL_SECONDS,
            tls=self.files, insecure_plain=self.insecure_plain,
        )  # fmt: skip


def _serve(server: Coordinator, offer: Offer, idle_exit: float | None) -> int:
    """Be a node of whatever is there: a run, and the next one, or a server of runs."""
    from taskrun.reactor import Reactor
    from taskrun.workers.host import Host
    from taskrun.workers.node import ROLE, Node

    sessions.adopt_orphans()
    while True:
        reactor = Reactor()
        dial = server.dialler(reactor, ROLE)
        node = Node(reactor, offer, dial, address=server.shown, say=tell, idle_exit=idle_exit)
        status = node.run()
        if node.server is None:
            return status
        part = partial(take_part, server)
        host = Host(reactor, *node.server, offer, dial, part, tell, idle_exit)
        ended = host.run()
        reactor.close()
        if ended is not None:
            return ended


def take_part(server: Coordinator, run: str, offer: Offer) -> int:
    """Be the node of one run of a server."""
    from taskrun.reactor import Reactor
    from taskrun.workers.node import ROLE, Node

    sessions.adopt_orphans()
    reactor = Reactor()
    dial = server.dialler(reactor, ROLE + b"@" + run.encode())
    shown = f"{server.shown} for {run}"
    return Node(reactor, offer, dial, address=shown, say=tell, once=True).run()
