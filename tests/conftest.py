"""Every test runs on CPU, with compiled programs kept between runs, shapes checked, and the network closed."""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # initializing is many small programs
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs that run a few times are compiled quickly rather than well: half of the suite's time was compilation.
# Eight devices out of one CPU, so that sharding is tested on any machine. Flags that are set already stay and win.
QUICK_FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_force_host_platform_device_count": "8",
}
given = os.environ.get("XLA_FLAGS", "")
missing = (f"{flag}={value}" for flag, value in QUICK_FLAGS.items() if flag not in given)
os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])

import jax
import jaxtyping
import numpy as np
import pytest
from beartype import beartype

DTYPE_PROMOTION = "standard"
"""JAX's dtype promotion under test: "strict" once every model dtype is spelled out."""

jax.config.update("jax_numpy_dtype_promotion", DTYPE_PROMOTION)
# [B] + [B, H] is an error under test: whoever means it writes the axes, and a forgotten axis cannot pass for a shape.
jax.config.update("jax_numpy_rank_promotion", "raise")


def check_calls(function: Callable) -> Callable:
    """beartype on all but constructors: a pytree is rebuilt with anything in its leaves, a spec, a mask, a None."""
    return function if function.__name__ == "__init__" else beartype(function)


# Annotations of the package are checked at every call from here on (inside jit: once, while tracing).
jaxtyping.install_import_hook("insula", "conftest.check_calls")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as a user makes them, annotations unchecked: for tests of our own errors about wrong shapes and types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test downloads anything: only this machine can be reached."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    here = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}

    def refuse(host: object) -> None:
        if (host.decode() if isinstance(host, bytes) else host) not in here:
            raise ConnectionRefusedError(f"tests stay on this machine, but this one wants to reach {host!r}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):  # a Unix socket's address is a path
            refuse(address[0])
        return connect(self, address)

    def guarded_resolve(host: Any, *rest: Any, **options: Any) -> Any:
        refuse(host)
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Files released by others (FAST+ and the like), beside the repository or at $INSULA_REFERENCE."""
    path = Path(os.environ.get("INSULA_REFERENCE", ROOT.parent / "shared" / "reference"))
    if not path.is_dir():
        pytest.skip(f"no reference files at {path}; set INSULA_REFERENCE to where they are")
    return path


@pytest.fixture
def rng() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def np_rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The config of the `tiny` preset."""
    from insula.model.config import preset

    return preset("tiny")


LONGEST = ("test_train_faults.py", "test_processes.py", "test_run.py", "test_sharding.py")
"""Files that take minutes: one that is begun last keeps a single core busy while the others have nothing left.
pytest-xdist would put those with the most tests first; `make test` tells it not to."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)  # stable: all else stays in its order


# Tracing makes objects by the million, and Python would look again and again through those of the imports for some that
# it can free: a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish() -> None:
    """What is imported by now stays."""
    gc.collect()
    gc.freeze()
