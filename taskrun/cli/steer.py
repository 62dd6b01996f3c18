"""``taskrun status, explain, stack, cancel, tell, pause, unpause, drain``: look at a live run and
steer it."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from taskrun.addresses import may_be_address
from taskrun.cli.options import A_FILE, CONTEXT, check_certificates, dialling_options
from taskrun.errors import RunError, UsageError

if TYPE_CHECKING:
    from taskrun.transport import Wire

ANSWER_SECONDS = 10.0
WATCH_SECONDS = 1.0

Command = TypeVar("Command", bound=Callable[..., Any])


def _steering(name: str, *more: Any) -> Callable[[Command], click.Command]:
    """A command that asks a live run; ``more``: its own arguments and options."""

    def made(function: Command) -> click.Command:
        options: list[Any] = [
            *more,
            click.option("--json", "json", is_flag=True, help="Write JSON."),
            click.option("--authkey-file", type=A_FILE, metavar="F", help="Where the key is."),
            dialling_options,
        ]
        for option in reversed(options):
            function = option(function)
        return click.command(name, context_settings=CONTEXT)(function)

    return made


def _words(metavar: str) -> Any:
    return click.argument("words", nargs=-1, metavar=metavar)


# -- asking ---------------------------------------------------------------------------


class Asked:
    """A connection to a live run.  ``gone``: it has ended, or is about to."""

    def __init__(self, wire: Wire, run: str | None) -> None:
        self.gone = False
        self._wire = wire
        self._run = {} if run is None else {"run": run}

    def __call__(self, do: str, **more: Any) -> Any:
        """Ask, and give the answer.  Raises UsageError with what the run says, RunError where
        it says nothing."""
        try:
            self._wire.send(json_module.dumps({"do": do, **self._run, **more}).encode())
            answer = json_module.loads(bytes(self._wire.recv(ANSWER_SECONDS)))
        except TimeoutError:
            raise RunError(
                f"the run at {self._wire.name} has not answered in {ANSWER_SECONDS:g} s: it may be "
                "stopped, or very busy"
            ) from None
        except (OSError, EOFError) as error:
            self.gone = True
            raise RunError(f"the run at {self._wire.name} does not answer: {error}") from None
        if "error" in answer:
            self.gone = bool(answer.get("gone"))
            raise UsageError(answer["error"])
        return answer["ok"]


@contextmanager
def asking(where: Where, authkey_file: str | None, given: dict[str, Any]) -> Iterator[Asked]:
    """A connection to who is asked; without an address to this user's only run."""
    from taskrun import addresses
    from taskrun.authkey import authkey
    from taskrun.errors import DialError
    from taskrun.roles import STEER
    from taskrun.transport import dial_blocking
    from taskrun.transport.tls import Certificates

    check_certificates(click.get_current_context(), where.address)
    files = (given["tls_cert"], given["tls_key"], given["tls_ca"])
    plain = bool(given["insecure_plain"])
    address = addresses.find(where.address, insecure_plain=plain)
    try:
        wire = dial_blocking(
            address, authkey(authkey_file), STEER, insecure_plain=plain,
            tls=Certificates(*files) if any(files) else None,
        )  # fmt: skip
    except DialError as error:
        raise UsageError(str(error)) from None
    with wire:
        yield Asked(wire, where.run)


class Where(NamedTuple):
    """Who is asked: at ``address``; where a server is there, about its ``run``."""

    address: str | None
    run: str | None


def _where(words: tuple[str, ...], command: str) -> Where:
    if len(words) > 2:
        raise UsageError(f"{command} takes [ADDRESS] [RUN], not {' '.join(words)}")
    if len(words) == 1 and not may_be_address(words[0]):
        return Where(None, words[0])
    return Where(*words, *[None] * (2 - len(words)))


def _where_and_what(words: tuple[str, ...], command: str, what: str) -> tuple[Where, str]:
    if not 1 <= len(words) <= 3:
        said = " ".join(words) or "nothing"
        raise UsageError(f"{command} takes [ADDRESS] [RUN] and a {what}, not {said}")
    return _where(words[:-1], command), words[-1]


_CALL = "CALL such as 'fetch[3]'"


def _tell(answer: dict[str, Any], json: bool) -> None:
    click.echo(json_module.dumps(answer) if json else answer["text"].rstrip("\n"))


# -- the commands ---------------------------------------------------------------------


@_steering(
    "status",
    _words("[ADDRESS] [RUN]"),
    click.option("--watch", is_flag=True, help="Show it anew every second, until the run ends."),
)
def status(
    words: tuple[str, ...], watch: bool, json: bool, authkey_file: str | None, **given: Any
) -> None:
    """Show what the live run at ADDRESS, or your only one, is doing: how far
    each task is, what runs where and since when. Of several runs of yours it
    shows the addresses."""
    several = [] if words or watch else _several()
    if several:
        _show_several(several, json, authkey_file, given)
        return
    with asking(_where(words, "status"), authkey_file, given) as ask:
        now = ask("status")
        if watch:
            _watch(ask, now, json)
        else:
            _show(now, json)


