"""Sockets to listen at."""

import ipaddress
import socket

from insula.errors import FileError, InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine; port 0 takes a free one. Raises InputError for what is no port or
    address, FileError where it is taken."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535; 0 takes a free one")

    # Made here and not by a server library, which would exit the process where the port is taken.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (socket.gaierror, UnicodeError, TypeError):  # some names have no encoding
        raise InputError(f"--host {host}: no address of this machine") from None
    except OSError as error:
        raise FileError(f"port {port} of {host}: {error.strerror}; --port 0 takes a free one") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there. A name that is not localhost counts as reachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
