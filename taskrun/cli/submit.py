"""``taskrun exec --address``: have a server run the tasks of a file, and follow that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from taskrun.cli.split import split_words
from taskrun.errors import UsageError
from taskrun.loading import check_file, find_file

_OURS = frozenset(
    "words address detach jobs bundle authkey_file tls_cert tls_key tls_ca insecure_plain".split()
)
"""What is for this side, or said in another way."""
_NOT_THERE = frozenset("inline joblog state listen engine resources".split())
"""What makes no sense in a process that somebody else has."""
_INSTEAD = {
    "resources": "the server lends what there is, which is said to taskrun serve --resource and "
    "taskrun worker --resource",
}


def submit(context: click.Context, address: str, words: Sequence[str], detach: bool) -> int:
    """Submit what the command line of ``exec`` says; gives the run's exit status."""
    file, targets = split_words(words)
    said = [*targets, *_options(context)]
    from taskrun.network.bundles import make_bundle, naming
    from taskrun.serving.client import submission

    given = context.params
    file = check_file(find_file() if file is None else file)
    bundle = make_bundle(file, given["bundle"])
    # Nodes of the server get their files from the copy there.
    said += _said("--bundle", tuple(naming(file, given["bundle"])))
    jobs = given["jobs"] if _is_said(context, "jobs") else None
    return follow(address, submission(bundle, said, jobs), given, detach=detach)


def follow(
    address: str, frames: list[bytes], given: Mapping[str, Any], *, detach: bool = False
) -> int:
    """Say ``frames`` to the server at ``address``, with the key and the certificates that are
    given; gives the exit status of the run."""
    from taskrun.authkey import authkey
    from taskrun.serving import client
    from taskrun.transport.tls import Certificates

    files = tuple(given.get(name) for name in ("tls_cert", "tls_key", "tls_ca"))
    return client.follow(
        address,
        authkey(given["authkey_file"]),
        frames,
        tls=Certificates(*files) if any(files) else None,
        insecure_plain=bool(given.get("insecure_plain")),
        detach=detach,
    )


def _options(context: click.Context) -> Iterator[str]:
    """The options that are said here, as they are said there."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _OURS or not _is_said(context, name):
            continue
        option = max(parameter.opts, key=len)
        if name in _NOT_THERE:
            if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
                continue  # the environment says it for the runs of this process
            hint = _INSTEAD.get(name, "leave it out")
            raise UsageError(f"{option} is not for a run of a server (--address): {hint}")
        yield from _said(option, context.params[name])


def _is_said(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _said(option: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = tuple(f"{name}={much}" for name, much in value.items())
    if isinstance(value, bool):
        if value:
            yield option
    elif isinstance(value, tuple):
        for one in value:
            yield f"{option}={one}"
    else:
        yield f"{option}={value}"
