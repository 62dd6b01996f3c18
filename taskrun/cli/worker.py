"""``taskrun worker``: join this machine's cores to a coordinator."""

from __future__ import annotations

import os
import sys

import click

from taskrun.cli.options import CONTEXT, check_jobs, check_resources, tls_options
from taskrun.errors import UsageError


@click.command(context_settings=CONTEXT)
@click.argument("address", required=False, metavar="[ADDRESS]")
@click.option(
    "-j",
    "--jobs",
    type=int,
    metavar="N",
    callback=check_jobs,
    help="How many workers. [default: the cores]",
)
@click.option(
    "--lane",
    type=click.Choice(["process"]),
    default="process",
    metavar="LANE",
    help="The lane of its workers: process.",
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
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word for this node.")
@click.option("--name", metavar="NAME", help="What it is called. [default: the host's name]")
@click.option("--authkey-file", metavar="F", help="Where the coordinator's key is.")
@click.option(
    "--idle-exit", type=click.FloatRange(min=0), metavar="SECONDS",
    help="Leave after so long without anything to do.",
)  # fmt: skip
@tls_options
@click.option("--insecure-plain", is_flag=True, help="Without TLS, read by anyone.", hidden=True)
def worker(
    address: str | None,
    jobs: int,
    lane: str,
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
    import socket

    from taskrun import addresses, transport
    from taskrun.authkey import authkey
    from taskrun.network.channels import Offer
    from taskrun.reactor import Reactor
    from taskrun.settings import memory_here
    from taskrun.transport.tls import Certificates
    from taskrun.workers.node import DIAL_SECONDS, ROLE, Node

    parsed = addresses.parse(given, insecure_plain=insecure_plain)
    key, reactor = authkey(authkey_file), Reactor()
    files = Certificates(tls["tls_cert"], tls["tls_key"], tls["tls_ca"])
    resources = {"memory": memory_here(), **resources}
    offer = Offer(name or socket.gethostname(), jobs, resources, tags, lane)
    node = Node(
        reactor,
        offer,
        lambda on_peer, on_failure: transport.dial(
            parsed,
            key,
            reactor,
            ROLE,
            on_peer,
            on_failure,
            timeout=DIAL_SECONDS,
            tls=files,
            insecure_plain=insecure_plain,
        ),
        address=given,
        say=_say,
        idle_exit=idle_exit,
    )
    return node.run()


def _say(text: str) -> None:
    print(f"taskrun: {text}", file=sys.stderr, flush=True)
