"""An event-driven program does nothing until something happens, and then calls the function
that is registered for it. Here the events are changes of a shared dict: ``watch()`` gives
each as it comes, whichever process made it. Use it for what must react at once to things
that come when they please; asking again and again is slower and costs more.
"""

import time
from collections.abc import Callable

from taskrun import state, task

house = state.dict("house")
listening = state.event("listening")

Handler = Callable[[object], None]
handlers: dict[str, Handler] = {}


def on(what: str) -> Callable[[Handler], Handler]:
    """Register the function that is to be called when ``what`` has changed."""

    def register(handler: Handler) -> Handler:
        handlers[what] = handler
        return handler

    return register


@on("door")
def door(position: object) -> None:
    print("light on" if position == "open" else "light off")


@on("temperature")
def temperature(degrees: object) -> None:
    print("heating" if int(str(degrees)) < 19 else "cosy")


@task(timeout=30)
def react() -> int:
    """The event loop: wait for a change, call its handler, wait again."""
    with house.watch() as changes:
        listening.set()
        for count, change in enumerate(changes):
            if change.key == "everybody":
                print(f"{change.value} after {count} events")
                return count
            handlers[str(change.key)](change.value)
    raise RuntimeError("the run has ended")


@task
def day() -> None:
    """What happens, in a process of its own."""
    listening.wait()
    for key, value in [
        ("door", "open"),
        ("temperature", 17),
        ("door", "shut"),
        ("temperature", 20),
    ]:
        house[key] = value
        time.sleep(0.05)
    house["everybody"] = "asleep"
