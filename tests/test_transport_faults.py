"""What strangers, people in the middle and mistakes do to connections: each with a
deadline, and a clear message on the honest side."""

from __future__ import annotations

import builtins
import os
import random
import resource
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from transport_support import DEADLINE, KEY, Meeting, Side, fill_queue, no_descriptors, unix_path

from taskrun.addresses import Tls
from taskrun.errors import DialError, UsageError
from taskrun.manager.protocol import CHALLENGE, WELCOME, Frames, framed
from taskrun.reactor import Reactor
from taskrun.transport import certificates, dial, dial_blocking, gate, listen
from taskrun.transport.proof import HELLO, USE_TLS
from taskrun.transport.tls import Certificates, for_dialling, for_listening

TLS = Tls("127.0.0.1", 0)
PLAIN = ("127.0.0.1", 0)
NO_FILES = Certificates()
EACH = pytest.mark.parametrize("address", [PLAIN, TLS], ids=["plain", "tls"])


def raw(address: Any) -> socket.socket:
    """A bare connection; TLS is not begun."""
    return socket.create_connection(tuple(address), timeout=DEADLINE)


def secured(address: Any) -> ssl.SSLSocket:
    """A connection with TLS, without any proof."""
    return for_dialling(NO_FILES).wrap_socket(raw(address))


def opened(address: Any) -> socket.socket:
    return secured(address) if isinstance(address, Tls) else raw(address)


def is_closed(stranger: socket.socket) -> bool:
    """Whether the other side closes it, within the deadline."""
    try:
        while stranger.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@contextmanager
