"""Who may connect: the API key, TLS, the Host and Origin of a request, and which addresses need a key."""

import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from live_server import OBSERVATION, Live, Scripted, get, live
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from insula.cli import execute
from insula.client import Client
from insula.client.connection import authorization
from insula.errors import FileError, InputError, MissingFileError, ProtocolError, ServerError
from insula.serve.guard import make_guard, make_tls, read_key

KEY = "a-key-of-tests-0123456789"
WRONG = {
    "nothing": None,
    "an empty header": "",
    "the key alone": KEY,
    "another scheme": f"Basic {KEY}",
    "another key": "Api-Key another-key-of-tests-012",
    "half the key": f"Api-Key {KEY[:-1]}",
    "more than the key": f"Api-Key {KEY}0",
    "the key in capitals": f"Api-Key {KEY.upper()}",
    "a key of letters beyond ASCII": "Api-Key ключ-ключ-ключ-ключ",
}
RIGHT = {"openpi's scheme": f"Api-Key {KEY}", "bearer": f"Bearer {KEY}", "in small letters": f"api-key {KEY}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    with live(Scripted(), key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def unguarded() -> Iterator[Live]:
    with live(Scripted()) as running:
        yield running


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_refused(name: str) -> None:
    assert not make_guard("127.0.0.1", KEY).admits(WRONG[name])


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_key_is_admitted(name: str) -> None:
    assert make_guard("127.0.0.1", KEY).admits(RIGHT[name])


@pytest.mark.parametrize("path", ["/", "/metrics", "/anything"])
def test_pages_need_the_key(guarded: Live, path: str) -> None:
    status, said = get(guarded.http + path)
    assert status == 401 and "Authorization: Api-Key KEY" in said
    assert get(guarded.http + path, {"Authorization": f"Api-Key {KEY}"})[0] == (404 if path == "/anything" else 200)


def test_a_load_balancer_needs_no_key(guarded: Live) -> None:
    assert get(guarded.http + "/healthz") == (200, "OK\n")
    assert get(guarded.http + "/readyz") == (200, "ready\n")


def test_robots_need_the_key(guarded: Live) -> None:
    for key in (None, KEY[:-1]):
        with pytest.raises(ProtocolError, match="an API key is needed"):
            Client(guarded.url, key).connect()

    with Client(guarded.url, KEY) as client:
        assert client.infer(OBSERVATION).actions.shape == (4, 3)


def test_the_key_is_nowhere_to_be_read(guarded: Live, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in a log, nor on a page, nor in what describes the server's objects."""
    with caplog.at_level(logging.DEBUG):
        with Client(guarded.url, KEY) as client:
            client.infer(OBSERVATION)
        get(guarded.http, {"Authorization": f"Api-Key {KEY[:-1]}"})

    pages = [get(guarded.http + path, {"Authorization": f"Api-Key {KEY}"})[1] for path in ("/", "/metrics")]
    guard = make_guard("127.0.0.1", KEY)
    # The client's own library logs the headers it sends at the level of debugging; this is about the server.
    server_log = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("websockets.client"))
    assert KEY not in server_log + "".join(pages) + repr(guard) + repr(vars(guard))


@pytest.mark.parametrize("key", ["kéy-ü-ключ-secret", "a-secret-key\r\nX-Other: 1", "a secret key of words"])
def test_a_key_that_no_header_carries_is_not_shown(key: str) -> None:
    for refused in (lambda: Client("ws://127.0.0.1:1", key), lambda: authorization(key)):
        with pytest.raises(InputError) as caught:
            refused()
        assert "secret" not in str(caught.value)
    assert authorization(f"{KEY}\n") == {"Authorization": f"Api-Key {KEY}"}


@pytest.mark.parametrize(
    "text", ["short", "fifteen-letters", "with a space in its middle", "ключ-ключ-ключ-ключ", "a-tab\tin-its-middle-00"]
)
def test_a_key_that_is_no_good(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(InputError, match="at least 16 printable") as caught:
        read_key(file)
    assert text not in str(caught.value)

    monkeypatch.setenv("INSULA_API_KEY", text)
    with pytest.raises(InputError, match="INSULA_API_KEY: an API key has"):
        read_key(None)


def test_the_key_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("INSULA_API_KEY", "b" * 20)
    assert read_key(tmp_path / "key") == KEY
    assert read_key(None) == "b" * 20

    monkeypatch.delenv("INSULA_API_KEY")
    assert read_key(None) is None
    with pytest.raises(MissingFileError, match="no-such-key"):
        read_key(tmp_path / "no-such-key")


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "robot.lan", "ü.."])
def test_an_address_that_others_reach_needs_a_key(host: str, capsys: pytest.CaptureFixture) -> None:
    """One line, before anything is loaded: the run need not even exist. Control: with a key it is not refused."""
    assert execute(["serve", "no-such-run", "--host", host]) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and f"--host {host}" in said and "--api-key-file" in said

    assert make_guard(host, KEY).digest is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_addresses_of_this_machine_alone_need_none(host: str) -> None:
    assert make_guard(host, None).digest is None


