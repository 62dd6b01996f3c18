"""The shared state of one run, on its coordinator's loop.

Every run listens on a Unix socket of its own.  What serves it is imported, and the store
made, when the first client comes: a run without shared state pays for a socket only.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from taskrun import addresses, authkey
from taskrun.errors import UsageError
from taskrun.reactor import Reactor

if TYPE_CHECKING:
    from taskrun.manager.server import Server
    from taskrun.state.channels import Line
    from taskrun.state.file import StateFile
    from taskrun.state.local import LocalClient
    from taskrun.state.session import Session
    from taskrun.state.store import Store
    from taskrun.transport.peer import Peer
    from taskrun.transport.tls import Certificates


class Service:
    """Holds the state, and serves it.

    ``key_file``: where the authkey is, if that is said.  ``listen``: one more address;
    ``certificates`` and ``insecure_plain`` are as in ``taskrun.transport.listen``.
    ``file``: where the state is kept.  ``is_running`` is asked whether an attempt, (call,
    number), is still the one that counts; ``is_idle`` whether the run itself waits for no
    moment at which something is due; ``title_of`` what people call the call of an id.
    ``find_store`` gives the store, when it is first
    needed; it is a new one, unless said.

    ``roles`` may name what gets the connections of more roles (see ``taskrun.transport``):
    they come by the same addresses, whenever they are entered.
    """

    def __init__(
        self,
        reactor: Reactor,
        *,
        is_running: Callable[[int, int], bool],
        notice: Callable[[str], object],
        is_idle: Callable[[], bool] = lambda: False,
        line: Callable[[str], Line] | None = None,
        title_of: Callable[[int], str] = "call {}".format,
        key_file: str | None = None,
        listen: str | None = None,
        certificates: tuple[str | None, str | None, str | None] | None = None,
        insecure_plain: bool = False,
        file: str | None = None,
        find_store: Callable[[], Store] | None = None,
    ) -> None:
        self.reactor = reactor
        self.thread = threading.get_ident()
        self.sessions: set[Session] = set()
        self.address: str | None = None
        self._is_running = is_running
        self._is_idle = is_idle
        self._line_of = line
        self._title_of = title_of
        self._notice = notice
        self._key_file = key_file
        self._more = listen
        self._certificates = certificates
        self._insecure_plain = insecure_plain
        self.roles: dict[bytes, Callable[[Peer], object]] = {}
        self._path = file
        self._find_store = find_store or self._new_store
        self._keys: dict[bytes, bytes] = {}  # of roles that have one of their own
        self._listening: addresses.Address | None = None
        self._socket: socket.socket | None = None
        self._server: Server | None = None
        self._store: Store | None = None
        self.is_used = False  # whether there may be anything in the state
        self._file: StateFile | None = None
        self.authkey = b""

    # -- beginning and ending ---------------------------------------------------------

    def start(self) -> None:
        """Listen.  Raises UsageError for a key, an address or a file that cannot be used."""
        self.thread = threading.get_ident()
        self.authkey = self._find_key()
        self._listen()
        if self._path is not None:
            self._load(self._path)
        path = self._path_said()
        if path is not None and not addresses.is_served(path):
            self._notice(f"listening on {addresses.shown(path)}")
        elif path is None and self._more is not None:
            self._listen_to(self._more)

    def _path_said(self) -> str | None:
        """The path of the Unix socket that is wanted, if one is."""
        if self._more is None:
            return None
        address = addresses.parse(self._more, insecure_plain=self._insecure_plain, to_listen=True)
        return address if isinstance(address, str) else None

    def _find_key(self) -> bytes:
        try:
            return authkey.authkey(self._key_file)
        except UsageError as error:
            explicit = self._key_file or self._more or "TASKRUN_AUTHKEY_FILE" in os.environ
            if explicit or not str(error).startswith("the authkey file"):
                raise
            # This run needs none that others know.
            return os.urandom(32).hex().encode()

    def _listen(self) -> None:
        path = self._path_said()
        self._socket = self._listen_for_run() if path is None else addresses.listen_at(path)
        self.address = self._socket.getsockname()
        self.reactor.add_reader(self._socket.fileno(), self._on_first_client)

    def _listen_for_run(self) -> socket.socket:
        try:
            return addresses.listen_for_run()
        except UsageError as error:
            self._notice(f"this run cannot be found by others: {error}")
            return addresses.listen_privately()

    def _on_first_client(self) -> None:
        assert self._socket is not None
        self.reactor.remove_reader(self._socket.fileno())
        self._serve(self._socket)

    def _serve(self, address: Any) -> Server:
        if self._server is None:
            from taskrun.manager.server import Server
            from taskrun.state.standard import Registry

            first = self._socket if self._socket is not None else address
            self._server = Server(
                Registry(lambda: self.store), first, self.authkey, self.reactor,
                sessions=self._on_session, report=self.report, notice=self._notice,
                roles=self.roles, keys=self._keys,
            )  # fmt: skip
            self._server.start()
        return self._server

    def _listen_to(self, text: str) -> None:
        assert self._socket is not None
        address = addresses.parse(text, insecure_plain=self._insecure_plain, to_listen=True)
        self.reactor.remove_reader(self._socket.fileno())
        found = self._serve(self._socket).open(
            address, self._files(), insecure_plain=self._insecure_plain
        )
        self._listening = found
        self._notice(f"listening on {addresses.shown(found)}")
        if addresses.is_exposed(found):
            self._notice(_INSECURE)

    def _files(self) -> Certificates | None:
        if self._certificates is None or not any(self._certificates):
            return None  # as the environment says
        from taskrun.transport.tls import Certificates

        return Certificates(*self._certificates)

    def close(self) -> None:
        """End all connections, write what is to be kept, and let go of everything.

        Raises RunError where that could not be written."""
        for session in list(self.sessions):
            session.close()
        if self._server is not None:
            self._server.close()
        elif self._socket is not None:
            self.reactor.remove_reader(self._socket.fileno())
            self._socket.close()
            _unlink(self.address)
        addresses.forget_private(self.address)
        if self._file is not None:
            self._file.close()

    def for_guests(self) -> tuple[tuple[Any, ...], bytes]:
        """The addresses, nearest first, and a key, for workers of an engine that is not ours."""
        from taskrun.manager.protocol import GUEST

        key = self._keys[GUEST] = authkey.for_guests(self.authkey, os.urandom(16))
        far = addresses.from_afar(self._listening)
        return (self.address, *([] if far is None else [far])), key

    # -- the store --------------------------------------------------------------------

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = self._find_store()
            self.is_used = True
        return self._store

    def _new_store(self) -> Store:
        from taskrun.state.store import Store

        return Store(self._is_alive, self._line, self._title_of)

    def client(self, attempt: Callable[[], tuple[int, int] | None]) -> LocalClient:
        """A client for code in this process."""
        from taskrun.state.local import LocalClient

        return LocalClient(self.store, self._wake, attempt, self._is_deserted)

    def _is_deserted(self) -> bool:
        """Whether nobody but the thread that asks could change anything here."""
        if self.sessions or self._more is not None or not self._is_idle():
            return False
        if self._server is not None and self._server.has_clients:
            return False
        own = 1 if self._file is None else 2  # the file has a thread that only reads
        return threading.active_count() == own

    def _wake(self) -> None:
        self.reactor.post(_nothing)

    def _line(self, name: str) -> Line:
        from taskrun.state.channels import unknown_line

        return (self._line_of or unknown_line)(name)

    def _is_alive(self, owner: Any) -> bool:
        return owner[0] != "attempt" or self._is_running(*owner[1:])

    def call_ended(self, call: int) -> None:
        """So do the channels that end with it."""
        with self.store.mutex:
            self.store.channels.call_ended(call)

    def tell(self, call: int, message: Any) -> None:
        """Send a message to a call.  Raises ChannelClosed where that has ended."""
        from taskrun.state.channels import of_call
        from taskrun.state.stored import to_stored

        request = ("channel.send", of_call(call), None, (0, to_stored(message)))
        self.client(lambda: None).call(request)

    def attempt_ended(self, call: int, attempt: int) -> None:
        """What it held is free."""
        self.store.owner_ended(("attempt", call, attempt))

    def _load(self, path: str) -> None:
        from taskrun.state.file import StateFile

        self._file = StateFile(
            path,
            self.store,
            self.reactor,
            lambda text: self.reactor.post(lambda: self._notice(text)),
        )
        self._file.start()

    # -- connections ------------------------------------------------------------------

    def _on_session(self, connection: socket.socket, request: Any, received: bytes) -> None:
        """A client of the Manager server wants to speak of state."""
        from taskrun.state.session import Session

        try:
            owner = ("client", str(request[2][0][1]))
        except (LookupError, TypeError):
            connection.close()  # it says something else
            return
        Session(self, connection, owner, received)  # it enters itself

    def report(self) -> None:
        """In an ``except`` block: what should not happen is shown."""
        from taskrun.telling import tell_traceback

        tell_traceback()


_INSECURE: Final = (
    "--insecure-plain: whoever is on the network between here and a client can read all that "
    "they say, change it, and so run code on both"
)


def _nothing() -> None:
    """The loop looks again at what it waits for."""


def _unlink(path: str | None) -> None:
    if path is not None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # somebody tidied up
