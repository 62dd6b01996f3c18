"""Python values in a bash command: ``{name}`` becomes the value, as words of its own.

A value must reach the command as it is, whatever is in it, and must never be read as bash.
So what stands for it depends on where its placeholder is.  Outside of quotes that is the
quoted value.  Inside of quotes it is the same, between a quote that ends what was open and
one that goes on with it: with ``name = "a b"``, ``"to {name}"`` becomes ``"to "'a b'""``.
Where bash has no quotes that could be ended (here-documents, backticks) it is an error.
That takes a reader which knows bash's quotes, and nothing else of bash.

Braces are common in bash, so they stay as they are around anything but a name, and after a
``$``: ``{a,b}``, ``${HOME}``, ``awk '{print $1}'``, ``find -exec rm {} +``.  A doubled pair
around a name stands for a single one, as in ``str.format``: ``{{name}}`` is ``{name}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from shlex import quote
from typing import Any

_PLACEHOLDER = r"""
(?<![${]) (?P<open>\{+)
(?P<path> (?P<name>[^\W\d]\w*) (?: \.[^\W\d]\w* | \[[^\[\]{}\s]+\] )* )
(?P<close>\}+)
"""
_STEP = re.compile(r"\.(\w+)|\[(-?\d+)\]|\[([^\]]+)\]")

# What matters to the reader in each state, and the state that it leads to.
_SUBSTITUTION = r"\$\( | `"
_TOKENS = {
    state: re.compile(f"{tokens} | {_PLACEHOLDER}", re.VERBOSE | re.DOTALL)
    for state, tokens in {
        "bare": rf"""\\. | \$' | ['"()] | {_SUBSTITUTION} | \n
            | (?<![^\s;&|()]) \#[^\n]*
            | <<< | <<-?[ \t]*(?P<heredoc>\\?[^\W\d]\w* | '[^'\n]+' | "[^"\n]+")""",
        "'": "'",
        '"': rf'\\. | " | {_SUBSTITUTION}',
        "$'": r"\\. | '",
        "`": r"\\. | `",
        "heredoc": r"(?!)",
    }.items()
}
_ENTERS = {"'": "'", '"': '"', "$'": "$'", "`": "`", "$(": "bare", "(": "bare"}
_LEAVES = {"bare": ")", "'": "'", '"': '"', "$'": "'", "`": "`"}


def fill(command: str, find: Callable[[str], Any]) -> str:
    """``command`` with its placeholders replaced; ``find(name)`` gives the value of a name.

    ``{name.attribute}`` and ``{name[0]}`` work as in ``str.format``; a list or tuple becomes
    a word per item.  Raises what ``find`` raises, and ValueError for a placeholder in a
    here-document or in backticks.
    """
    return _Reader(command, find).read() if "{" in command else command


class _Reader:
    """Goes through a command once, and knows by which quotes it is surrounded."""

    def __init__(self, command: str, find: Callable[[str], Any]) -> None:
        self.command = command
        self.find = find
        self.states = ["bare"]
        self.heredocs: list[str] = []  # what ends those whose text has yet to come
        self.done: list[str] = []

    def read(self) -> str:
        position = 0
        while match := _TOKENS[self.states[-1]].search(self.command, position):
            self.done.append(self.command[position : match.start()])
            position = match.end()
            if match["name"]:
                self.done.append(self.replaced(match))
            else:
                self.done.append(match[0])
                position = self.follow(match, position)
        return "".join([*self.done, self.command[position:]])

    def follow(self, match: re.Match[str], position: int) -> int:
        """Enter or leave quotes; returns where to go on."""
        token, state = match[0], self.states[-1]
        if token == _LEAVES[state]:
            if len(self.states) > 1:  # the ) of a case pattern closes nothing
                self.states.pop()
        elif token in _ENTERS:
            self.states.append(_ENTERS[token])
        elif state == "bare" and match["heredoc"]:
            self.heredocs.append(match["heredoc"].strip("\\'\""))
        elif token == "\n":
            while self.heredocs:
                position = self.skip_heredoc(self.heredocs.pop(0), position)
        return position

    def skip_heredoc(self, end: str, position: int) -> int:
        match = re.compile(rf"^\t*{re.escape(end)}$", re.MULTILINE).search(self.command, position)
        if match is None:  # it was no here-document, but a shift: $((1 << n))
            return position
        self.states.append("heredoc")
        text = self.command[position : match.end()]
        self.done.append(_TOKENS["heredoc"].sub(self.replaced, text))
        self.states.pop()
        return match.end()

    def replaced(self, match: re.Match[str]) -> str:
        opened, closed = len(match["open"]), len(match["close"])
        paired = min(opened, closed)
        literal = paired // 2
        before, after = opened - paired + literal, closed - paired + literal
        middle = match["path"] if paired % 2 == 0 else self.placed(match)
        return "{" * before + middle + "}" * after

    def placed(self, match: re.Match[str]) -> str:
        """The value, quoted for where its placeholder stands."""
        state, path = self.states[-1], match["path"]
        if state in ("heredoc", "`"):
            where, instead = _UNQUOTABLE[state]
            raise ValueError(f"{{{path}}} in {where} cannot be quoted safely: use {instead}")
        value = self.find(match["name"])
        for attribute, index, key in _STEP.findall(path):
            item = int(index) if index else key
            value = getattr(value, attribute) if attribute else value[item]
        if isinstance(value, list | tuple):
            words = " ".join(_word(item, path) for item in value)
        else:
            words = _word(value, path)
            if state != "bare" and not words.startswith("'"):
                return words  # nothing in it that quotes would matter to
        return words if state == "bare" else _LEAVES[state] + words + state


_UNQUOTABLE = {"heredoc": ("a here-document", "input="), "`": ("backticks", "$(...)")}


def _word(value: Any, path: str) -> str:
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    if "\0" in text:
        raise ValueError(f"the value of {{{path}}} has a NUL character in it: {text[:80]!r}")
    return quote(text)


# -- commands that need no shell ------------------------------------------------------

_PLAIN = re.compile(r"[\w@%+:,./-]+(?: [\w@%+=:,./-]+)*", re.ASCII)
_SHELL_WORDS = frozenset(
    "alias bg bind break builtin caller case cd command compgen complete compopt continue coproc "
    "declare dirs disown do done echo elif else enable esac eval exec exit export fc fg fi for "
    "function getopts hash help history if in jobs kill let local logout mapfile popd printf "
    "pushd pwd read readarray readonly return select set shift shopt source suspend test then "
    "time times trap type typeset ulimit umask unalias unset until wait while .".split()
)


def plain_words(command: str) -> list[str] | None:
    """The words of a command in which nothing means anything to a shell; else None.

    Such a command does the same without one: its first word is a program, no builtin
    (``true`` and ``false`` are both, with the same effect), and nothing expands.
    """
    if _PLAIN.fullmatch(command) is None:
        return None
    words = command.split(" ")
    return None if words[0] in _SHELL_WORDS else words
