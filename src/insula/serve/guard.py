"""Who may connect, and under which limits. See docs/serving.md for what each of them is against."""

import hashlib
import hmac
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from insula.client.connection import KEY_VARIABLE
from insula.errors import FileError, InputError
from insula.files import read_bytes
from insula.ports import is_loopback

SHORTEST_KEY = 16
"""Characters: shorter ones can be guessed over a network."""
_SCHEMES = ("api-key", "bearer")


@dataclass(frozen=True)
class Guard:
    """Holds only a digest of the key, so that no log or traceback can show it."""

    digest: bytes | None
    host: str

    def admits(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries the key ("Api-Key KEY" or "Bearer KEY"); always where there is
        none."""
        if self.digest is None:
            return True

        scheme, _, key = (authorization or "").partition(" ")
        # Digests are compared, in constant time: neither the key nor its length shows in how long it takes.
        right = hmac.compare_digest(_digest(key.strip()), self.digest)
        return right and scheme.lower() in _SCHEMES

    def knows(self, host: str | None) -> bool:
        """Whether a request's Host may be answered. A server for this machine alone answers to its names alone, so that
        a web page cannot reach it through a name of its own that leads here."""
        if not is_loopback(self.host):
            return True

        name = (host or "").rsplit(":", 1)[0] if not (host or "").endswith("]") else (host or "")
        return is_loopback(name.strip("[]"))


def read_key(file: Path | None) -> str | None:
    """The API key of a file, or of the environment. Never of a flag, which every user of the machine could read.

    Raises InputError for a short one, FileError or MissingFileError as `read_bytes`.
    """
    if file is not None:
        key, where = read_bytes(file, 4096).decode("utf-8", "replace").strip(), str(file)
    else:
        key, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if not key:
            return None

    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"{where}: an API key has at least {SHORTEST_KEY} printable ASCII characters without spaces; make one with "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )

    return key


def make_guard(host: str, key: str | None) -> Guard:
    """Raises InputError where others could connect and there is no key."""
    if key is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: others can connect there, so a key is needed: --api-key-file FILE, or {KEY_VARIABLE}. "
            "127.0.0.1 is for this machine alone"
        )

    return Guard(_digest(key) if key else None, host)


def make_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Raises InputError where one of the two is missing, FileError where they are not a certificate and its key."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError("TLS needs both --tls-certificate and --tls-key")

    for file in (certificate, key):
        raw = read_bytes(file, 2**20)  # what is missing is named, which the library does not
        if b"ENCRYPTED" in raw:
            raise FileError(f"{file}: has a password, and a service cannot be asked; openssl pkey writes it without")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A key with a password would be asked for on a terminal that a service does not have.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise FileError(f"{certificate}, {key}: not a certificate and its private key, in PEM ({reason})") from None

    return context


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
