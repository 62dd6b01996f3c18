"""The same server by ``selectors``: sockets are registered once, each with the function to
call when it is ready. The operating system remembers them (epoll, kqueue), so ten thousand
idle clients cost nothing, and no number is too high. Use it for servers and event loops of
your own; asyncio is built on it, and is easier where a conversation has many steps.
"""

import asyncio
import selectors
import socket
from collections.abc import Iterator

from taskrun import each, result, task

CLIENTS = 20


@task(timeout=30)
def server() -> Iterator[tuple[str, int]]:
    """Yield the address, for which the clients wait; then shout back what they say."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()
        Server(listener).serve()


class Server:
    """Who is connected, and what happens when they speak."""

    def __init__(self, listener: socket.socket) -> None:
        self.came = 0
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.on_connect)

    def serve(self) -> None:
        """Until as many have come as were expected, and all have left."""
        while len(self.selector.get_map()) > 1 or self.came < CLIENTS:
            for key, _ in self.selector.select():
                handler = key.data
                handler(key.fileobj)
        self.selector.close()
        print(f"{self.came} clients have come and left")

    def on_connect(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self.selector.register(connection, selectors.EVENT_READ, self.on_words)
        self.came += 1

    def on_words(self, connection: socket.socket) -> None:
        if said := connection.recv(1024):
            connection.sendall(said.upper())  # small, so it fits the socket's buffer
        else:  # this client has hung up
            self.selector.unregister(connection)
            connection.close()


@task(timeout=30)
async def client(address: tuple[str, int] = each(server), n: int = each(range(CLIENTS))) -> str:
    """One of many; they run at once, in one worker, beside the server's."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"hello from {n}\n".encode())
    answer = await reader.readline()
    writer.close()
    return answer.decode().strip()


@task
def report(answers: list[str] = result(client)) -> None:
    """Each client got its own answer."""
    assert answers == [f"HELLO FROM {n}" for n in range(CLIENTS)], answers
    print(f"{answers[0]} ... {answers[-1]}")
