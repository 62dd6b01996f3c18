"""Lines that calls print are never torn, taskrun sees to that; what is longer than a line
needs a lock. ``with state.lock(name)`` lets one call at a time in, in whatever process, and
is free again when its holder is killed. Use it around anything that only one may do at a
time and that taskrun cannot see: a file, a device, an account.
"""

import os
import tempfile
import time
from pathlib import Path

from taskrun import each, result, state, task

pen = state.lock("pen")

VERSES = {
    "row": "Row, row, row your boat / Gently down the stream",
    "merrily": "Merrily, merrily, merrily, merrily / Life is but a dream",
    "bells": "Are you sleeping, are you sleeping / Brother John, Brother John",
    "morning": "Morning bells are ringing / Ding, dang, dong",
}


@task
def book() -> Path:
    """An empty file."""
    handle, name = tempfile.mkstemp(suffix=".txt")
    os.close(handle)
    return Path(name)


@task
def write(name: str = each(VERSES), file: Path = result(book)) -> None:
    """Write a verse into the book, line by line; nobody else writes between the lines."""
    with pen, file.open("a") as page:
        for line in VERSES[name].split(" / "):
            print(line, file=page, flush=True)
            time.sleep(0.02)  # time enough for another process to come between


@task(after=[write], always=True)
def sing(file: Path = result(book)) -> None:
    """Read the book: the verses in any order, each of them whole."""
    text = file.read_text()
    file.unlink()
    assert all(verse.replace(" / ", "\n") in text for verse in VERSES.values()), text
    print(text, end="")