@_steering("explain", _words("[ADDRESS] [RUN] CALL"))
def explain(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Say why CALL runs, waits, was skipped or is tried again."""
    where, call = _where_and_what(words, "explain", _CALL)
    with asking(where, authkey_file, given) as ask:
        _tell(ask("explain", call=call), json)


@_steering("stack", _words("[ADDRESS] [RUN] CALL"))
def stack(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Show where in its code the running CALL is, without stopping it."""
    where, call = _where_and_what(words, "stack", _CALL)
    with asking(where, authkey_file, given) as ask:
        _tell(ask("stack", call=call), json)


@_steering("cancel", _words("[ADDRESS] [RUN] CALL|run|RUN"))
def cancel(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Cancel CALL, queued or running, with all that needs it (the run's exit
    status is then 1, unless that is tolerated); or the whole run, as Ctrl-C
    does (130), the second time at once."""
    where, call = _where_and_what(words, "cancel", _CALL)
    with asking(where, authkey_file, given) as ask:
        _tell(ask("cancel", call=call), json)


@_steering("tell", _words("[ADDRESS] [RUN] CALL MESSAGE"))
def tell(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Send MESSAGE, as a str, to CALL, which gets it by
    current().channel.recv()."""
    if not 2 <= len(words) <= 4:
        said = " ".join(words) or "nothing"
        raise UsageError(f"tell takes [ADDRESS] [RUN] CALL MESSAGE, not {said}")
    where, call = _where_and_what(words[:-1], "tell", _CALL)
    with asking(where, authkey_file, given) as ask:
        _tell(ask("tell", call=call, message=words[-1]), json)


@_steering("pause", _words("[ADDRESS] [RUN]"))
def pause(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Start no more calls; what runs goes on."""
    with asking(_where(words, "pause"), authkey_file, given) as ask:
        _tell(ask("pause"), json)


@_steering("unpause", _words("[ADDRESS] [RUN]"))
def unpause(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Start calls again."""
    with asking(_where(words, "unpause"), authkey_file, given) as ask:
        _tell(ask("unpause"), json)


@_steering("drain", _words("[ADDRESS] [RUN] NODE"))
def drain(words: tuple[str, ...], json: bool, authkey_file: str | None, **given: Any) -> None:
    """Have NODE, of a live run or of a server, end the calls that it has,
    take no more, and leave."""
    where, node = _where_and_what(words, "drain", "NODE")
    with asking(where, authkey_file, given) as ask:
        _tell(ask("drain", node=node), json)


# -- several runs -----------------------------------------------------------------------


def _several() -> list[str]:
    """The addresses of this user's runs, where none is meant and there are several."""
    import os

    from taskrun import addresses

    if os.environ.get("TASKRUN_ADDRESS"):
        return []
    paths = addresses.live_runs()
    return [addresses.shown(path) for path in paths] if len(paths) > 1 else []


def _show_several(
    several: list[str], json: bool, authkey_file: str | None, given: dict[str, Any]
) -> None:
    """A line a run; one that ends meanwhile, or has another key, is shown as what it is."""
    from taskrun.cli.looks import lines

    found: list[dict[str, Any]] = []
    for address in several:
        try:
            with asking(Where(address, None), authkey_file, given) as ask:
                found.append({"address": address, **ask("status")})
        except (UsageError, RunError) as error:
            found.append({"address": address, "error": str(error)})
    if json:
        click.echo(json_module.dumps(found))
        return
    click.echo("several runs of yours are alive; taskrun status ADDRESS shows one of them")
    for now in found:
        first = now["error"] if "error" in now else next(lines(now))
        click.echo(f"  {now['address']}  {first}")


# -- watching one -----------------------------------------------------------------------


def _watch(ask: Asked, now: dict[str, Any], json: bool) -> None:
    """Show a status, and those that follow, until there are none any more."""
    before = _show(now, json, 0)
    while True:
        time.sleep(WATCH_SECONDS)
        try:
            now = ask("status")
        except (RunError, UsageError):
            if ask.gone:
                return
            raise
        before = _show(now, json, before)


# -- how a status looks ---------------------------------------------------------------


def _show(now: dict[str, Any], json: bool, before: int | None = None) -> int:
    """Show a status; one that is watched in the place of the last one, which had ``before``
    lines.  Gives how many it has."""
    import os
    import sys

    if json:
        click.echo(json_module.dumps(now))
        return 0
    from taskrun.cli.looks import fitted
    from taskrun.cli.looks import lines as looks

    lines = list(looks(now))
    if before is not None and sys.stdout.isatty():
        lines = fitted(lines, *os.get_terminal_size(sys.stdout.fileno()))
        click.echo(f"\x1b[{before}F\x1b[J" if before else "", nl=False)
    click.echo("\n".join(lines))
    return len(lines)
