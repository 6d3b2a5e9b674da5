"""Connections below the protocol: counted from their first byte, and kept from filling the log."""

import asyncio
import logging
from typing import Any

from websockets.asyncio.server import ServerConnection


class Bounded(ServerConnection):
    """A connection that is counted from its first byte on: those who never finish a handshake take descriptors, too."""

    def __init__(self, sockets: set[ServerConnection], most: int, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._sockets = sockets
        self._most = most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hang up at once on one too many."""
        super().connection_made(transport)
        self._sockets.add(self)
        if len(self._sockets) > self._most:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Its place is free."""
        self._sockets.discard(self)
        super().connection_lost(exc)


def quiet() -> logging.Logger:
    """The library reports every broken handshake as an error with a traceback: on a network these are weather. So are
    asyncio's lines about sockets that went, thousands a second while descriptors are short."""
    logging.getLogger("asyncio").addFilter(_is_no_weather)
    logger = logging.getLogger("insula.serve.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


def _is_no_weather(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("socket.send() raised", "socket.accept() out of system resource"))
