"""What the workers of all lanes have in common: one process, many calls.

Calls are begun as they come, by one thread, the *home* thread of the worker, which does
all that concerns more than one of them.  The control thread (``control``) hands it what is
asked with :meth:`LaneWorker.post`.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Final

from taskrun import context, descriptors, places
from taskrun.ledger import Ledger
from taskrun.messages import (
    ALSO,
    CALL,
    DELIVER,
    GAVE_BACK,
    NESTED,
    NOTICE,
    QUIT,
    READY,
    RESUME,
    RETIRE,
    TASK,
)
from taskrun.wire import READ_SIZE, Decoder
from taskrun.workers import leaving, native
from taskrun.workers.execute import Running
from taskrun.workers.lanes.calls import RUNNING, LaneExecutor, LaneRunning, interrupted
from taskrun.workers.lanes.control import LaneControl
from taskrun.workers.lanes.output import LaneOutput
from taskrun.workers.lanes.scope import LaneContext
from taskrun.workers.lanes.stacks import Place
from taskrun.workers.outbox import LARGE, Outbox
from taskrun.workers.recipes import Home
from taskrun.workers.scope import call_name, state_home
from taskrun.workers.settings import FINISH_SECONDS, Birth, Preloaded, Settings, place_of
from taskrun.workers.threads import follow_calls

MOST_FILES: Final = 1 << 20  # descriptors that a worker allows itself, where it may


class LaneWorker:
    """One worker process; each lane says how a call is executed, and ended.

    ``awaits``: whether its calls are coroutines.
    """

    awaits = False

    def __init__(
        self, settings: Settings, birth: Birth, fds: list[int], preloaded: Preloaded
    ) -> None:
        places.settle(place_of(settings, birth.worker))
        self._fd, control, stdout, stderr, ledger_fd = fds
        self.name = f"w{birth.worker}"
        self.grace = settings.grace
        self._ledger = Ledger(ledger_fd)
        os.close(ledger_fd)
        self.outbox = Outbox(self._ledger, self._fd)
        self.tell, self.tell_item = self.outbox.tell, self.outbox.tell_item
        lock = self.outbox.lock
        self._output = LaneOutput(self, lock, self.found, (stdout, stderr))
        home = Home(settings.module, preloaded)
        self.executor = LaneExecutor(self, home, lock, self.found, self._output.end, self.later)
        self._context = LaneContext(
            self.executor,
            self,
            lock,
            awaits=self.awaits,
            worker=self.name,
            node=settings.node,
            set_by_user=settings.set_by_user,
        )
        self._state = state_home(settings, self.executor, shared=True)
        self._control = LaneControl(self, control)
        self._decoder = Decoder()
        self._retiring = False
        self.quitting = False

    # -- what each lane says ----------------------------------------------------------

    def prepare(self) -> None:
        """Make what :meth:`post` needs."""
        raise NotImplementedError

    def serve(self) -> None:
        """Call :meth:`read` when there is something in the call Pipe, until :attr:`is_over`."""
        raise NotImplementedError

    def give_all_back(self) -> None:
        """See ``outbox.Port``.  Every call begins when it comes."""

    def begin(self, running: LaneRunning, args: Any) -> None:
        """Have a call executed, from now on."""
        raise NotImplementedError

    def cancel(self, running: LaneRunning) -> None:
        """End a call."""
        raise NotImplementedError

    def post(self, callback: Callable[[], None]) -> None:
        """Have something done in the home thread, soon; any thread may ask."""
        raise NotImplementedError

    def later(self, callback: Callable[[], None]) -> None:
        """Have something done in ``items.SECONDS``."""
        raise NotImplementedError

    def flush(self) -> None:
        """Have what was told sent soon; any thread may ask."""
        raise NotImplementedError

    def flush_soon(self) -> None:
        """See ``scope.Line``."""
        self.flush()

    def found(self) -> LaneRunning | None:
        """The attempt that the code which asks belongs to."""
        return RUNNING.get(None)

    def owner(self) -> LaneRunning | None:
        """See ``threads.Calls``: what all calls use is nobody's."""
        running = self.found()
        return None if running is None or running.making else running

    def run_for(
        self, owner: LaneRunning | None, function: Callable[..., Any], /, *args: Any, **kw: Any
    ) -> Any:
        """See ``threads.Calls``."""
        token = RUNNING.set(owner)
        try:
            return function(*args, **kw)
        finally:
            RUNNING.reset(token)

    def frames_of(self, running: LaneRunning) -> Iterable[Place] | None:
        """Where a call is, the outermost first; None: it is what the home thread executes.

        The control thread asks.
        """
        raise NotImplementedError

    def close(self) -> None:
        """The worker ends."""

    def leave_others(self) -> None:
        """In a child that a task forked: see that no other call goes on in it."""

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> None:
        """Work until told to quit, and nothing is left that runs."""
        os.register_at_fork(after_in_child=self._leave_behind)
        descriptors.allow(MOST_FILES)  # thousands of calls may each have a connection
        self._output.install()
        context.activate(self._context)
        context.activate_everywhere(self._context)
        context.state_home = self._state
        context.show = self._show
        context.owner = self.found
        follow_calls(self)
        self.prepare()
        self._control.start()
        self.tell((READY, os.getpid()))
        self.outbox.flush()
        self.serve()
        self._finish()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.quitting and not self.executor.live

    def _finish(self) -> None:
        """Finish what per_worker() made, and what multiprocessing did, within a time."""
        native.start_new_thread(_exit_in, (FINISH_SECONDS,))
        self.executor.close()
        leaving.clean_up()
        self.close()
        self._output.flush_own()
        self.outbox.flush()

    # -- the call Pipe ----------------------------------------------------------------

    def read(self) -> None:
        """One read, and what it says.  Raises ConnectionError where nobody is there."""
        if not native.is_readable(self._fd):
            return  # an interrupt() between the wait and this read has read it
        data = os.read(self._fd, READ_SIZE)
        if not data:
            raise ConnectionResetError("the coordinator closed the call Pipe")
        for frame in self._decoder.feed(data):
            for record in pickle.loads(frame):
                kind = record[0]
                if kind == CALL:
                    self._begin(record)
                elif kind == DELIVER:
                    self._context.deliver(*record[1:])
                elif kind == TASK:
                    self.executor.learn(record)
                elif kind == NESTED:
                    self.tell((GAVE_BACK, [record[1:3]]))
                elif kind == QUIT:
                    self.quitting = True
        self.flush_if_large()

    def _begin(self, record: tuple[Any, ...]) -> None:
        if self._retiring:
            self.tell((GAVE_BACK, [record[1:3]]))
            self.flush()
            return
        running = self.executor.begin(record)
        if running is None:
            self.flush()
        else:
            self.begin(running, record[5])

    def flush_if_large(self) -> None:
        """Send what was told, where it is much."""
        if self._ledger.used > LARGE:
            self.outbox.flush()

    # -- what is asked, in the home thread --------------------------------------------

    def report(self, count: int | None) -> None:
        """Say what runs; all has begun, so nothing can be given back."""
        self.executor.tell_began()
        if count is not None:
            self.tell((GAVE_BACK, []))
        self.outbox.flush()

    def interrupt(self, call: int, attempt: int, reason: str) -> None:
        """End one call, also where it is only about to come."""
        running = self.executor.live.get(call)
        if running is None:
            while native.is_readable(self._fd) and not self.quitting:
                self.read()
            running = self.executor.live.get(call)
        if running is None or running.attempt != attempt:
            self.executor.early[call, attempt] = reason
            return
        if running.interrupt is None:
            running.interrupt = reason
            self.cancel(running)

    def running(self, call: int) -> LaneRunning | None:
        """The attempt of a call that runs."""
        return self.executor.live.get(call)

    def give_up(self, running: LaneRunning, why: str) -> None:
        """A call does not end, so it is reported as ended, and this worker gets no more."""
        if not self.executor.abandon(running, interrupted(running)):
            return
        if not self._retiring:
            self._retiring = True
            self.tell((RETIRE, f"{self.title(running)} {why}"))
        self.flush()

    def warn_that_it_blocks(self, running: LaneRunning | None, seconds: float, stack: str) -> None:
        """In the control thread: say that a call keeps all others from running."""
        if running is not None:
            if running.warned:
                return
            running.warned = True
        who = "a call" if running is None else self.title(running)
        self.tell((NOTICE, f"{who} lets no other call of {self.name} run, for {seconds:.1f} s "
                           f"so far; it is here:\n{stack.rstrip()}"))  # fmt: skip
        self.outbox.flush()

    def title(self, running: Running) -> str:
        """The call as people know it: ``fetch[3]``."""
        known = running.known
        return call_name(known.name, running.index, submitted=known.names is None)

    # -- waiting attempts -------------------------------------------------------------

    def converse(
        self,
        running: Running,
        wait: tuple[Any, ...],
        satisfied: Callable[[], bool],
        deadline: float | None,
        outside: int | None = None,
    ) -> bool:
        """See ``scope.Line``; here the outcomes are read by the home thread."""
        assert isinstance(running, LaneRunning)
        with self.outbox.lock:
            if running.waiters is None:
                running.waiters = threading.Condition()
            if running.waiting or running.awaited:
                running.together = True
                wait = (*wait[:3], (ALSO, *wait[3]), wait[4])
            running.waiting += 1
            self.tell(wait)
        self.flush()
        came = False
        try:
            came = _await_it(running, running.waiters, satisfied, deadline)
        finally:
            self._waits_no_more(running, came)
        return came

    def _waits_no_more(self, running: LaneRunning, came: bool) -> None:
        """One thread of a call goes on.  What it waited for is no other's, so the core is told
        only by the last one: of what did not come, or came to others."""
        with self.outbox.lock:
            running.waiting -= 1
            if running.waiting or running.awaited or running.done:
                return
            if running.together or not came:
                running.together = False
                self.tell((RESUME, running.call, running.attempt))
        self.flush()

    def listen(self, loop: Any, heard: Callable[[], object]) -> None:
        """See ``scope.Line``; here the home thread listens all the time."""

    def stop_listening(self, loop: Any) -> None:
        """See ``scope.Line``."""

    # -- around -----------------------------------------------------------------------

    def _show(self, fd: int, data: bytes) -> None:
        """See ``context.show``."""
        self._output.write(fd - 1, data)

    def _leave_behind(self) -> None:
        """In a child that a task forked: nothing of the worker's is left in it."""
        if self.executor.forked:
            return  # a child of that child
        self.executor.leave_behind()
        context.show = context.owner = None
        self._output.close()
        os.close(self._fd)
        self._control.close()
        try:
            self._ledger.close()
        except BufferError:
            pass  # a thread that is not in this child was sending from it
        self.leave_others()


def _await_it(
    running: LaneRunning,
    waiters: threading.Condition,
    satisfied: Callable[[], bool],
    deadline: float | None,
) -> bool:
    with waiters:
        while not satisfied():
            if running.interrupt is not None:
                raise interrupted(running)
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            waiters.wait(left)
    return True


def _exit_in(seconds: float) -> None:
    native.sleep(seconds)
    os._exit(0)
