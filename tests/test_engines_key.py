"""The key that workers of another engine get: it leads to the shared state, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from taskrun import authkey
from taskrun.errors import StateError
from taskrun.manager.protocol import GUEST, MANAGER
from taskrun.reactor import Reactor
from taskrun.state.remote import RemoteClient
from taskrun.state.service import Service
from taskrun.transport.dialling import Route, open_socket

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("TASKRUN_AUTHKEY", "0123456789abcdef0123456789abcdef")
    reactor = Reactor()
    made = Service(reactor, is_running=lambda call, attempt: True, notice=lambda text: None)
    over = threading.Event()
    up = threading.Event()

    def serve() -> None:
        made.start()
        up.set()
        reactor.run_until(over.is_set)
        made.close()
        reactor.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert up.wait(10)
    yield made
    over.set()
    reactor.post(lambda: None)
    thread.join(10)


def put(client: RemoteClient) -> Any:
    client.call(("counter.add", "seen", None, (1,)))
    return client.call(("counter.get", "seen", None, ()))


def test_a_guests_key_leads_to_the_state(service: Service) -> None:
    (address,), key = service.for_guests()
    client = RemoteClient(address, key, role=GUEST)
    assert put(client) == 1
    client.close()


def test_a_guests_key_is_not_the_authkey_and_does_not_stand_in_for_it(service: Service) -> None:
    (address,), key = service.for_guests()
    assert service.authkey not in key
    with pytest.raises(StateError, match="does not accept this authkey"):
        put(RemoteClient(address, key))


def test_the_key_of_another_run_is_refused(service: Service) -> None:
    (address,), _ = service.for_guests()
    other = authkey.for_guests(service.authkey, b"another")
    with pytest.raises(StateError, match="does not accept this authkey"):
        put(RemoteClient(address, other, role=GUEST))


def test_without_an_engine_there_is_no_room_for_guests(service: Service) -> None:
    with pytest.raises(StateError, match="guest"):
        put(RemoteClient(service.address, service.authkey, role=GUEST))


def test_a_guest_that_asks_for_anything_else_is_shown_out(service: Service) -> None:
    (address,), key = service.for_guests()
    made, rest = open_socket(Route.to(address), key, GUEST, 10.0)
    with made:
        import pickle

        request = pickle.dumps((None, "dummy", (), {}))
        made.sendall(len(request).to_bytes(4, "big") + request)
        made.settimeout(10)
        assert (rest or made.recv(100)) == b""
    assert MANAGER != GUEST