def serving(serve: Callable[[socket.socket], object]) -> Iterator[tuple[str, int]]:
    """An address where ``serve`` gets one connection, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE)

    def run() -> None:
        with suppress(OSError, EOFError), closing(listener.accept()[0]) as accepted:
            accepted.settimeout(DEADLINE)
            serve(accepted)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.getsockname()
    listener.close()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def passed_on(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    """Pass on what comes, until one of the two closes."""
    with suppress(OSError):
        while data := source.recv(65536):
            seen += data
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def relay(one: socket.socket, other: socket.socket, seen: bytearray) -> None:
    back = threading.Thread(target=passed_on, args=(other, one, seen), daemon=True)
    back.start()
    passed_on(one, other, seen)
    back.join(DEADLINE)
    other.close()


# -- in the middle --------------------------------------------------------------------


def test_one_in_the_middle_who_ends_tls_is_refused_by_both_sides() -> None:
    # Two threads use one TLS connection there, which breaks it now and then: then once more.
    for _ in range(10):
        seen = bytearray()
        with closing(Meeting(TLS)) as meeting:

            def serve(
                accepted: socket.socket, meeting: Meeting = meeting, seen: bytearray = seen
            ) -> None:
                context = for_listening(NO_FILES).context
                with context.wrap_socket(accepted, server_side=True) as inner:
                    relay(inner, secured(meeting.address), seen)

            with serving(serve) as address:
                meeting.dial_at(Tls(*address))
                meeting.until(lambda meeting=meeting: meeting.there.failures)
                if "before it had proved its key" in str(meeting.there.failures[0]):
                    continue
                meeting.until(lambda meeting=meeting: meeting.here.notices)
        break
    assert "authkey" in str(meeting.there.failures[0])
    assert "does not have the authkey" in meeting.here.notices[0]
    assert meeting.here.peers == [] and meeting.there.peers == []
    assert HELLO in seen and KEY not in seen


def test_one_in_the_middle_who_only_relays_sees_nothing_of_use() -> None:
    seen = bytearray()
    with closing(Meeting(TLS)) as meeting:
        with serving(lambda accepted: relay(accepted, raw(meeting.address), seen)) as address:
            meeting.dial_at(Tls(*address))
            meeting.until(lambda: meeting.there.peers and meeting.here.peers)
            meeting.there.peers[0].send(b"what nobody else may see")
            meeting.until(lambda: meeting.here.frames == [b"what nobody else may see"])
            meeting.there.peers[0].close()
            meeting.until(lambda: meeting.here.ends)
        assert b"nobody else" not in seen and HELLO not in seen and len(seen) > 500


@pytest.mark.parametrize("over_tls", [False, True])
@pytest.mark.parametrize("what", ["nonsense", "its own proof", "welcome alone"])
def test_a_fake_coordinator_is_found_out(over_tls: bool, what: str) -> None:
    def serve(accepted: socket.socket) -> None:
        if over_tls:
            context = for_listening(NO_FILES).context
            accepted = context.wrap_socket(accepted, server_side=True)
        accepted.sendall(framed(CHALLENGE + b"{sha256}" + os.urandom(40)))
        frames = Frames(1000)
        messages: list[bytes] = []
        while len(messages) < 2:
            frames.feed(accepted.recv(1000))
            while (message := frames.pop()) is not None:
                messages.append(message)
        proofs = {"nonsense": os.urandom(32), "its own proof": messages[1], "welcome alone": b""}
        accepted.sendall(framed(WELCOME + proofs[what]))
        is_closed(accepted)

    with serving(serve) as address, pytest.raises(DialError) as caught:
        dial_blocking(Tls(*address) if over_tls else address, KEY, b"node", DEADLINE)
    assert not caught.value.retry
    assert "authkey" in str(caught.value) or "not a coordinator" in str(caught.value)


def test_a_client_that_reflects_is_refused() -> None:
    with closing(Meeting(PLAIN)) as meeting:
        for number in range(2):
            with raw(meeting.address) as stranger:
                challenge = meeting.beside(lambda: stranger.recv(1000))
                if number:  # behind a first message of the right form
                    stranger.sendall(framed(HELLO + b"node" + os.urandom(32)))
                stranger.sendall(challenge)
                assert meeting.beside(lambda: is_closed(stranger))
        meeting.until(lambda: len(meeting.here.notices) == 2)
        assert meeting.here.peers == []


# -- the wrong form -------------------------------------------------------------------


def test_to_dial_tls_without_it_is_told_the_right_form() -> None:
    with closing(Meeting(TLS)) as meeting:
        plain = tuple(meeting.address)
        meeting.dial_at(plain)
        meeting.until(lambda: meeting.there.failures and meeting.here.notices)
        (failure,) = meeting.there.failures
        assert str(failure) == (
            f"127.0.0.1:{plain[1]} speaks TLS: write tls://127.0.0.1:{plain[1]}"
        )
        assert not failure.retry
        assert "it does not speak TLS" in meeting.here.notices[0]


def test_to_dial_without_tls_what_has_none_is_told_the_right_form() -> None:
    with closing(Meeting(PLAIN)) as meeting:
        port = meeting.address[1]
        meeting.dial_at(Tls("127.0.0.1", port))
        meeting.until(lambda: meeting.there.failures and meeting.here.notices)
        (failure,) = meeting.there.failures
        assert str(failure) == (
            f"tls://127.0.0.1:{port} does not speak TLS: write 127.0.0.1:{port}"
        )
        assert not failure.retry
        assert "it begins with TLS" in meeting.here.notices[0]


def test_a_client_of_the_standard_library_shows_its_user_what_to_write() -> None:
    with closing(Meeting(TLS, timeout=0.5)) as meeting:
        plain = tuple(meeting.address)
        said = f"this address speaks TLS: tls://.*:{plain[1]}"
        with pytest.raises((AssertionError, AuthenticationError), match=said):  # since 3.12
            meeting.beside(lambda: connection.Client(plain, authkey=KEY))
        assert "TLS is expected there" in meeting.here.notices[0]


def test_to_begin_tls_too_late_is_worth_another_try() -> None:
    def tell_at_once(accepted: socket.socket) -> None:
        accepted.sendall(framed(USE_TLS + b" this address speaks TLS"))
        is_closed(accepted)

    for _ in range(50):
        with serving(tell_at_once) as address, pytest.raises(DialError) as caught:
            dial_blocking(Tls(*address), KEY, b"node", DEADLINE)
        if "does not speak TLS" not in str(caught.value):
            break  # else it came in the very moment in which TLS was begun
    assert "did not wait until TLS had begun" in str(caught.value)
    assert caught.value.retry


def test_tls_1_2_is_refused_and_named_on_both_sides() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with closing(Meeting(TLS)) as meeting:
        with raw(meeting.address) as stranger, pytest.raises(ssl.SSLError):
            meeting.beside(lambda: old.wrap_socket(stranger))
        meeting.until(lambda: meeting.here.notices)
        assert "does not speak TLS 1.3" in meeting.here.notices[0]


def test_a_listener_with_tls_1_2_is_refused_and_named() -> None:
    def serve(accepted: socket.socket) -> None:
        context = for_listening(NO_FILES).context
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.wrap_socket(accepted, server_side=True)

    with serving(serve) as address, pytest.raises(DialError, match=r"speak TLS 1\.3") as caught:
        dial_blocking(Tls(*address), KEY, b"node", DEADLINE)
    assert not caught.value.retry


def test_without_tls_beyond_this_machine_only_where_both_say_so() -> None:
    with closing(Meeting(("0.0.0.0", 0))) as meeting:
        assert isinstance(meeting.address, Tls)
    with closing(Meeting(("0.0.0.0", 0), insecure_plain=True)) as meeting:
        assert not isinstance(meeting.address, Tls)
        meeting.dial_at(("0.0.0.0", meeting.address[1]), insecure_plain=True)
        meeting.until(lambda: meeting.here.peers and meeting.there.peers)
        meeting.dial_at(("0.0.0.0", meeting.address[1]))
        meeting.until(lambda: meeting.there.failures)
        assert "--insecure-plain" in str(meeting.there.failures[0])


def test_who_dials_while_the_queue_of_a_unix_socket_is_full_waits_for_room() -> None:
    path, reactor, side = unix_path(), Reactor(), Side()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        others = fill_queue(path)
        dial(path, KEY, reactor, b"node", side.take, side.failures.append)
        assert not reactor.run_until(lambda: bool(side.failures), monotonic() + 0.1)
        for other in others:
            listening.accept()[0].close()
            other.close()
        came = reactor.run_until(
            lambda: bool(select.select([listening], [], [], 0)[0]), monotonic() + DEADLINE
        )
        assert came and not side.failures
    reactor.close()


def test_where_there_is_no_room_in_time_it_is_said() -> None:
    path = unix_path()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        others = fill_queue(path)
        with pytest.raises(DialError, match="cannot be reached in time"):
            dial_blocking(path, KEY, b"node", 0.1)
        for other in others:
            other.close()


# -- those who do not prove anything --------------------------------------------------


@EACH
def test_300_silent_connections_keep_nobody_out_and_are_gone_in_time(address: Any) -> None:
    with closing(Meeting(address, timeout=3.0)) as meeting:
        silent = [raw(meeting.address) for _ in range(300)]
        began = monotonic()
        meeting.meet()
        assert monotonic() - began < 2.5  # before any of them was at its end
        meeting.until(lambda: not meeting.listener._gate.is_busy)
        for stranger in silent:
            assert is_closed(stranger)
        meeting.meet()


def test_strangers_have_a_quarter_of_the_descriptors_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with closing(Meeting(PLAIN)) as meeting, ExitStack() as kept:
        for _ in range(60):
            kept.enter_context(raw(meeting.address))
        greeting = meeting.listener._gate._greeting
        meeting.until(lambda: len(greeting) > 15)
        meeting.reactor.run_until(lambda: len(greeting) > 16, monotonic() + 0.2)
        assert len(greeting) == 16
        meeting.meet()


@EACH
def test_one_byte_now_and_then_does_not_move_the_deadline(address: Any) -> None:
    with closing(Meeting(address, timeout=0.6)) as meeting:
        stranger = meeting.beside(lambda: opened(meeting.address))
        began = monotonic()

        def drip() -> float:
            for byte in framed(HELLO + b"node" + bytes(32)):
                with suppress(OSError):
                    stranger.sendall(bytes([byte]))
                threading.Event().wait(0.05)
            assert is_closed(stranger)
            return monotonic() - began

        assert 0.4 < meeting.beside(drip) < 10
        assert "has not proved the authkey in time" in meeting.here.notices[0]


@EACH
def test_fuzzed_bytes_before_the_proof_end_their_connection_only(address: Any) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    hello = framed(HELLO + b"node" + bytes(32))
    with closing(Meeting(address)) as meeting:
        here, there = meeting.meet()

        def fuzz() -> None:
            for number in range(150):
                stranger = raw(meeting.address) if number % 3 else opened(meeting.address)
                noise = bytearray(hello if number % 2 else b"")
                noise += generator.randbytes(generator.randrange(1, 300))
                for _ in range(generator.randrange(4)):
                    noise[generator.randrange(len(noise))] = generator.randrange(256)
                with suppress(OSError), stranger:
                    stranger.sendall(noise)
                    stranger.shutdown(socket.SHUT_WR)
                    is_closed(stranger)

        meeting.beside(fuzz)
        assert len(meeting.here.peers) == 1 and meeting.reports == []
        there.send(b"as before")
        meeting.until(lambda: meeting.here.frames == [b"as before"])
        assert not here.closed
        meeting.meet()


@EACH
@pytest.mark.parametrize("size", [257, 0x7FFFFFFF, -1, -2])
def test_a_length_that_no_handshake_has_closes_the_connection(address: Any, size: int) -> None:
    with closing(Meeting(address)) as meeting:
        stranger = meeting.beside(lambda: opened(meeting.address))
        stranger.sendall(size.to_bytes(4, "big", signed=True) + bytes(20))
        assert meeting.beside(lambda: is_closed(stranger))
        assert meeting.here.peers == []


def test_numbers_that_a_stranger_chooses_make_no_new_notices() -> None:
    with closing(Meeting(PLAIN)) as meeting:
        for size in range(300, 320):
            with raw(meeting.address) as stranger:
                stranger.sendall(size.to_bytes(4, "big"))
                assert meeting.beside(lambda stranger=stranger: is_closed(stranger))
        assert [notice.partition(": ")[2] for notice in meeting.here.notices] == [
            "300 bytes before the proof of the key"
        ]


def test_after_many_notices_there_are_new_ones_as_soon_as_the_old_ones_are_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    with closing(Meeting(PLAIN)) as meeting:
        monkeypatch.setattr(gate, "monotonic", lambda: now)
        tell = meeting.listener._gate.tell
        for number in range(200):
            tell("turned away", "it is odd" + "!" * number)
        assert len(meeting.here.notices) == 100
        now += 61
        tell("turned away", "it is odd")
        tell("turned away", "it is even")
        tell("turned away", "it is even")
        assert meeting.here.notices[100:] == ["turned away: it is odd", "turned away: it is even"]


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become another user")
def test_another_users_process_is_turned_away_from_a_unix_socket() -> None:
    path = unix_path()
    with closing(Meeting(path)) as meeting:
        os.chmod(os.path.dirname(path), 0o777)  # as if the folder were no protection
        os.chmod(path, 0o777)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.settimeout(DEADLINE)
                    stranger.connect(path)
                    status = 0 if not stranger.recv(100) else 2
            finally:
                os._exit(status)
        meeting.until(lambda: meeting.here.notices)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "belongs to another user" in meeting.here.notices[0]


def test_a_unix_socket_among_others_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="not in a folder that only you can look into"):
        listen("/tmp/socket of a test", KEY, Reactor(), print)
    assert not os.path.exists("/tmp/socket of a test")


# -- TLS as it is ---------------------------------------------------------------------


def test_messages_in_one_record_are_all_seen_at_once() -> None:
    with closing(Meeting(TLS)) as meeting:

        def talk() -> list[bytes]:
            with dial_blocking(meeting.address, KEY, b"client", DEADLINE) as wire:
                wire._socket.sendall(b"".join(map(framed, (b"one", b"two", b"three"))))
                return [bytes(wire.recv(DEADLINE)) for _ in range(3)]

        meeting.here.on_frame = lambda peer, frame: peer.send(frame)
        assert meeting.beside(talk) == [b"one", b"two", b"three"]


def test_one_who_sends_without_end_does_not_keep_the_others_waiting() -> None:
    with closing(Meeting(TLS)) as meeting:
        loud = meeting.meet()[1]
        quiet = meeting.meet()[1]
        for _ in range(400):
            loud.send(bytes(1 << 20))
        meeting.until(lambda: len(meeting.here.frames) > 3)
        quiet.send(b"me too")
        meeting.until(lambda: b"me too" in meeting.here.frames)
        assert loud.unsent > 1 << 26


def test_an_idle_connection_is_not_readable() -> None:
    with closing(Meeting(TLS)) as meeting:
        _, there = meeting.meet()
        heard: list[bytes] = []
        there._decoder.feed = lambda data: heard.append(data) or []  # type: ignore[assignment,func-returns-value]
        assert not meeting.reactor.run_until(lambda: bool(heard), monotonic() + 0.2)


def test_a_forked_child_neither_uses_nor_ends_the_connection() -> None:
    with closing(Meeting(TLS)) as meeting:
        here, there = meeting.meet()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if here.closed and there.closed else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        there.send(b"still here")
        meeting.until(lambda: meeting.here.frames == [b"still here"])


def test_a_callback_that_raises_ends_its_connection_only() -> None:
    with closing(Meeting(TLS)) as meeting:
        take, meeting.here.take = meeting.here.take, lambda peer: 1 / 0  # type: ignore[assignment]
        meeting.dial()
        meeting.until(lambda: meeting.there.ends)
        assert "ZeroDivisionError" in meeting.reports[0]
        meeting.here.take = take  # type: ignore[method-assign]
        _, there = meeting.meet()
        meeting.here.on_frame = lambda peer, frame: 1 / 0
        there.send(b"one")
        there.send(b"two")
        meeting.until(lambda: len(meeting.there.ends) == 2)
        assert "ZeroDivisionError" in meeting.reports[1] and meeting.here.frames == [b"one"]
        assert meeting.here.ends == ["what it said could not be taken"]
        meeting.meet()


def test_who_has_no_descriptor_left_is_told_so_and_may_try_again() -> None:
    with closing(Meeting(PLAIN)) as meeting, no_descriptors():
        meeting.dial()
        meeting.until(lambda: meeting.there.failures)
    assert meeting.there.failures[0].retry
    assert "Too many open files" in str(meeting.there.failures[0])


# -- certificates ---------------------------------------------------------------------


def openssl(*arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command here")
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A folder with ca.pem, and host.pem for 127.0.0.1, signed by it."""
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-subj", "/CN=authority", "-keyout", f"{tmp_path}/ca.key",
            "-out", f"{tmp_path}/ca.pem")  # fmt: skip
    openssl("req", *new, "-subj", "/CN=host", "-keyout", f"{tmp_path}/host.key",
            "-out", f"{tmp_path}/host.csr")  # fmt: skip
    (tmp_path / "extensions").write_text("subjectAltName=IP:127.0.0.1")
    openssl("x509", "-req", "-in", f"{tmp_path}/host.csr", "-CA", f"{tmp_path}/ca.pem",
            "-CAkey", f"{tmp_path}/ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", f"{tmp_path}/extensions", "-out", f"{tmp_path}/host.pem")  # fmt: skip
    return tmp_path


