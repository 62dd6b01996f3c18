"""Every error that taskrun raises, under one root.

A message says what went wrong, where, and what to do next.  ``exit_status`` is
what the command line returns when the error ends a run (1 a task failed,
2 usage, 3 the run could not go on).
"""

from __future__ import annotations

from math import inf
from typing import SupportsFloat


class TaskrunError(Exception):
    """Root of all of taskrun's errors."""

    exit_status = 1


# -- raised before anything runs ------------------------------------------------------


class UsageError(TaskrunError):
    """Raised when the task file, the command line or the graph asks for what cannot be."""

    exit_status = 2


class LoadError(UsageError):
    """Raised when importing the task file raises; carries the user's own traceback as text."""

    def __init__(self, message: str, traceback_text: str = "") -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


# -- raised when a run as a whole cannot go on ----------------------------------------


class RunError(TaskrunError):
    """Raised when a run cannot go on: workers that never start, a resource nobody has."""

    exit_status = 3


class RunFailed(TaskrunError):
    """Raised by :func:`taskrun.run` when calls failed, or were cancelled from outside;
    ``failures`` lists them, in the order of their end."""

    def __init__(self, message: str, failures: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


class WireError(RunError):
    """Raised when the other end of a Pipe sends what cannot be a frame or a record."""


class DialError(RunError):
    """Raised when a coordinator cannot be reached, or one of the two does not trust the
    other.  ``retry`` says whether it may go better later; a wrong key stays wrong."""

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry
        self.exit_status = 3 if retry else 2


# -- raised where shared state is used -------------------------------------------------


class StateError(TaskrunError):
    """Raised when shared state is used as it cannot be: while the task file is imported,
    or one name for two kinds of objects."""


class StateLost(StateError, ConnectionError):
    """Raised when the coordinator that holds the state is gone, or cannot be reached."""


class StateRefused(StateError):
    """Raised when the coordinator that holds the state does not trust us, or we not it:
    another key, or an address of the wrong form."""

    exit_status = 2


class ChannelClosed(StateError, EOFError):
    """Raised by a call's channel when an end of it is closed and nothing is left in it."""


# -- how one call can end, other than with its own exception --------------------------


class CallError(TaskrunError):
    """Base of the errors that taskrun itself gives a call as its outcome."""


class WorkerLost(CallError):
    """The worker process died while it executed the call; names the signal or exit code."""


class CallTimeout(CallError, TimeoutError):
    """The attempt ran longer than the task's ``timeout=``."""


class CallCancelled(CallError):
    """The call was cancelled before it could end."""


class CallSkipped(CallError):
    """The call was not run, because something that it needs did not succeed."""


class CallBlocked(CallError):
    """The call can never start: what it needs is held by calls that wait for it."""


class RemoteError(CallError):
    """Stands for an exception that could not be pickled, or not rebuilt from its pickle.

    Attributes: ``type_name`` (qualified name of the original class) and
    ``traceback_text`` (the formatted original traceback).
    """

    def __init__(self, message: str, type_name: str = "", traceback_text: str = "") -> None:
        super().__init__(message, type_name, traceback_text)
        self.type_name = type_name
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        return str(self.args[0])


class ResultError(CallError):
    """The task returned, but its result cannot travel (cannot be pickled, cannot be iterated)."""


class ArgumentError(CallError):
    """The call's arguments could not be pickled, or not be unpickled or made in the worker."""


class TaskExit(CallError):
    """The task raised SystemExit, KeyboardInterrupt or another BaseException.

    ``exited``: it was SystemExit, and ``code`` is what that had.  ``raised`` is another one as a
    ``model.Failure``: it can be rebuilt only where its class is known.
    """

    exited = False
    code: str | int | None = None
    raised: object = None


# -- raised by a task on purpose ------------------------------------------------------


class Skip(TaskrunError):
    """Raise in a task to end the call as skipped: ``raise Skip("nothing to do")``."""


class Retry(TaskrunError):
    """Raise in a task to have the call tried again, holding no worker meanwhile.

    ``after`` is in seconds.  Where the task says ``retries=``, this counts against it;
    where it does not, the call may ask again as often as it likes.  Raises TypeError and
    ValueError where nothing can wait for so long: a header's ``"5"`` is text, for example.
    """

    def __init__(self, reason: str = "", *, after: float = 0.0) -> None:
        super().__init__(reason)
        if isinstance(after, bool) or not isinstance(after, SupportsFloat):
            raise TypeError(f"Retry(after=) must be a number of seconds, not {after!r}")
        self.after = float(after)
        if not 0 <= self.after < inf:
            raise ValueError(f"Retry(after=) is in seconds, 0 or more and finite, not {after!r}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_retry, (str(self), self.after))


def _rebuild_retry(reason: str, after: float) -> Retry:
    return Retry(reason, after=after)


class Interrupted(BaseException):
    """Raised inside a running call that is being cancelled or has timed out.

    A BaseException, so that a task's ``except Exception`` does not swallow it.
    """


MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
"""What reading a request raises that is not of the form that is known."""
