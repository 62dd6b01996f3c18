"""The words after ``exec`` and ``graph``: which is FILE, which are TASKs."""

from __future__ import annotations

from collections.abc import Sequence


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tell FILE from TASKs: a first word that ends in .py or has a slash in it is a file."""
    if words and (words[0].endswith(".py") or "/" in words[0]):
        return words[0], list(words[1:])
    return None, list(words)
