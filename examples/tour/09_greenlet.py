"""A greenlet is a function with a stack of its own that runs until it calls ``switch()``, and
goes on where it was when somebody switches back. Nothing runs at the same time and nothing
is interrupted, so there are no locks; who runs next is in the program. Use it by hand to
turn code that calls back, or that waits deep inside a library, into plain loops; gevent is
built on it.
"""

from greenlet import greenlet

from taskrun import task

TEXT = "a pea green boat"


@task(lane="green")
def converse() -> str:
    """One greenlet reads letters, the other makes words of them; both are plain loops."""
    spoken: list[str] = []
    listener = greenlet(listen)
    listener.switch(spoken)  # runs until it asks for the first letter
    for letter in TEXT:
        print(f"{letter!r} ", end="")
        listener.switch(letter)  # runs until it asks for the next one
    listener.switch(None)
    assert listener.dead
    return " ".join(spoken)


def listen(spoken: list[str]) -> None:
    """Collect letters into words; the loop does not know where the letters come from."""
    main = greenlet.getcurrent().parent
    word = ""
    while (letter := main.switch()) is not None:
        if letter == " ":
            spoken.append(word)
            print(f"-> {word!r}")
            word = ""
        else:
            word += letter
    spoken.append(word)
    print(f"-> {word!r}")
