"""What `insula serve` does."""

import asyncio
import contextlib
import logging

from insula.certificate.stored import stored_certificate
from insula.policy import Policy
from insula.ports import is_loopback, listen
from insula.runs.folder import CERTIFICATE_FILE
from insula.runs.loading import assets_folder
from insula.serve.config import ServeConfig
from insula.serve.guard import make_guard, make_tls, read_key
from insula.serve.observations import parse_renames
from insula.serve.policy_backend import PolicyBackend
from insula.serve.server import PolicyServer
from insula.serve.worded import BACKENDS

log = logging.getLogger(__name__)


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what is in line and return.

    Raises InputError, FileError or MissingFileError for settings that cannot be used, before the policy is loaded, and
    what `load_model` raises.
    """
    guard = make_guard(config.host, read_key(config.api_key_file))
    tls = make_tls(config.tls_certificate, config.tls_key)
    renames = parse_renames(config.rename)
    if guard.digest is not None and tls is None and not is_loopback(config.host):
        log.warning("without TLS the API key travels as it is; --tls-certificate and --tls-key, or a tunnel")

    server = PolicyServer(
        lambda: load_backend(config),
        guard,
        config.sizes,
        config.max_wait_ms / 1000,
        renames,
        config.max_connections,
        config.idle_s,
        config.subtask_every_s,
    )
    with contextlib.closing(listen(config.host, config.port)) as listening:
        scheme = "ws" if tls is None else "wss"
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"{scheme}://{host}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        asyncio.run(server.run(listening, tls))

    print("stopped", flush=True)


def load_backend(config: ServeConfig) -> PolicyBackend:
    """Raises as `Policy.load`."""
    policy = Policy.load(config.run, config.step, config.seed, config.robot)
    certificate = stored_certificate(assets_folder(config.run, config.step) / CERTIFICATE_FILE)
    return BACKENDS[config.mode](policy, config.run.resolve().name, str(certificate["outcome"]))
