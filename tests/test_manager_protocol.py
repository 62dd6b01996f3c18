"""The handshake and the frames of the Manager server, without any input or output."""

from __future__ import annotations

import hmac
import multiprocessing
import pickle
import random
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskrun.manager import client
from taskrun.manager.protocol import (
    CHALLENGE,
    FAILURE,
    WELCOME,
    Frames,
    ProtocolError,
    Refused,
    answer_to,
    framed,
    greet,
    header,
)
from taskrun.transport.proof import PLAIN, Answering

KEY = b"secret"
LIMIT = 1 << 20


def payloads(data: bytes) -> list[bytes]:
    frames = Frames(LIMIT)
    frames.feed(data)
    found = []
    while (payload := frames.pop()) is not None:
        found.append(payload)
    return found


def answering(key: bytes = KEY, **options: bool) -> Answering:
    return Answering(key, PLAIN, stock=True, **options)


def challenge_of(connection: Answering) -> bytes:
    (payload,) = payloads(connection.take_outgoing())
    return payload.removeprefix(CHALLENGE)


# -- frames ---------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300)), st.integers(1, 50))
def test_frames_arrive_whole_however_they_were_cut(sent: list[bytes], size: int) -> None:
    data = b"".join(map(framed, sent))
    frames, found = Frames(LIMIT), []
    for start in range(0, len(data), size):
        frames.feed(data[start : start + size])
        while (payload := frames.pop()) is not None:
            found.append(payload)
    assert found == sent
    assert not frames.pending


def test_a_length_beyond_two_gigabytes_has_its_long_form() -> None:
    assert header(0x80000000) == b"\xff\xff\xff\xff" + (0x80000000).to_bytes(8, "big")
    frames = Frames(LIMIT)
    frames.feed(header(0x80000000))
    assert frames.pop() is None
    assert frames.oversized == 0x80000000


@pytest.mark.parametrize("size", [-2, -(2**31)])
def test_a_negative_length_is_an_error(size: int) -> None:
    frames = Frames(LIMIT)
    frames.feed(size.to_bytes(4, "big", signed=True))
    with pytest.raises(ProtocolError):
        frames.pop()


# -- the server's side ----------------------------------------------------------------


@pytest.mark.parametrize("digest", ["md5", "sha256", "sha384", "sha3_256", "sha3_384"])
def test_an_answer_with_any_known_digest_is_accepted(digest: str) -> None:
    connection = answering()
    mac = hmac.digest(KEY, challenge_of(connection), digest)
    connection.feed(framed(b"{%s}%s" % (digest.encode(), mac)))
    assert payloads(connection.take_outgoing()) == [WELCOME]


def test_the_bare_md5_of_old_clients_is_accepted_unless_forbidden() -> None:
    for allowed in (True, False):
        connection = answering(allow_md5=allowed)
        answer = framed(hmac.digest(KEY, challenge_of(connection), "md5"))
        if allowed:
            connection.feed(answer)
            assert payloads(connection.take_outgoing()) == [WELCOME]
        else:
            with pytest.raises(Refused):
                connection.feed(answer)


@pytest.mark.parametrize(
    ("message", "digest", "prefix"),
    [(bytes(20), "md5", b""), (b"{sha256}" + bytes(40), "sha256", b"{sha256}")],
)
def test_each_client_is_answered_in_its_own_form(
    message: bytes, digest: str, prefix: bytes
) -> None:
    connection = answering()
    connection.feed(framed(answer_to(KEY, challenge_of(connection))))
    connection.take_outgoing()
    connection.feed(framed(CHALLENGE + message))
    assert payloads(connection.take_outgoing()) == [prefix + hmac.digest(KEY, message, digest)]
    assert not connection.done
    connection.feed(framed(WELCOME))
    assert connection.done


def test_the_server_answers_nothing_before_the_client_has_proved_itself() -> None:
    connection = answering()
    connection.take_outgoing()
    with pytest.raises(Refused):
        connection.feed(framed(CHALLENGE + bytes(20)) * 2)
    assert connection.take_outgoing() == b""


@pytest.mark.parametrize("answer", [b"", bytes(16), b"{sha256}" + bytes(32), b"{sha1}" + bytes(20)])
def test_a_wrong_answer_is_refused(answer: bytes) -> None:
    connection = answering()
    with pytest.raises(Refused) as caught:
        connection.feed(framed(answer))
    assert payloads(caught.value.last_words) == [FAILURE]


def test_a_replayed_answer_is_refused() -> None:
    first, second = answering(), answering()
    answer = framed(answer_to(KEY, challenge_of(first)))
    first.feed(answer)
    with pytest.raises(Refused):
        second.feed(answer)


def test_the_digest_of_a_challenge_cannot_be_changed_on_the_way() -> None:
    connection = answering()
    changed = challenge_of(connection).replace(b"{sha256}", b"{md5}")
    with pytest.raises(Refused):
        connection.feed(framed(answer_to(KEY, changed)))


