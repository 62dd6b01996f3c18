"""The thread that reads the input of an imap, and submits a call for each of its items.

It has the iterator only while there is room for more calls, so that who lets go of one that
is ``buffered`` wants no more of it; and it ends when the pool does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, Final

from taskrun.blobs import Portable
from taskrun.bunch import TINY
from taskrun.model import Recipe
from taskrun.pooling.driver import Driver
from taskrun.pooling.functions import SCALARS, dumps_scalar
from taskrun.pooling.inbox import Job
from taskrun.pooling.iterators import Feeding, IMapIterator

AT_A_TIME: Final = 64  # items that are fed in a row


def feed_imap(
    driver: Driver,
    pickled: Callable[[Any], Portable],
    recipe: Recipe,
    items: Iterable[tuple[Any, ...]],
    handed: list[IMapIterator],
    feed: object,
) -> None:
    """Submit the calls of an imap, as far ahead as it may and ``feed`` is open.  ``pickled``
    makes the arguments' pickles; ``handed`` has the one iterator, and has it no longer then."""
    feeding = Feeding(handed[0])
    made: IMapIterator | None = handed.pop()
    count = 0
    error: BaseException | None = None
    small = recipe.timeout is None and not recipe.retries
    loop, submit_small, is_fed_by = driver.loop, driver.submit_small, driver.is_fed_by
    try:
        source = iter(items)
        while made is not None and is_fed_by(feed):
            if loop.over:
                error = driver.why_over()  # not the end of the input: there would be more
                break
            room = made.take_room(AT_A_TIME)
            if not room:
                made = None  # not kept by this while it waits
                made = feeding.await_room()
                continue
            end = count + room
            for args in islice(source, room):
                if small and type(args[0]) in TINY:
                    submit_small(recipe, args[0], made, count)
                else:
                    made.narrow()
                    _submit_item(driver, pickled, recipe, args, made.item(count))
                count += 1
                if loop.over or not is_fed_by(feed):
                    break
            else:
                if count < end:  # the input has ended
                    break
    except BaseException as raised:
        error = raised
    if made is not None:
        driver.post(partial(made.fed, count, error))
    driver.close_feed(feed)


def _submit_item(
    driver: Driver,
    pickled: Callable[[Any], Portable],
    recipe: Recipe,
    args: tuple[Any, ...],
    item: Job,
) -> None:
    """One that cannot be pickled is its own error, and the next ones follow."""
    try:
        blob = dumps_scalar(args) if type(args[0]) in SCALARS else pickled((args, {}))
    except Exception as error:
        driver.post(partial(item.failed, error))
        del item  # with its iterator, which would keep itself: the error has this frame
    else:
        driver.submit(recipe, blob, item)
