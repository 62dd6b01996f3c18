"""``sh``: a bash command inside a task, captured, shown as it comes, ended with its call.

Each command runs in a process group of its own.  The groups that run are known here, so
that :func:`kill_groups` can end them when their call is cancelled, from another thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from itertools import chain, starmap
from shlex import quote
from subprocess import CalledProcessError, CompletedProcess
from types import FrameType
from typing import Any

from taskrun import context
from taskrun.model import nearest
from taskrun.quoting import fill, plain_words

GRACE = 0.3
"""Seconds between SIGTERM and SIGKILL."""

DRAIN = 0.2
"""Seconds that the output of a background process is read on after bash has ended."""

_CHUNK = 1 << 16  # what a pipe holds
_STEP = 0.01  # seconds between looks at what cannot be waited for


def sh(
    cmd: str,
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    input: str | bytes | None = None,
    check: bool = True,
    **values: Any,
) -> CompletedProcess[str]:
    """Run ``cmd`` by ``bash -eo pipefail -c`` and return what it wrote and its exit status.

    ``{name}`` in ``cmd`` is replaced by the keyword ``name``, or else by the caller's local
    variable of that name: ``sh("sort {path} > {out}")``.  Values are quoted, so that they
    arrive as they are; a list or tuple becomes a word per item; ``{name.attribute}`` and
    ``{name[0]}`` work too.  Do not add quotes for a value's sake; they do no harm.  Braces
    around anything else, and ``${...}``, are bash's; a literal ``{name}`` is ``{{name}}``.

    ``cwd`` is the folder to run in, ``env`` is added to this process's environment, and
    ``input`` (str as UTF-8, or bytes) is what the command reads; without it, nothing.
    Both outputs are returned as text (UTF-8, what is not becomes U+FFFD) and copied to this
    process's own as they come.

    The command ends with its call: when the call is cancelled or an exception leaves ``sh``,
    its process group gets SIGTERM and, 0.3 s later, SIGKILL.  A background process (``&``)
    outlives a command that ends by itself, but what it writes later than 0.2 s after that is
    not read: redirect its output.

    Raises CalledProcessError for an exit status other than 0, unless ``check`` is false;
    NameError for a name that has no value; RuntimeError on a running event loop, where it
    would keep all else from going on: use :func:`sh_async` there.
    """
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise RuntimeError("sh() would block the event loop: in an async task, await sh_async(...)")
    command = _filled(cmd, values, sys._getframe(1))
    return _completed(command, check, *_Shell(command, cwd, env, _bytes(input)).run())


def _filled(cmd: str, values: dict[str, Any], frame: FrameType) -> str:
    if not isinstance(cmd, str):
        raise TypeError(f"sh() takes a command as one str, not a {type(cmd).__name__}: {cmd!r}")
    return fill(cmd, partial(_find, values=values, frame=frame))


def _completed(
    command: str, check: bool, status: int, stdout: str, stderr: str
) -> CompletedProcess[str]:
    if check and status:
        raise CalledProcessError(status, command, stdout, stderr)
    return CompletedProcess(command, status, stdout, stderr)


def sh_async(
    cmd: str,
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    input: str | bytes | None = None,
    check: bool = True,
    **values: Any,
) -> Coroutine[Any, Any, CompletedProcess[str]]:
    """``await sh_async(...)``: :func:`sh` for async tasks; other calls go on meanwhile.

    A cancelled call ends the command, and waits until it has ended.
    """
    command = _filled(cmd, values, sys._getframe(1))
    return _run_async(command, check, _Shell(command, cwd, env, _bytes(input)))


async def _run_async(command: str, check: bool, shell: _Shell) -> CompletedProcess[str]:
    import asyncio

    ended = _in_thread(shell.run, asyncio.get_running_loop())
    try:
        result = await asyncio.shield(ended)
    except asyncio.CancelledError:
        shell.stop()
        await asyncio.wait([ended])
        raise
    return _completed(command, check, *result)


def _in_thread(function: Callable[[], Any], loop: Any) -> Any:
    """An asyncio future of what ``function`` gives; it runs in a thread of its own."""
    future = loop.create_future()

    def run() -> None:
        try:
            settle, result = future.set_result, function()
        except BaseException as error:
            settle, result = future.set_exception, error
        loop.call_soon_threadsafe(settle, result)

    thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    return future


def kill_groups(grace: float = GRACE, owner: object = None) -> None:
    """End every command that runs in this process, or those of one ``owner`` (see
    ``context.owner``): SIGTERM, after ``grace`` s SIGKILL."""
    with _lock:  # so that none is reaped, and its number used again, in between
        groups = {group for group, whose in _groups.items() if owner in (None, whose)}
        for group in groups:
            _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while groups and time.monotonic() < deadline:
        time.sleep(_STEP)
        groups = {group for group in groups if _signal(group, 0)}
    for group in groups:
        _signal(group, signal.SIGKILL)


def _find(name: str, values: dict[str, Any], frame: FrameType) -> Any:
    if name in values:
        return values[name]
    known = frame.f_locals
    if name in known:
        return known[name]
    near = nearest(name, [*values, *known])
    raise NameError(
        f"sh() has no value for {{{name}}}"
        + (f" (did you mean {{{near}}}?)" if near else "")
        + f": pass {name}=..., or write {{{{{name}}}}} if bash is to get these braces"
    )


def _bytes(data: str | bytes | None) -> bytes | None:
    if data is None or isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode()
    raise TypeError(f"input= takes str or bytes, not {type(data).__name__}")


# -- process groups -------------------------------------------------------------------

_lock = threading.RLock()
_groups: dict[int, object] = {}
"""Groups whose leader, a bash, runs or has not been reaped, and who started them."""


def _after_fork_in_child() -> None:
    """The commands are the parent's, and a thread that is not in this child may hold the lock."""
    global _lock
    _lock = threading.RLock()
    _groups.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _signal(group: int, number: int) -> bool:
    """Signal a group; whether there is anyone in it whom we may signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


# -- one command ----------------------------------------------------------------------


class _Shell:
    """A command while it runs: bash, the pipes to it, and what it has written.

    An interrupt may be raised between any two steps of Python code, but not inside one of C
    code.  So ``list.extend`` makes what has to be given up again, bash and the pipes: what
    was made is then noted, too.
    """

    def __init__(
        self,
        command: str,
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str] | None,
        data: bytes | None,
    ) -> None:
        self.script = command if cwd is None else f"cd -- {_folder(cwd)}; {command}"
        self.env = {**os.environ, **env} if env else os.environ
        self.data = None if data is None else memoryview(data)
        self.pids: list[int] = []  # one, once it has started
        self.open: list[int] = []
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.written: dict[int, list[bytes]] = {1: [], 2: []}
        self.reading = 0  # how many of the outputs are open
        self.looking = False  # whether the end of bash has to be looked for
        self.status: int | None = None
        self.robbed = False  # the status went to someone else
        self.deadline = 0.0
        self.stopped = False  # another thread wants it to end
        self.poller = select.poll()

    def run(self) -> tuple[int, str, str]:
        """(exit status, stdout, stderr); kills the group when an exception is raised."""
        try:
            self.start()
            self.pump()
        except BaseException:
            self.kill()
            raise
        finally:
            for fd in self.open:
                os.close(fd)
        if self.robbed:
            raise ChildProcessError(
                "the exit status of sh() is lost: something else in this process waited for bash"
            )
        stdout, stderr = (
            b"".join(chunks).decode("utf-8", "replace") for chunks in self.written.values()
        )
        return self.status or 0, stdout, stderr

    def start(self) -> None:
        stdin, theirs = self.open_stdin()
        actions: list[tuple[Any, ...]] = [stdin]
        for target in (1, 2):
            ours, other = self.pipe()
            theirs.append(other)
            actions.append((os.POSIX_SPAWN_DUP2, other, target))
            self.watch(ours, partial(self.read, target), select.POLLIN)
            self.reading += 1
        self.spawn(actions)
        for fd in theirs:
            self.close(fd)
        self.watch_exit()

    def open_stdin(self) -> tuple[tuple[Any, ...], list[int]]:
        if self.data is None:
            return (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), []
        theirs, ours = self.pipe()
        os.set_blocking(ours, False)
        self.watch(ours, self.write, select.POLLOUT)
        return (os.POSIX_SPAWN_DUP2, theirs, 0), [theirs]

    def spawn(self, actions: list[tuple[Any, ...]]) -> None:
        """Start bash; or the program itself, as make does it, where bash would do nothing but
        execute it: starting bash costs more than many commands do."""
        words = None if _changes_bash(self.env) else plain_words(self.script)
        if words:
            # What cannot be executed, as a text without #! or a folder, is left to bash.
            with suppress(OSError, StopIteration):
                program = next(_on_path(words[0], self.env.get("PATH", os.defpath)))
                return self.execute(program, words, actions)
        own_path = os.environ.get("PATH", os.defpath)
        bash = next(filter(os.path.isfile, _on_path("bash", own_path)), None)
        if bash is None:
            raise FileNotFoundError(f"sh() needs bash, and there is none on PATH ({own_path})")
        try:
            self.execute(bash, ["bash", "-eo", "pipefail", "-c", self.script], actions)
        except OSError as error:
            if error.errno == errno.E2BIG:
                error.add_note("The command is too long: pass what is long as input=")
            raise

    def execute(self, program: str, words: list[str], actions: list[tuple[Any, ...]]) -> None:
        start = partial(
            os.posix_spawn,
            program,
            words,
            file_actions=actions,
            setpgroup=0,
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        whose = context.owner() if context.owner is not None else None
        with _lock:
            self.pids.extend(map(start, (self.env,)))
            _groups.update(dict.fromkeys(self.pids, whose))

    def watch_exit(self) -> None:
        try:
            self.open.extend(map(os.pidfd_open, self.pids))
        except (AttributeError, OSError):  # not Linux, or an old one: look now and then
            self.looking = True
        else:
            self.watch(self.lifted(self.open[-1]), self.reap, select.POLLIN)

    # -- while it runs ----------------------------------------------------------------

    def pump(self) -> None:
        while self.status is None or (self.reading and time.monotonic() < self.deadline):
            if self.stopped:
                self.kill()
                return
            for fd, _ in self.poller.poll(self.patience()):
                self.handlers[fd](fd)
            if self.looking and self.status is None:
                self.reap()

    def patience(self) -> float:
        """Milliseconds to wait for the pipes, and for bash.

        Never for ever: a signal that comes just before the wait does not end it.
        """
        if self.status is not None:
            return max(0.0, self.deadline - time.monotonic()) * 1000
        return (_STEP if self.looking else 0.5) * 1000

    def read(self, target: int, fd: int) -> None:
        data = os.read(fd, _CHUNK)
        if data:
            self.written[target].append(data)
            _copy(data, target)
        else:
            self.reading -= 1
            self.close(fd)

    def write(self, fd: int) -> None:
        assert self.data is not None
        try:
            self.data = self.data[os.write(fd, self.data[:_CHUNK]) :]
        except BrokenPipeError:
            self.data = self.data[:0]  # it has read as much as it wanted to
        if not self.data:
            self.close(fd)

    def reap(self, pidfd: int | None = None) -> None:
        """Note how bash ended, if it has; from here on its number may be used again."""
        with _lock:
            try:
                pid, status = os.waitpid(self.pids[0], os.WNOHANG)
            except ChildProcessError:  # reaped, but not by us
                pid, status, self.robbed = self.pids[0], 0, True
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.deadline = time.monotonic() + DRAIN
                _groups.pop(pid, None)
        if pidfd is not None and pid:  # gevent's waitpid knows it a moment later
            self.close(pidfd)

    def stop(self) -> None:
        """From another thread: have it end."""
        self.stopped = True
        with _lock:
            for pid in self.pids:
                if pid in _groups:
                    _signal(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the group, though its leader may have ended: who else is in it keeps its number."""
        for group in self.pids:
            deadline = time.monotonic() + GRACE
            try:
                alive = _signal(group, signal.SIGTERM)
                while alive and time.monotonic() < deadline:
                    time.sleep(_STEP)
                    if self.status is None:
                        self.reap()
                    alive = _signal(group, 0)
            finally:  # in spite of a second interrupt
                _signal(group, signal.SIGKILL)
                while self.status is None:
                    self.reap()
                    time.sleep(_STEP / 10)

    # -- file descriptors -------------------------------------------------------------

    def pipe(self) -> tuple[int, int]:
        self.open.extend(chain.from_iterable(starmap(os.pipe, ((),))))
        reader, writer = self.open[-2:]
        return self.lifted(reader), self.lifted(writer)

    def lifted(self, fd: int) -> int:
        """``fd`` as a number that is no standard stream's, in case the task has closed its own."""
        if fd > 2:
            return fd
        higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.open.append(higher)
        self.close(fd)
        return higher

    def watch(self, fd: int, handler: Callable[[int], None], events: int) -> None:
        self.handlers[fd] = handler
        self.poller.register(fd, events)

    def close(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)
        self.open.remove(fd)
        os.close(fd)


