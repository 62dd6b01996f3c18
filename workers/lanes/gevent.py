"""The lane ``green``: thousands of greenlets, in which plain blocking code switches by itself.

See ``workers.green`` for how such a worker begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import gevent
import gevent.event
from gevent import hub, socket
from greenlet import getcurrent

from taskrun.errors import Interrupted
from taskrun.workers import native
from taskrun.workers.items import SECONDS
from taskrun.workers.lanes.base import LaneWorker
from taskrun.workers.lanes.calls import RUNNING, LaneRunning, interrupted
from taskrun.workers.lanes.stacks import Place, walk_up


class CallGreenlet(gevent.Greenlet):  # type: ignore[misc]
    """The greenlet of one call."""

    running: LaneRunning


class GreenWorker(LaneWorker):
    """A worker whose calls are greenlets; its home is the main one, and gevent's hub."""

    def prepare(self) -> None:
        """See ``base``."""
        self._thread = native.get_ident()
        self._loop = gevent.get_hub().loop
        # gevent does so after the first fork only: the end of a child that is as quick was lost,
        # and who waited for it waited for ever.
        self._loop.install_sigchld()
        self._main = getcurrent()
        self._about_to_flush = False
        self._over = gevent.event.AsyncResult()

    def serve(self) -> None:
        """See ``base``."""
        gevent.Greenlet.add_spawn_callback(self._note)
        reader = gevent.spawn(self._read_on)
        try:
            self._over.get()
        except hub.LoopExit:
            self.executor.leave(None)  # a forked child, where nothing is left to run
        reader.kill()

    def _read_on(self) -> None:
        try:
            while not self.is_over:
                socket.wait_read(self._fd)
                self.read()
        except gevent.GreenletExit:
            raise
        except BaseException as error:
            self._over.set_exception(error)
            return
        self._over.set(None)

    def _stop_if_over(self) -> None:
        if self.is_over:
            self._over.set(None)

    def found(self) -> LaneRunning | None:
        """See ``base``.  A plain greenlet has no context variables: its parents are asked."""
        running = RUNNING.get(None)
        if running is None and native.get_ident() == self._thread:
            greenlet = getcurrent()
            while running is None and greenlet is not None:
                running = getattr(greenlet, "running", None)
                greenlet = greenlet.parent
        return running

    # -- calls ------------------------------------------------------------------------

    def begin(self, running: LaneRunning, args: Any) -> None:
        """See ``base``."""
        greenlet = running.handle = CallGreenlet(self._perform, running, args)
        greenlet.running = running
        greenlet.start()

    def _perform(self, running: LaneRunning, args: Any) -> None:
        self.executor.perform(running, args)
        self.flush()
        if running.helpers:  # they end with their call, as tasks do in the lane async
            gevent.killall(list(running.helpers), block=False)
        if self.quitting:
            self._stop_if_over()

    def _note(self, greenlet: Any) -> None:
        """A greenlet is started: notes whose it is.  Threads, which are greenlets here, go on
        after their call as they do anywhere."""
        if isinstance(greenlet, CallGreenlet) or isinstance(
            getattr(greenlet._run, "__self__", None), threading.Thread
        ):
            return
        running = self.found()
        noted = None if running is None else running.note(greenlet)
        if noted is not None:
            greenlet.running = running
            greenlet.rawlink(noted.discard)

    def cancel(self, running: LaneRunning) -> None:
        """See ``base``."""
        if not running.handle.started or not running.user:
            self.executor.abandon(running, interrupted(running))
            self.flush()
            running.handle.kill(block=False)
            self._stop_if_over()
            return
        running.raised = True
        running.handle.kill(Interrupted(running.interrupt), block=False)
        self._in(self.grace, lambda: self._abandon(running))

    def _abandon(self, running: LaneRunning) -> None:
        if not running.done:
            self.give_up(running, "goes on although it was killed")
            self._stop_if_over()

    def frames_of(self, running: LaneRunning) -> Iterable[Place] | None:
        """See ``base``."""
        frame = running.handle.gr_frame
        return None if frame is None and running.user else walk_up(frame)

    def leave_others(self) -> None:
        """See base.  In the hub wait the greenlets of all other calls: the child gets another."""
        if native.get_ident() != self._thread:
            return  # a thread that is one: the hub is not in this child
        old = hub.get_hub()
        hub.set_hub(None)
        old.loop.destroy()
        hub.set_loop(None)
        new = hub.get_hub()
        new.parent = old.parent
        greenlet = getcurrent()
        while greenlet.parent is not old:
            greenlet = greenlet.parent
        greenlet.parent = new

    # -- around -----------------------------------------------------------------------

    def post(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._loop.run_callback_threadsafe(callback)

    def later(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._in(SECONDS, callback)

    def _in(self, seconds: float, callback: Callable[[], None]) -> None:
        timer = self._loop.timer(seconds)

        def fire() -> None:
            timer.close()
            callback()

        timer.start(fire)

    def flush(self) -> None:
        """See ``base``.  When the greenlets that can run now have run."""
        if native.get_ident() != self._thread:
            self.outbox.flush()
        elif not self._about_to_flush:
            self._about_to_flush = True
            self._loop.run_callback(self._flush)
        else:
            self.flush_if_large()

    def _flush(self) -> None:
        self._about_to_flush = False
        self.outbox.flush()
