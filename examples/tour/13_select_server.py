"""A server with many clients and one thread: ``select`` waits until any of its sockets has
something to do. It is given all sockets each time and looks at each of them, and cannot
take descriptors from 1024 on. Use it to understand what every event loop does, or where
nothing but POSIX is there; otherwise take ``selectors``.
"""

import asyncio
import select
import socket
from collections.abc import Iterator

from taskrun import each, result, task

CLIENTS = 20


@task(timeout=30)
def server() -> Iterator[tuple[str, int]]:
    """Yield the address, for which the clients wait; then shout back what they say."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()
        serve(listener)


def serve(listener: socket.socket) -> None:
    """Until as many have come as were expected, and all have left."""
    clients: set[socket.socket] = set()
    came = 0
    while clients or came < CLIENTS:
        readable, _, _ = select.select([listener, *clients], [], [])
        for ready in readable:
            if ready is listener:
                clients.add(listener.accept()[0])
                came += 1
            elif said := ready.recv(1024):
                ready.sendall(said.upper())  # small, so it fits the socket's buffer
            else:  # this client has hung up
                clients.remove(ready)
                ready.close()
    print(f"{came} clients have come and left")


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
