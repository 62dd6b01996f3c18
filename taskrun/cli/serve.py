"""``taskrun serve`` and ``attach``: a coordinator that stays, and following one of its runs."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import click

from taskrun.cli.options import (
    A_FILE,
    CONTEXT,
    Seconds,
    check_certificates,
    check_jobs,
    check_needed,
    check_resources,
    dialling_options,
    tls_options,
)
from taskrun.settings import memory_here


@click.command(context_settings=CONTEXT)
@click.option("--listen", metavar="ADDRESS", help="Where others come: HOST:PORT.")
@click.option(
    "-j", "--jobs", type=int, metavar="N", callback=check_jobs,
    help="How many workers this machine has for all runs. [default: the cores]",
)  # fmt: skip
@click.option(
    "--resource", "resources", multiple=True, metavar="NAME=AMOUNT", envvar="TASKRUN_RESOURCE",
    callback=check_resources, help="What this machine has for all runs: gpu=2.",
)  # fmt: skip
@click.option(
    "--state", type=click.Path(dir_okay=False), metavar="F",
    help="Load the state that all runs reach from file F, and keep it there.",
)  # fmt: skip
@click.option(
    "--lease", type=Seconds(min=0.5), default=15.0, metavar="SECONDS", hidden=True,
    help="How long a node may be silent. [default: 15]",
)  # fmt: skip
@click.option("--authkey-file", type=A_FILE, metavar="F", help="Where the key of clients is.")
@tls_options
@click.option("--insecure-plain", is_flag=True, help="--listen without TLS, read by anyone.")
@click.pass_context
def serve(
    context: click.Context,
    /,
    listen: str | None,
    jobs: int,
    resources: dict[str, float],
    state: str | None,
    lease: float,
    authkey_file: str | None,
    insecure_plain: bool,
    **tls: str | None,
) -> int:
    """Take runs from taskrun exec --address, each in a process of its own, and
    share this machine's workers and resources and those of all nodes among
    them, until Ctrl-C or SIGTERM."""
    check_needed(context)
    from taskrun.reactor import Reactor
    from taskrun.serving.server import Server, tell
    from taskrun.state.service import Service

    make_service = partial(
        Service,
        key_file=authkey_file,
        listen=listen,
        certificates=(tls["tls_cert"], tls["tls_key"], tls["tls_ca"]),
        insecure_plain=insecure_plain,
        file=state,
    )
    resources = {"memory": memory_here(), **resources}
    return Server(Reactor(), jobs, resources, make_service, tell, lease).run()


@click.command(context_settings=CONTEXT)
@click.argument("run")
@click.argument("address", required=False, metavar="[ADDRESS]")
@click.option("--authkey-file", type=A_FILE, metavar="F", help="Where the key is.")
@dialling_options
@click.pass_context
def attach(context: click.Context, /, run: str, address: str | None, **given: Any) -> int:
    """Follow RUN of the server at ADDRESS, from the beginning of what is kept of
    its output to its end. Ctrl-C asks whether to cancel it."""
    from taskrun.addresses import find, shown
    from taskrun.cli.submit import follow
    from taskrun.serving import talk

    check_certificates(context, address)
    found = address or os.environ.get("TASKRUN_ADDRESS") or shown(find())
    return follow(found, [talk.said(do="attach", run=run)], given)
