"""``taskrun key``: make the key file."""

from __future__ import annotations

import click

from taskrun.cli.options import A_FILE, CONTEXT


@click.command("key", context_settings=CONTEXT)
@click.option(
    "--authkey-file", type=A_FILE, metavar="F", help="Where it is to be. [default: your own]"
)
def key(authkey_file: str | None) -> None:
    """Make the file with the key that coordinators, workers and clients must
    share, unless there is one, and print its path. Copy it to the other
    machines; whoever has the key can run code on them."""
    from taskrun.authkey import made_file

    click.echo(made_file(authkey_file))
