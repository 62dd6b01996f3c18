"""Three echo servers: the same conversation by ``select``, by ``selectors`` and by asyncio.

A message is a line.  It may come in any number of parts, which the server keeps until the
line has ended; then it sends the line back.

    python echoing.py selectors          # prints its port, and serves until its input ends

Each is one thread.  Their sockets stay blocking, which is simple and enough here: a socket
that is ready does not make ``recv`` wait, and a client reads its answer before it goes on.
"""

import asyncio
import select
import selectors
import socket
import sys
from collections.abc import Callable

from descriptors import allow

FD_SETSIZE = 1024  # select() knows the descriptors below this number, on every system


def answer(connection: socket.socket, parts: list[bytes]) -> bool:
    """Read what has come, send back the line that it ends; False if the client has left."""
    try:
        part = connection.recv(65536)
        parts.append(part)
        if part.endswith(b"\n"):
            connection.sendall(b"".join(parts))
            parts.clear()
    except ConnectionError:
        return False
    return bool(part)


def by_select(listener: socket.socket) -> None:
    """Ask about all sockets, each time anew; the system looks at every one of them."""
    clients: dict[socket.socket, list[bytes]] = {}
    while True:
        readable, _, _ = select.select([sys.stdin, listener, *clients], [], [])
        for ready in readable:
            if ready is sys.stdin:
                return
            if ready is listener:
                connection, _ = listener.accept()
                if connection.fileno() < FD_SETSIZE:
                    clients[connection] = []
                else:  # select() would refuse to wait for it, and so for all the others
                    connection.close()
            elif not answer(ready, clients[ready]):
                del clients[ready]
                ready.close()


def by_selectors(listener: socket.socket) -> None:
    """Register each socket once; the system says which of them are ready."""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    selector.register(connection, selectors.EVENT_READ, [])
                elif not answer(key.fileobj, key.data):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def by_asyncio(listener: socket.socket) -> None:
    """A coroutine per client, which reads like a conversation with one."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass  # the client has left in the middle
        finally:
            writer.close()

    async def serve() -> None:
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin, over.set)
        async with await asyncio.start_server(converse, sock=listener):
            await over.wait()

    asyncio.run(serve())


SERVERS: dict[str, Callable[[socket.socket], None]] = {
    "select": by_select,
    "selectors": by_selectors,
    "asyncio": by_asyncio,
}


def main(name: str, sockets: str = "1000") -> None:
    allow(int(sockets))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        SERVERS[name](listener)


if __name__ == "__main__":
    main(*sys.argv[1:])
