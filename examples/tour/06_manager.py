"""A dict and a list that every process can read and change, held by the coordinator's Manager
server. What is read is a copy, so a value is changed by ``update_at``, which reads,
computes and writes in one step. Use them for results that calls build up together; what
only the next task needs is better returned.
"""

import re

from taskrun import each, state, task

words = state.dict("words")  # handles: the data are in the coordinator, where any process
longest = state.list("longest")  # that uses these names finds the same

LINES = [
    "the owl and the pussycat went to sea",
    "in a beautiful pea green boat",
    "they took some honey and plenty of money",
    "wrapped up in a five pound note",
]


@task
def read(line: str = each(LINES)) -> None:
    """Count the words of a line in the dict that counts all of them."""
    found = re.findall(r"\w+", line)
    for word in found:
        words.update_at(word, lambda count: count + 1, 0)
    longest.append(max(found, key=len))


@task(after=[read])
def report() -> None:
    """Read what the others have written."""
    twice = sorted(word for word, count in words.items() if count > 1)
    print(f"{len(words)} different words, more than once: {', '.join(twice)}")
    print(f"the longest of each line: {', '.join(sorted(longest))}")