def test_certificates_of_ones_own_are_checked_and_the_key_is_proved(authority: Path) -> None:
    own = Certificates(f"{authority}/host.pem", f"{authority}/host.key")
    checking = Certificates(ca=f"{authority}/ca.pem")
    with closing(Meeting(TLS, tls=own)) as meeting:
        meeting.dial(tls=checking)
        meeting.until(lambda: meeting.there.peers and meeting.here.peers)
        meeting.dial(tls=checking, key=b"another key of sixteen bytes")
        meeting.until(lambda: meeting.there.failures)
        assert "authkey" in str(meeting.there.failures[0])
    with closing(Meeting(TLS)) as meeting:  # with a certificate that was made for it
        meeting.dial(tls=checking)
        meeting.until(lambda: meeting.there.failures)
        assert "--tls-ca does not vouch for" in str(meeting.there.failures[0])
        assert not meeting.there.failures[0].retry


def test_a_listener_may_require_certificates_of_those_who_dial(authority: Path) -> None:
    own = Certificates(f"{authority}/host.pem", f"{authority}/host.key", f"{authority}/ca.pem")
    with closing(Meeting(TLS, tls=own)) as meeting:
        meeting.dial(tls=own)
        meeting.until(lambda: meeting.there.peers and meeting.here.peers)
        meeting.dial()
        meeting.until(lambda: meeting.there.failures and meeting.here.notices)
        assert "requires a certificate" in str(meeting.there.failures[0])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (Certificates("absent.pem"), "absent.pem cannot be read: No such file"),
        (Certificates(key="absent.key"), "--tls-key goes with --tls-cert"),
        (Certificates(ca="absent.pem"), "--tls-ca absent.pem cannot be read"),
        (Certificates(__file__), "no certificate in PEM"),
        (Certificates(ca=__file__), "no certificate in PEM"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_named(files: Certificates, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        listen(TLS, KEY, Reactor(), print, tls=files)
    with pytest.raises(UsageError, match=said):
        dial_blocking(Tls("127.0.0.1", 1), KEY, b"node", tls=files)


def test_the_package_cryptography_makes_a_certificate(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the package cryptography is not installed")
    certificates.by_cryptography(f"{tmp_path}/cert", f"{tmp_path}/key")
    assert os.stat(tmp_path / "key").st_mode & 0o77 == 0
    assert len(for_listening(Certificates(f"{tmp_path}/cert", f"{tmp_path}/key")).binding) == 32


def test_the_openssl_command_makes_a_certificate(tmp_path: Path) -> None:
    openssl("version")
    certificates.by_openssl(f"{tmp_path}/cert", f"{tmp_path}/key")
    assert len(for_listening(Certificates(f"{tmp_path}/cert", f"{tmp_path}/key")).binding) == 32


def test_where_nothing_makes_a_certificate_both_ways_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"taskrun\[network\].*openssl command.*--tls-cert"):
        listen(TLS, KEY, Reactor(), print)
