"""How the status of a run, or of a server, looks to people."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from taskrun.calls import both_names
from taskrun.reporting import text

SHOWN = 20  # running calls that people are shown
LOCAL = "local"


def lines(now: dict[str, Any]) -> Iterator[str]:
    """The lines of a status."""
    if now.get("server"):
        yield from _server(now)
    else:
        yield from _run(now)


def fitted(shown: Sequence[str], width: int, height: int) -> list[str]:
    """So much of these lines as a screen of that size shows, all of which can be overwritten."""
    most = max(1, height - 1)  # the cursor stands below them
    if len(shown) > most:
        rest = len(shown) - most + 1
        shown = [*shown[: most - 1], f"and {text.plural(rest, 'more line')}"]
    return [line if text.columns(line) <= width else _cut(line, width) for line in shown]


def _cut(line: str, width: int) -> str:
    while text.columns(line) > width:
        line = line[:-1]
    return line


# -- a run ----------------------------------------------------------------------------


def _run(now: dict[str, Any]) -> Iterator[str]:
    what = now["file"] or "a run"
    state = now["stopping"] or ("paused" if now["paused"] else "")
    yield f"{what}, pid {now['pid']}, {text.duration(now['seconds'])}" + (state and f", {state}")
    left = f", about {text.duration(now['eta'])} left" if now["eta"] else ""
    rate = f", {now['rate']:,.4g} calls/s" if now["rate"] else ""
    yield f"{now['done']:,} of {now['total']:,} calls ended{rate}{left}"
    columns = ("done", "running", "ready", "failed", "total")
    rows: list[tuple[str, ...]] = [("task", *columns)]
    rows += [(task["task"], *(f"{task[column]:,}" for column in columns)) for task in now["tasks"]]
    yield from _table(rows)
    if now["nodes"]:
        yield ""
        yield from _table([("node", "state", *_COUNTS), *map(_counted, _nodes_of(now))])
    yield from _running(now["running"], with_run=False)


def _nodes_of(now: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """This machine and the nodes of a run, each with its workers."""
    here = {"node": "", "slots": now["slots_here"], "state": "here"}
    for node in (here, *now["nodes"]):
        workers = [worker for worker in now["workers"] if worker["node"] == node["node"]]
        yield {**node, "node": node["node"] or LOCAL, "workers": workers}


# -- a server -------------------------------------------------------------------------


def _server(now: dict[str, Any]) -> Iterator[str]:
    slots = text.plural(now["slots"], "slot")
    yield f"a server, pid {now['pid']}, {text.duration(now['seconds'])}, {slots}"
    columns = ("run", "state", "slots", "queued", "ended", "rate", "left", "since", "what")
    yield from _table([columns, *map(_of_server, now["runs"])])
    yield ""
    machines = [(*_counted(node), _takes(node)) for node in now["nodes"]]
    yield from _table([("node", "state", *_COUNTS, "runs"), *machines])
    yield from _running(now["running"], with_run=True)


def _of_server(run: dict[str, Any]) -> tuple[str, ...]:
    """A row about a run."""
    now = run["now"]
    since = text.duration(max(0.0, time.time() - run["submitted"]))
    what = " ".join([run["file"], *run["words"]])
    if now is None:
        return (run["run"], _state(run), f"{run['slots']:,}", "", "", "", "", since, what)
    queued = sum(task["ready"] for task in now["tasks"])
    return (
        run["run"], _state(run), f"{run['slots']:,}", f"{queued:,}",
        f"{now['done']:,} of {now['total']:,}",
        f"{now['rate']:,.4g}/s" if now["rate"] else "",
        text.duration(now["eta"]) if now["eta"] else "",
        since, what,
    )  # fmt: skip


def _state(run: dict[str, Any]) -> str:
    now = run["now"]
    if run["status"] is not None:
        return f"{run['state']} {run['status']}"
    if run["state"] != "running" or run.get("lent"):
        return str(run["state"])
    if now is None:
        return "starting" if run["wants"] is None else "running, does not answer"
    return "stopping" if now["stopping"] else "paused" if now["paused"] else "running"


def _takes(node: dict[str, Any]) -> str:
    return ", ".join(f"{run} {slots:,}" for run, slots in node["runs"].items())


# -- what both have -------------------------------------------------------------------

_COUNTS = ("slots", "workers", "busy")


def _counted(node: dict[str, Any]) -> tuple[str, ...]:
    """A row about a machine: its name, whether it is there, and its numbers."""
    busy = sum(1 for worker in node["workers"] if worker["calls"])
    numbers = (node["slots"], len(node["workers"]), busy)
    marks = [*(f"lane {lane}" for lane in node.get("lanes", ())), *node.get("tags", ())]
    tags = f" ({', '.join(marks)})" if marks else ""
    return (node["node"] + tags, node["state"], *(f"{number:,}" for number in numbers))


def _running(running: Sequence[dict[str, Any]], *, with_run: bool) -> Iterator[str]:
    if not running:
        return
    yield ""
    yield from _table(
        [
            ("running", *(("run",) if with_run else ()), "worker", "since", "attempt"),
            *(_call(call, with_run) for call in running[:SHOWN]),
        ]
    )
    if len(running) > SHOWN:
        yield f"and {len(running) - SHOWN:,} more"


def _call(call: dict[str, Any], with_run: bool) -> tuple[str, ...]:
    since = text.duration(max(0.0, time.time() - call["since"])) if call["since"] else ""
    if call["waits"]:
        since = f"{since} (waits)".strip()
    run = (call["run"],) if with_run else ()
    name = both_names(call["call"], call["label"])
    return (name, *run, call["worker"], since, str(call["attempt"]))


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns of numbers are flush right, others flush left."""
    columns = [tuple(map(text.one_line, column)) for column in zip(*rows, strict=True)]
    widths = [max(map(text.columns, column)) for column in columns]
    right = [_is_of_numbers(column[1:]) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [
            cell.rjust(width) if flush else text.padded(cell, width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        yield "  " + "  ".join(cells).rstrip()


def _is_of_numbers(cells: Iterable[str]) -> bool:
    return all(not cell or cell[0].isdigit() for cell in cells)
