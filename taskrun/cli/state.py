"""``taskrun state``: look at the shared state of a live run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from taskrun.addresses import may_be_address
from taskrun.cli.options import A_FILE, CONTEXT, check_certificates, dialling_options
from taskrun.errors import UsageError
from taskrun.model import nearest
from taskrun.reporting.text import columns, one_line, padded, plural

if TYPE_CHECKING:
    from taskrun.state.connecting import Connected

ACTIONS = ("list", "get", "dump", "watch")


@click.command("state", context_settings=CONTEXT)
@click.argument("words", nargs=-1, metavar="[ADDRESS] [list | get | dump | watch] [NAME] [KEY]")
@click.option("--run", metavar="RUN", help="Of a server's runs, that one.")
@click.option("--json", "json", is_flag=True, help="Write JSON.")
@click.option(
    "--authkey-file", type=A_FILE, metavar="F",
    help="Where the key is, if not where taskrun looks for it.",
)  # fmt: skip
@dialling_options
@click.pass_context
def state(
    context: click.Context,
    /,
    words: tuple[str, ...],
    run: str | None,
    json: bool,
    authkey_file: str | None,
    **given: Any,
) -> None:
    """Look at the shared state of the live run, or of the server, at ADDRESS
    (HOST:PORT or unix:PATH), or of your only one: list what there is, get NAME or one KEY of
    it, dump all of it, or watch NAME, or all, change."""
    address, action, rest = split(words)
    check_certificates(context, address)
    from taskrun.authkey import authkey
    from taskrun.state.connecting import connect

    with connect(address, authkey(authkey_file), run=run, **given) as connected:
        _DO[action](connected, rest, json)


def split(words: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """ADDRESS, what to do, and what with."""
    address = None
    rest = list(words)
    if rest and rest[0] not in ACTIONS and may_be_address(rest[0]):
        address = rest.pop(0)
    action = rest.pop(0) if rest else "list"
    if action not in ACTIONS:
        near = nearest(action, ACTIONS)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(ACTIONS)}"
        raise UsageError(f"state has no action {action!r}; {hint}")
    least, most = {"list": (0, 0), "get": (1, 2), "dump": (0, 0), "watch": (0, 1)}[action]
    if not least <= len(rest) <= most:
        raise UsageError(
            f"state {action} takes {_TAKES[action]}, not {' '.join(rest) or 'nothing'}"
        )
    return address, action, rest


_TAKES = {"list": "nothing more", "get": "NAME [KEY]", "dump": "nothing more", "watch": "[NAME]"}


def _list(connected: Connected, rest: list[str], json: bool) -> None:
    names = connected.names()
    if json:
        _write([dict(zip(("name", "kind", "length"), one, strict=True)) for one in names])
        return
    wide = max((columns(one_line(name)) for name, _, _ in names), default=0)
    for name, kind, length in names:
        click.echo(f"{padded(one_line(name), wide)}  {kind:9}  {_size(kind, length)}".rstrip())


def _size(kind: str, length: int) -> str:
    if kind in ("dict", "list", "set", "queue"):
        return plural(length, "item")
    return f"{length} waiting" if kind in ("lock", "event", "barrier") and length else ""


def _get(connected: Connected, rest: list[str], json: bool) -> None:
    value = _value(connected, rest[0])
    if len(rest) == 2:
        value = _at(value, rest[0], rest[1])
    if json:
        _write(value)
    elif isinstance(value, str):
        click.echo(value)
    else:
        import pprint

        click.echo(pprint.pformat(value, width=80, sort_dicts=False))


def _value(connected: Connected, name: str) -> Any:
    try:
        return connected.value(name)
    except KeyError:
        names = [one for one, _, _ in connected.names()]
        near = nearest(name, names)
        listed = ", ".join(map(one_line, names)) or "none"
        hint = f"did you mean {near!r}?" if near else f"there are {listed}"
        raise UsageError(f"nothing is named {name!r} in this state; {hint}") from None


def _at(value: Any, name: str, text: str) -> Any:
    """The item that ``text`` means: as it is written, or as Python reads it."""
    for key in (text, _literal(text)):
        try:
            if isinstance(value, set):
                return key in value or _literal(text) in value
            return value[key]
        except (LookupError, TypeError):
            continue
    raise UsageError(f"{one_line(name)} has no item {one_line(text)}")


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # all that literal_eval() raises for what it cannot read


def _dump(connected: Connected, rest: list[str], json: bool) -> None:
    everything = {name: _value(connected, name) for name, _, _ in connected.names()}
    if json:
        _write(everything)
    else:
        for name, value in everything.items():
            click.echo(f"{one_line(name)} = {value!r}")


def _watch(connected: Connected, rest: list[str], json: bool) -> None:
    kinds = {name: kind for name, kind, _ in connected.names()}
    if rest and rest[0] not in kinds:
        _value(connected, rest[0])
    for change in connected.watch():
        if rest and change.name not in (rest[0], ""):
            continue
        if json:
            _write(change._asdict())
        else:
            key = "" if change.key is None else f"[{change.key!r}]"
            value = "" if change.value is None else f" {change.value!r}"
            click.echo(f"{one_line(change.name)}{key} {change.action}{value}")


# -- JSON -----------------------------------------------------------------------------


def _write(value: Any) -> None:
    import json

    click.echo(json.dumps(_plain(value), default=repr, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """``value`` as JSON can have it: what it has no form for becomes its ``repr``."""
    if isinstance(value, dict):
        names = _names(value)
        return {names[key]: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(one) for one in value), key=repr)
    if isinstance(value, float) and not isfinite(value):
        return repr(value)  # not in JSON, though Python's module would write it
    return value


def _names(keys: Iterable[Any]) -> dict[Any, str]:
    """A name for each key, as JSON needs it: none is another's, so that no item is lost."""
    named = {key: key for key in keys if isinstance(key, str)}
    taken = set(named)
    for key in keys:
        if not isinstance(key, str):
            name = repr(key)
            while name in taken:
                name = f"{name} ({type(key).__name__})"
            named[key] = name
            taken.add(name)
    return named


_DO: dict[str, Callable[[Any, list[str], bool], None]] = {
    "list": _list,
    "get": _get,
    "dump": _dump,
    "watch": _watch,
}
