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

from insula.errors import InputError, InsulaError
from insula.inspection.findings import Inspector
from insula.inspection.sample_page import render_sample

HOST = "127.0.0.1"


def make_app(inspector: Inspector, source: str | None = None, number: int = 0) -> Starlette:
    """`GET /?source=NAME&sample=N`, `source` and `number` unless asked otherwise. What does not exist is one line and
    404.

    Other names than this machine's are refused, so that no web page elsewhere can read samples through a name of its
    own that leads here.
    """
    # A request is answered on a thread of its own.
    subject = inspector.subject
    busy = threading.Lock()
    sources = {name: len(samples) for name, samples in subject.sources.items()}

    def show(request: Request) -> Response:
        asked = request.query_params
        try:
            wanted = _whole(asked.get("sample", str(number)))
            with busy:  # a decoder and a cache are not made for two readers at once
                found = inspector.look(wanted, asked.get("source", source))
        except InsulaError as error:
            return PlainTextResponse(f"insula: {error}\n", status_code=404)

        # A page belongs to the weights and the sample of this moment, and is made again in a second or two.
        return HTMLResponse(render_sample(found, sources), headers={"Cache-Control": "no-store"})

    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Route("/", show)], middleware=[trusted])


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"sample is {text[:40]!r}, expected a whole number") from None


def serve_samples(inspector: Inspector, source: str | None, number: int, listening: socket.socket) -> None:
    """Serve at a socket of this machine until Ctrl-C; the address is printed."""
    app = make_app(inspector, source, number)
    config = uvicorn.Config(app, log_level="warning", lifespan="off")

    # By the socket's own number: port 0 became one that only the system knows.
    print(f"http://{HOST}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
