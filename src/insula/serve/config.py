"""Everything `insula serve` can be told."""

import dataclasses
from pathlib import Path

import tyro

from insula.checks import check_integer, check_number, check_seed
from insula.errors import InputError
from insula.policy.modes import Mode

LARGEST_BATCH = 256
SUBTASK_EVERY_S = 1.0


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serve a trained policy over openpi's WebSocket protocol, to one robot or to several at once. Beside it are
    /healthz, /readyz, /metrics, and a page at /. Raises InputError for values that cannot be."""

    run: tyro.conf.Positional[Path]
    """Folder that `insula train` wrote, or a policy from `insula convert --to insula`."""
    step: int | None = None
    """Checkpoint to serve; the newest unless given."""
    robot: str | None = None
    """Which one to act for, where the run was trained on several."""
    mode: Mode = Mode.FLOW
    """flow; tokens: FAST tokens decoded to chunks; subtask: say the subtask, then act on it by flow."""
    subtask_every_s: float = SUBTASK_EVERY_S
    """In mode subtask: seconds after which a robot's subtask is said again, while it acts on the last one."""
    seed: int = 0
    """Of the policy's noise."""
    host: str = "127.0.0.1"
    """Address to listen at. Any that others can reach needs an API key."""
    port: int = 8000
    """0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that clients must send; the environment's INSULA_API_KEY otherwise."""
    tls_certificate: Path | None = None
    """PEM file of a certificate (and its chain): clients connect to wss://."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    max_batch: int = 8
    """Requests answered by one call at most. 1, 2, 4, … up to it are compiled before the server is ready."""
    max_wait_ms: float = 5.0
    """How long a request waits for those of other connected robots. With one robot nothing waits."""
    rename: tuple[str, ...] = ()
    """Your robot's names, as NAME=images.CAMERA, NAME=state (several are joined in this order) or NAME=task."""
    max_connections: int = 64
    """Robots connected at once; more are answered with 503."""
    idle_s: float = 3600.0
    """A connection without a request for this long is closed."""

    def __post_init__(self) -> None:
        check_integer("port", self.port, 0, 65535)
        check_integer("max_batch", self.max_batch, 1, LARGEST_BATCH)
        check_integer("max_connections", self.max_connections, 1, 4096)
        check_number("max_wait_ms", self.max_wait_ms, "from 0 to 1000", lambda ms: 0 <= ms <= 1000)
        check_number("idle_s", self.idle_s, "≥ 1", lambda seconds: seconds >= 1)
        check_number("subtask_every_s", self.subtask_every_s, "≥ 0", lambda seconds: seconds >= 0)
        check_seed("seed", self.seed)
        if self.mode is not Mode.SUBTASK and self.subtask_every_s != SUBTASK_EVERY_S:
            raise InputError("--subtask-every-s is for --mode subtask: in others none is said")
        if not self.host:  # the library would take it for every address
            raise InputError("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every address")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes to compile: powers of two below `max_batch`, and it."""
        powers = [2**power for power in range(self.max_batch.bit_length())]
        return tuple(sorted({*(size for size in powers if size < self.max_batch), self.max_batch}))