_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM)
"""Python ignores the first two, a worker perhaps the others; commands count on them."""


def _changes_bash(env: Mapping[str, str]) -> bool:
    """Whether the environment brings code that bash would run, or functions."""
    return "BASH_ENV" in env or any(name.startswith("BASH_FUNC_") for name in env)


def _on_path(name: str, path: str) -> Iterator[str]:
    """What ``name`` may stand for, now: a task may install it, or change folders."""
    folders = path.split(os.pathsep)
    files = [name] if "/" in name else [f"{folder or '.'}/{name}" for folder in folders]
    return (file for file in files if os.access(file, os.X_OK))


def _folder(cwd: str | os.PathLike[str]) -> str:
    from pathlib import Path  # slow to import, seldom needed

    folder = Path(cwd).absolute()
    if not stat.S_ISDIR(folder.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "cwd= of sh() is no folder", str(cwd))
    return quote(str(folder))


def _copy(data: bytes, target: int) -> None:
    """Write to this process's own stdout or stderr, after what Python has yet to write there."""
    if context.show is not None:
        context.show(target, data)
        return
    stream = sys.stdout if target == 1 else sys.stderr
    if getattr(stream, "divided", False):  # many calls share this process, and its fd 1 and 2
        stream.buffer.write(data)
        return
    if stream is not None and not getattr(stream, "closed", False):
        stream.flush()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            select.select([], [target], [])
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return  # the task has closed it: nobody wants to see this
