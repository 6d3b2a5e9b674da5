"""A policy server in a process of its own, for the examples beside this one; by itself it asks for one chunk.

python examples/policy_server.py [RUN]        RUN: what `insula train` wrote; runs/quick/run, of `insula demo --quick`
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from insula.client import Client


@contextlib.contextmanager
def serving(run: Path) -> Iterator[str]:
    """The same as `insula serve RUN` in another terminal; yields its address once it answers."""
    if not run.exists():
        sys.exit(f"{run}: no such run; make one with `insula demo --quick`, or name yours")

    command = [sys.executable, "-m", "insula", "serve", str(run), "--port", "0", "--max-batch", "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()
        if not address:
            sys.exit("the server did not start; it says why above")

        with Client(address[0], timeout=120.0) as client:
            client.connect()  # the server says hello once everything is compiled
        yield address[0]
    finally:
        server.terminate()
        server.wait()


def main(run: Path) -> None:
    with serving(run) as url, Client(url) as client:
        told = client.metadata
        picture = np.zeros((told["image_size"], told["image_size"], 3), np.uint8)
        reply = client.infer(
            {
                "images": dict.fromkeys(told["cameras"], picture),
                "state": np.zeros(told["state_dim"], np.float32),
                "task": "put the red block in the blue bowl",
            }
        )
        print(f"{told['robot']}: {len(reply.actions)} actions after {reply.round_trip_ms:.1f} ms\n{reply.actions}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quick/run"))
