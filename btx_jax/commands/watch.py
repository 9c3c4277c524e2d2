"""Serve a web page from this machine that shows a run in progress."""

import contextlib
import http.server
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btx_jax import environment, interrupts
from btx_jax.errors import UserError
from btx_jax.terminal import say

HOST = "127.0.0.1"  # reachable from this machine only
LOCAL = (HOST, "localhost", "[::1]")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def serving(
    workdir: Path, host: str, port: int, seconds: float
) -> Iterator[http.server.ThreadingHTTPServer]:
    """Open a read-only HTTP server for the page; it answers while its `serve_forever` runs. Raises
    UserError when the directory does not exist or the port is taken."""
    environment.require("report", "btx watch")
    from btx_jax.reporting.live import Page  # matplotlib comes with an extra

    if not workdir.is_dir():
        raise UserError(
            f"RUN: {workdir} is not a directory; name the directory of a run or a pipeline"
        )
    page = Page(workdir)
    # Otherwise a foreign page could read this one under its own host name (DNS rebinding).
    names = {host, *LOCAL} if host in LOCAL else None

    pages = {
        "/": lambda: page.whole(seconds),
        "/body": page.body,
        "/report": lambda: page.report.read_text(encoding="utf-8"),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if names and name not in names:
                self.send_error(403)
            elif make := pages.get(self.path):
                try:
                    text = make()
                except (UserError, OSError) as error:  # being written, or missing
                    self.send_error(404 if isinstance(error, FileNotFoundError) else 503)
                    log.debug("%s: %s", self.path, error)
                else:
                    self._answer(text)
            else:
                self.send_error(404)

        def _answer(self, text: str) -> None:
            data = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the page was closed before its answer came
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    try:
        server = http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"--port={port}: cannot listen at {host} ({error.strerror}); choose another port,"
            " or 0 for any free one"
        ) from error
    with server:
        yield server


def run(workdir: Path, host: str, port: int, seconds: float) -> None:
    """Serve the page until interrupted."""
    with serving(workdir, host, port, seconds) as server:
        say(f"serving {workdir} at http://{host}:{server.server_port}/; press Ctrl-C to stop")
        interrupts.end_at_once("stopped serving the page")
        server.serve_forever()
