"""What workers say, record by record, as events; the same for every kind of worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import inf
from time import time
from typing import Any, Protocol

from taskrun import messages as m
from taskrun.bunch import Bunch
from taskrun.errors import WireError
from taskrun.model import Failure, Recipe
from taskrun.observers import Observer
from taskrun.reactor import Timer
from taskrun.values import encode

_ONLY_TUPLES = frozenset([tuple])
_ENDED_LENGTH = 9  # the kind, and a Report
_KINDS = frozenset(("value", "held", "error", "retry", "skip"))


class Source(Protocol):
    """A worker, as far as its records are concerned."""

    id: int
    lane: str
    slots: int
    name: str
    node: str
    ready: bool
    assigned: dict[int, Any]
    escalations: dict[int, Timer]
    bunch: tuple[int, int, float] | None  # whose items come: call, attempt, wall clock

    def read_output_of(self, call: int, attempt: int) -> None:
        """See to it that all that this attempt wrote has been shown."""


class Records:
    """Turns records into events, in order; what comes in a row becomes one event."""

    def __init__(
        self,
        post: Callable[[m.Event], None],
        observer: Observer,
        recipe_ids: Iterator[int],
        constants: Mapping[str, dict[str, Any]],
    ) -> None:
        self._post = post
        self._observer = observer
        self._recipe_ids = recipe_ids
        self._constants = constants
        self._recipes: dict[Any, Recipe] = {}  # of submitted calls, by reference
        self._handlers: dict[str, Callable[[Any, tuple[Any, ...]], m.Event | None]] = {
            m.READY: self._ready,
            m.BEGAN: self._began,
            m.DEFINE: self._define,
            m.SUBMIT: self._submit,
            m.WAIT: lambda source, record: m.Waiting(source.id, *record[1:]),
            m.RESUME: lambda source, record: m.Resumed(source.id, *record[1:]),
            m.CANCEL: lambda source, record: m.CancelChild(*record[1:]),
            m.PROGRESS: self._progress,
            m.GAVE_BACK: self._gave_back,
            m.YIELDED: lambda source, record: m.Yielded(*record[1:]),
            m.OUTPUT: self._output,
            m.RETIRE: self._retire,
            m.NOTICE: lambda source, record: self._observer.notice(record[1]),
            m.ITEMS: self._items_follow,
            m.ITEM: self._item,
        }

    def take(self, source: Source, records: list[Any]) -> None:
        """Post the events of ``records``.  Raises WireError for what is no record."""
        if _ONLY_TUPLES.issuperset(map(type, records)):
            self._take(source, records)
            return
        kinds = list(map(type, records))
        start, end = 0, len(records)
        while start < end:
            if kinds[start] is tuple:
                stop = next((i for i in range(start, end) if kinds[i] is not tuple), end)
                self._take(source, records[start:stop])
            else:
                try:
                    stop = kinds.index(tuple, start)
                except ValueError:
                    stop = end
                self._take_items(source, records[start:stop])
            start = stop

    def _take_items(self, source: Source, found: list[Any]) -> None:
        """Plain values and the seconds each took, in turn, of the bunch that was named."""
        values, seconds = found[0::2], found[1::2]
        if source.bunch is None or not len(values) == len(seconds) == list(
            map(type, seconds)
        ).count(float):
            raise WireError("a worker sent what is no record")
        call, attempt, wall = source.bunch
        source.bunch = call, attempt, wall + sum(seconds)
        self._post_items(source, m.Items(source.id, call, attempt, values, seconds, wall))

    def _post_items(self, source: Source, event: m.Items) -> None:
        call = source.assigned.get(event.call)
        if call is None:
            return  # stale
        _check_bunch(call, len(event.values))
        self._post(event)
        self._look_whether_over(source, call)

    def _look_whether_over(self, source: Source, call: Any) -> None:
        """A bunch has ended with its last item, or with what was cut off."""
        if type(call.blob) is not Bunch or not call.blob.left:
            source.assigned.pop(call.id, None)
            if source.escalations:
                self._stop_escalating(source, call.id)

    def _take(self, source: Source, records: list[tuple[Any, ...]]) -> None:
        if () in records:
            raise WireError("a worker sent what is no record")
        reports: list[tuple[Any, ...]] = []
        ended, assigned = m.ENDED, source.assigned
        row: m.Submitted | None = None
        for record in records:
            if record[0] == ended and len(record) == _ENDED_LENGTH:
                if row is not None:
                    row = self._post(row)
                if record[8]:
                    self._end_output(source, record)
                assigned.pop(record[1], None)
                if source.escalations:
                    self._stop_escalating(source, record[1])
                reports.append(record[1:])
                continue
            if reports:
                self._finished(source, reports)
                reports = []
            event = self._event(source, record)
            if isinstance(event, m.Submitted):
                row = self._joined(row, event)
            elif event is not None:
                if row is not None:
                    row = self._post(row)
                self._post(event)
        if row is not None:
            self._post(row)
        if reports:
            self._finished(source, reports)

    def _finished(self, source: Source, reports: list[tuple[Any, ...]]) -> None:
        if source.node:
            _check_reports(reports)
        self._post(m.Finished(source.id, reports))

    def _event(self, source: Source, record: tuple[Any, ...]) -> m.Event | None:
        try:
            return self._handlers[record[0]](source, record)
        except Exception as error:
            raise WireError(f"a worker sent a bad record of kind {record[0]!r}") from error

    def _joined(self, row: m.Submitted | None, event: m.Submitted) -> m.Submitted:
        if row is None:
            return event
        if (row.parent, row.attempt) == (event.parent, event.attempt):
            row.calls.extend(event.calls)
            return row
        self._post(row)
        return event

    def _end_output(self, source: Source, record: tuple[Any, ...]) -> None:
        """All that an attempt wrote is shown before its end is known."""
        source.read_output_of(record[1], record[2])
        call = source.assigned.get(record[1])
        if call is not None:
            self._observer.output_ended(call)

    def _stop_escalating(self, source: Source, call: int) -> None:
        timer = source.escalations.pop(call, None)
        if timer is not None:
            timer.cancel()

    def _ready(self, source: Source, record: tuple[Any, ...]) -> m.Event:
        source.ready = True
        self._observer.worker_changed(source.name, f"started, pid {record[1]}")
        return m.WorkerReady(source.id, record[1], source.lane, source.slots, source.node)

    def _began(self, source: Source, record: tuple[Any, ...]) -> m.Event:
        _, call, attempt, wall, label = record
        age = 0.0 if source.node else max(0.0, time() - wall)
        return m.Began(source.id, call, attempt, wall, label, age)

    def _define(self, source: Source, record: tuple[Any, ...]) -> None:
        _, reference, name, facts = record
        if reference not in self._recipes:
            constants = self._constants.get(name, {})
            self._recipes[reference] = Recipe(
                id=next(self._recipe_ids),
                name=name,
                reference=reference,
                constants={key: encode(value)[0] for key, value in constants.items()},
                **facts,
            )

    def _submit(self, source: Source, record: tuple[Any, ...]) -> m.Event:
        _, call, attempt, key, reference, blob, keys = record
        return m.Submitted(call, attempt, [(key, self._recipes[reference], blob, keys)])

    def _items_follow(self, source: Source, record: tuple[Any, ...]) -> None:
        _, call, attempt, wall = record
        source.bunch = int(call), int(attempt), float(wall)

    def _item(self, source: Source, record: tuple[Any, ...]) -> None:
        _, call, attempt, value, wall, seconds = record
        self._post_items(source, m.Items(source.id, call, attempt, [value], [seconds], wall))

    def _progress(self, source: Source, record: tuple[Any, ...]) -> None:
        _, call, _, done, total = record
        if call in source.assigned:
            self._observer.progressed(source.assigned[call], done, total)

    def _output(self, source: Source, record: tuple[Any, ...]) -> None:
        _, call, _, stream, data = record
        self._observer.output(source.assigned.get(call), stream, data, source.name)

    def _retire(self, source: Source, record: tuple[Any, ...]) -> m.Event:
        self._observer.worker_changed(source.name, f"retires, because {record[1]}")
        return m.Retiring(source.id)

    def _gave_back(self, source: Source, record: tuple[Any, ...]) -> m.Event | None:
        for id, _ in record[1]:
            source.assigned.pop(id, None)
        event = m.GaveBack(source.id, *record[1:])
        if event.cut is None:
            return event
        id, _, count = event.cut
        call = source.assigned[id]
        _check_bunch(call, count)
        self._post(event)
        self._look_whether_over(source, call)
        return None


def _check_bunch(call: Any, count: int) -> None:
    if type(call.blob) is not Bunch or not 0 < count <= call.blob.left:
        raise WireError("a worker told of items that it does not have")


def _check_reports(reports: list[tuple[Any, ...]]) -> None:
    """What another machine says of the ends of attempts must not confuse the core."""
    for call, _, kind, payload, items, began, seconds, _ in reports:
        sound = (
            type(call) is int
            and kind in _KINDS
            and type(began) is type(seconds) is float
            and 0 <= seconds < inf
            and (items is None or type(items) is list)
            and (kind == "value" or _is_payload(kind, payload))
        )
        if not sound:
            raise WireError("a worker told of an end in no known form")


def _is_payload(kind: str, payload: Any) -> bool:
    if kind == "skip":
        return isinstance(payload, str)
    if type(payload) is not tuple or len(payload) != 2:
        return False
    if kind == "held":
        return True
    if kind == "retry":
        after, failure = payload
        return type(after) is float and 0 <= after < inf and isinstance(failure, Failure)
    return isinstance(payload[0], Failure)