def test_the_server_does_not_answer_its_own_challenge() -> None:
    connection = answering()
    message = challenge_of(connection)
    connection.feed(framed(answer_to(KEY, message)))
    with pytest.raises(Refused, match="own challenge"):
        connection.feed(framed(CHALLENGE + message))


def test_the_empty_key_is_a_key() -> None:
    connection = answering(b"")
    message = challenge_of(connection)
    connection.feed(framed(answer_to(b"", message)))
    with pytest.raises(Refused):
        answering(b"").feed(framed(answer_to(KEY, message)))


@pytest.mark.parametrize("size", [257, 0x7FFFFFFF, 1 << 40])
def test_a_long_message_before_the_end_of_the_handshake_is_refused_at_once(size: int) -> None:
    connection = answering()
    with pytest.raises(ProtocolError, match=str(size)):
        connection.feed(header(size))


def test_a_handshake_byte_by_byte_ends_with_the_request_behind_it() -> None:
    connection = answering()
    message = challenge_of(connection)
    request = bytes(1000)
    for byte in (
        framed(answer_to(KEY, message))
        + framed(CHALLENGE + bytes(20))
        + framed(WELCOME)
        + framed(request)
    ):
        connection.feed(bytes([byte]))
    assert connection.done
    assert payloads(connection.rest()) == [request]


def test_nothing_that_an_unknown_peer_sends_lets_it_in() -> None:
    generator = random.Random(3)
    for _ in range(400):
        connection = answering()
        pieces = [
            framed(generator.randbytes(generator.randrange(260))),
            generator.randbytes(generator.randrange(40)),
            framed(generator.choice([CHALLENGE + bytes(20), WELCOME, pickle.dumps(0), b""])),
        ]
        try:
            for _ in range(6):
                connection.feed(generator.choice(pieces))
        except ProtocolError:
            pass
        assert not connection.done


# -- the client's side ----------------------------------------------------------------


class Opposite:
    """A server's answers, scripted; ``receive`` and ``send`` as the client has them."""

    def __init__(self, *says: object) -> None:
        self.says = list(says)
        self.heard: list[bytes] = []

    def receive(self, most: int) -> bytes:
        said = self.says.pop(0)
        found = said(self) if callable(said) else said
        assert isinstance(found, bytes)
        return found

    def send(self, payload: bytes) -> None:
        self.heard.append(payload)


@pytest.mark.parametrize("message", [bytes(20), b"{sha256}" + bytes(40)])
@pytest.mark.parametrize("bare", [True, False])
def test_our_client_gets_on_with_old_and_new_servers(message: bytes, bare: bool) -> None:
    def answer(server: Opposite) -> bytes:
        asked = server.heard[-1].removeprefix(CHALLENGE)
        return hmac.digest(KEY, asked, "md5") if bare else answer_to(KEY, asked)

    server = Opposite(CHALLENGE + message, WELCOME, answer)
    greet(KEY, server.send, server.receive)
    assert server.heard[-1] == WELCOME


@pytest.mark.parametrize(
    "says",
    [
        (b"hello",),
        (CHALLENGE + bytes(20), FAILURE),
        (CHALLENGE + bytes(20), WELCOME, bytes(16)),
        (CHALLENGE + b"{sha1}" + bytes(40),),
        (CHALLENGE + bytes(3),),
    ],
)
def test_our_client_refuses_a_server_without_the_key(says: tuple[bytes, ...]) -> None:
    server = Opposite(*says)
    with pytest.raises(Refused):
        greet(KEY, server.send, server.receive)
    assert WELCOME not in server.heard


def test_our_client_does_not_answer_its_own_challenge_on_another_connection() -> None:
    def reflect(server: Opposite) -> bytes:
        asked = server.heard[-1].removeprefix(CHALLENGE)
        other = Opposite(CHALLENGE + asked)
        with pytest.raises(Refused, match="of our own"):
            greet(KEY, other.send, other.receive)
        assert other.heard == []
        return bytes(16)

    server = Opposite(CHALLENGE + bytes(20), WELCOME, reflect)
    with pytest.raises(Refused):
        greet(KEY, server.send, server.receive)


def test_a_server_that_reflects_everything_is_refused() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def mirror() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            connection.sendall(framed(CHALLENGE + bytes(20)))
            connection.recv(4096)
            connection.sendall(framed(WELCOME))
            asked = connection.recv(4096)
            connection.sendall(asked)  # in the place of the answer
            connection.recv(4096)

    thread = threading.Thread(target=mirror)
    thread.start()
    with listener, pytest.raises(multiprocessing.AuthenticationError):
        client.connect(listener.getsockname(), authkey=KEY)
    thread.join(10)