def test_a_short_key_does_not_open_the_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("INSULA_API_KEY", "x")
    assert execute(["serve", "no-such-run", "--host", "0.0.0.0"]) == 1
    assert "at least 16" in capsys.readouterr().err


# --- web pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "192.168.1.5", "", "127.0.0.1.evil.example"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz"])
def test_a_name_that_is_not_this_machine_s_is_not_answered(unguarded: Live, host: str, path: str) -> None:
    """A web page's own name may lead here (DNS rebinding)."""
    assert get(unguarded.http + path, {"Host": host})[0] == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:8000", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are(unguarded: Live, host: str) -> None:
    assert get(unguarded.http, {"Host": host})[0] == 200


@pytest.mark.parametrize("line", ["Host: evil.example", "Authorization: Api-Key x", "Upgrade: websocket"])
def test_a_header_that_is_there_twice_is_a_bad_request(unguarded: Live, line: str) -> None:
    """A proxy may have looked at the first, and the server at the second. Control: once, it is answered."""
    name = line.partition(":")[0]
    for times, status in ((2, b"400"), (1, b"421" if name == "Host" else b"200")):
        with socket.create_connection(("127.0.0.1", unguarded.port)) as raw:
            host = "" if name == "Host" else "Host: localhost\r\n"
            raw.sendall((f"GET /healthz HTTP/1.1\r\n{host}" + f"{line}\r\n" * times + "\r\n").encode())
            assert raw.recv(200).split(b" ")[1] == status


def test_a_path_that_is_none(unguarded: Live) -> None:
    with socket.create_connection(("127.0.0.1", unguarded.port)) as raw:
        raw.sendall(b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(200).split(b" ")[1] == b"400"


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost", "null", "http://127.0.0.1:8000"])
def test_no_web_page_drives_a_robot(unguarded: Live, origin: str) -> None:
    """Browsers send Origin with every WebSocket. Control: without one it connects."""
    with pytest.raises(InvalidStatus, match="403"):
        connect(unguarded.url, origin=origin)
    with connect(unguarded.url) as connection:
        assert connection.recv(timeout=10)


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate for this machine with its key, the authority's, and one of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    names = {name: folder / f"{name}.pem" for name in ("certificate", "key", "authority", "other", "other_key")}
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.cert_chain_pems[0].write_to_path(names["certificate"])
    issued.private_key_pem.write_to_path(names["key"])
    authority.cert_pem.write_to_path(names["authority"])

    other = trustme.CA()
    other.cert_pem.write_to_path(names["other"])
    other.issue_cert("127.0.0.1").private_key_pem.write_to_path(names["other_key"])
    return names


@pytest.fixture(scope="module")
def encrypted(files: dict[str, Path]) -> Iterator[Live]:
    with live(Scripted(), key=KEY, tls=make_tls(files["certificate"], files["key"])) as running:
        yield running


def test_over_tls_with_key_and_authority(encrypted: Live, files: dict[str, Path]) -> None:
    with Client(encrypted.url, KEY, certificate=str(files["authority"])) as client:
        assert client.infer(OBSERVATION).actions.shape == (4, 3)


def test_over_tls_without_the_key(encrypted: Live, files: dict[str, Path]) -> None:
    with pytest.raises(ProtocolError, match="an API key is needed"):
        Client(encrypted.url, certificate=str(files["authority"]), timeout=60.0).connect()


@pytest.mark.parametrize("trusted", [None, "other"])
def test_a_certificate_of_nobody_known_is_not_trusted(encrypted: Live, files: dict[str, Path], trusted: str) -> None:
    with pytest.raises(ServerError, match=r"certificate|CERTIFICATE"):
        Client(encrypted.url, KEY, certificate=trusted and str(files[trusted])).connect()


def test_without_tls_an_encrypted_server_says_nothing(encrypted: Live) -> None:
    with pytest.raises(ServerError):
        Client(encrypted.url.replace("wss", "ws"), KEY, timeout=5).connect()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_old_tls_is_refused(encrypted: Live, files: dict[str, Path]) -> None:
    old = ssl.create_default_context(cafile=files["authority"])
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        connect(encrypted.url, ssl=old, additional_headers={"Authorization": f"Api-Key {KEY}"})


def test_files_that_are_no_certificate_and_key(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both --tls-certificate and --tls-key"):
        make_tls(files["certificate"], None)
    with pytest.raises(MissingFileError, match="no-such"):
        make_tls(tmp_path / "no-such.pem", files["key"])
    with pytest.raises(FileError, match="not a certificate and its private key"):
        make_tls(files["certificate"], files["other_key"])

    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(FileError, match="not a certificate and its private key"):
        make_tls(files["certificate"], tmp_path / "text.pem")

    (tmp_path / "locked.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(FileError, match=r"locked\.pem: has a password"):
        make_tls(files["certificate"], tmp_path / "locked.pem")
    assert make_tls(None, None) is None


def test_the_client_imports_neither_jax_nor_what_else_it_does_not_need() -> None:
    """It runs beside a robot, maybe on a small board."""
    code = (
        "import sys, insula.client; print(sorted(m for m in ('jax', 'orbax', 'mujoco', 'torch') if m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
