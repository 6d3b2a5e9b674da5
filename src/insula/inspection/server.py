"""`insula inspect --serve`: the page of any sample, on this machine alone."""

import socket
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from insula.errors import FileError, InputError
from insula.inspection.findings import Inspector
from insula.inspection.page import render

HOST = "127.0.0.1"


def application(inspector: Inspector, source: str | None = None, number: int = 0) -> Starlette:
    """`GET /?source=NAME&sample=N`, the first time `source` and `number`. What does not exist is one line and 404.

    Other names than this machine's are refused, so that no web page elsewhere can read samples through a name of its
    own that leads here.
    """
    subject, busy = inspector.subject, threading.Lock()
    sources = {name: len(samples) for name, samples in subject.sources.items()}

    def show(request: Request) -> Response:
        asked = request.query_params
        try:
            wanted = _whole(asked.get("sample", str(number)))
            with busy:  # a decoder and a cache are not made for two readers at once
                found = inspector.look(wanted, asked.get("source", source))
        except (ValueError, IndexError, OSError) as error:
            return PlainTextResponse(f"insula: {error}\n", status_code=404)
        return HTMLResponse(render(found, sources), headers={"Cache-Control": "no-store"})

    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Route("/", show)], middleware=[trusted])


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"sample is {text[:40]!r}, expected a whole number") from None


def serve(inspector: Inspector, source: str | None, number: int, port: int) -> None:
    """Until Ctrl-C. Raises OSError where the port is taken."""
    app = application(inspector, source, number)
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise FileError(f"port {port} of {HOST}: {error.strerror}; --port 0 takes a free one") from None
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    print(f"http://{HOST}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
