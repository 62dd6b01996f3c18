"""The entry point: runs a command and turns whatever ends it into an exit status.

Nobody sees a traceback of ours for a mistake of theirs: errors of the command line and of
the task file become a few lines on stderr.  A bug of ours is shown as what it is.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

    from taskrun.errors import TaskrunError

NO_MEANS = 3  # for a run to go on
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
COMPLETE_VARIABLE = "_TASKRUN_COMPLETE"


class Terminated(KeyboardInterrupt):
    """A SIGTERM came while nobody was there to take it in order."""


def main(args: Sequence[str] | None = None, *, served: bool = False) -> int:
    """Run ``taskrun`` with ``args`` (those of this process); gives the exit status.  ``served``:
    a server has started this."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # What the terminal cannot show is shown as an escape.
            sys.stdout.reconfigure(errors="backslashreplace")
        status = _run(sys.argv[1:] if args is None else list(args), served)
        if sys.stdout is not None:  # it may have been closed: >&-
            sys.stdout.flush()
        return status
    except Terminated:
        return TERMINATED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except OSError as error:
        from taskrun.telling import tell

        if error.errno in (errno.EMFILE, errno.ENFILE):
            tell("error: no more file descriptors are to be had: raise the limit (ulimit -n)")
            return NO_MEANS
        if not _is_of_stdout(error):
            raise
        _forget_stdout()
        tell(f"error: cannot write to stdout: {error.strerror}")
        return 1


def _run(args: list[str], served: bool) -> int:
    _take_sigterm()
    _keep_exit_statuses()
    import click

    from taskrun.cli.group import cli
    from taskrun.errors import TaskrunError

    if COMPLETE_VARIABLE in os.environ:
        from click.shell_completion import shell_complete

        instruction = os.environ[COMPLETE_VARIABLE]
        return shell_complete(cli, {}, "taskrun", COMPLETE_VARIABLE, instruction)
    try:
        with cli.make_context("taskrun", args, auto_envvar_prefix="TASKRUN", obj=served) as context:
            return cli.invoke(context) or 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        return _tell_usage(error)
    except TaskrunError as error:
        return _tell(error)


def _take_sigterm() -> None:
    """Have a SIGTERM end us as a Ctrl-C does, until a run takes both."""
    import signal

    def terminated(number: int, frame: object) -> None:
        raise Terminated

    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)


def _keep_exit_statuses() -> None:
    """Whoever started us may ignore SIGCHLD, and so would we: the system then keeps no exit
    status of any child."""
    import signal

    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _tell(error: TaskrunError) -> int:
    from taskrun.telling import write

    traceback_text = getattr(error, "traceback_text", "")
    write(f"{traceback_text}taskrun: error: {error}\n")
    return error.exit_status


def _tell_usage(error: click.ClickException) -> int:
    from taskrun.telling import write

    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    message = message[:1].lower() + message[1:].removesuffix(".")
    write(f"taskrun: error: {message}{hint}\n")
    return 2


def _is_of_stdout(error: OSError) -> bool:
    """Whether ``error`` was raised by click.echo(), or by the last flush here."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"] in ("click.utils", __name__)


def _forget_stdout() -> None:
    # What is still buffered has no reader: let the flush at exit find one.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
