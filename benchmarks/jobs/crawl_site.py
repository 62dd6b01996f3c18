"""A web site whose pages take 100 ms each: ``crawl_site.py PAGES`` prints its port and serves.

Page n links to pages 32 n + 1 and the next 31, as far as there are any.  It ends with its input.
"""

import asyncio
import sys

PAGES = int(sys.argv[1])
DELAY = 0.1
LINKS = 32


def page(number: int) -> bytes:
    children = range(LINKS * number + 1, min(LINKS * (number + 1) + 1, PAGES))
    body = "\n".join(f'<a href="/{child}">{child}</a>' for child in children).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(DELAY)
            writer.write(page(int(request.split()[1].strip(b"/") or 0)))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()  # nothing more is asked


async def serve() -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    server = await asyncio.start_server(converse, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()


asyncio.run(serve())
