"""A blinded study of two checkpoints by fieldtrial (PyPI), with a simulated robot: does the later one do better?

    python scripts/fieldtrial_study.py RUN RUN@STEP --fieldtrial PATH/bin/fieldtrial --folder runs/fieldtrial

fieldtrial randomizes and blinds, and its openpi router sends each trial to the policy server of its arm; this script
starts both servers (`insula serve`), is the robot and the operator who labels, and learns from nobody which arm it is
driving. At the end it unblinds and writes fieldtrial's own report.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium

from insula.client import Client
from insula.worlds.seeds import EVALUATION
from insula.worlds.tabletop import make_tabletop

STUDY = "tabletop"
ARMS = ("first", "second")
HOST = "127.0.0.1"


def study(urls: list[str], router_port: int, scenes: int) -> dict[str, Any]:
    """study.yaml; JSON is YAML."""
    return {
        "fieldtrial": 1,
        "name": STUDY,
        "title": "Two checkpoints on the simulated tabletop",
        "task": {"description": "Put the block that is named into the bowl that is named."},
        "rubric": {"stages": [{"id": "placed", "label": "The right block in the right bowl"}], "success": "placed"},
        "arms": [
            {"id": arm, "runner": "openpi_router", "policy": {"url": url}} for arm, url in zip(ARMS, urls, strict=True)
        ],
        "runners": {"openpi_router": {"listen": f"{HOST}:{router_port}", "metadata": "identical"}},
        "conditions": {"factors": {"scene": {"range": [0, scenes - 1]}}, "replicates": 1},
        "design": {"type": "randomized_block", "order": "random", "blinding": "operator", "seed": 20260101},
        "analysis": {"primary": {"metric": "success", "comparison": {"treatment": ARMS[1], "control": ARMS[0]}}},
    }


class Console:
    """fieldtrial's REST API, of which this needs four calls."""

    def __init__(self, port: int) -> None:
        self.root = f"http://{HOST}:{port}/api/v1/studies/{STUDY}"

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST with a body. Raises RuntimeError with what the server says."""
        headers = {"X-Fieldtrial-Client": "python", "Content-Type": "application/json"}
        headers["Idempotency-Key"] = uuid.uuid4().hex
        raw = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.root + path, raw, headers), timeout=60) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:500]}") from None


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.create_server((HOST, 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def process(*command: str) -> Iterator[None]:
    """Runs beside the block."""
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield
    finally:
        child.terminate()
        child.wait(30)


def wait_for(url: str) -> None:
    """Until it answers with 200."""
    for _ in range(3000):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def drive(client: Client, env: gymnasium.Env, seed: int) -> bool:
    """One episode, two steps of each chunk. Of one scene the noise is the same, whichever arm it is."""
    observation, info = env.reset(seed=seed)
    over, step = False, 0
    while not over:
        chunk = client.infer(observation | {"seed": [seed, step]}).actions
        for action in chunk[:2]:
            observation, _, terminated, truncated, info = env.step(action)
            step += 1
            over = terminated or truncated
            if over:
                break

    return bool(info["success"])


def run_trials(console: Console, router: str) -> int:
    """Every trial of the schedule. Returns how many there were."""
    session = console.call("/sessions", {"operator": "a script", "rig": "simulation", "rig_check": {}})
    name, slot, trials = session["session"]["session_id"], session["up_next"], 0
    with Client(router) as client, contextlib.closing(make_tabletop()) as env:
        while slot is not None:
            assert slot["arm"] is None and slot["policy"] is None, "the study is not blind"
            trial = console.call("/trials", {"slot_id": slot["slot_id"], "session_id": name})

            success = drive(client, env, EVALUATION.start + slot["factors"]["scene"])
            outcome = {"stage": "placed" if success else None, "termination": "success" if success else "timeout"}
            console.call(f"/trials/{trial['trial_id']}/complete", outcome)
            trials += 1
            print(
                f"{slot['seq'] + 1:3d} of {slot['total']}  {slot['blind_code']}  {outcome['termination']}", flush=True
            )
            slot = console.call(f"/sessions/{name}")["up_next"]

    console.call(f"/sessions/{name}/end", {})
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs=2, metavar="RUN[@STEP]")
    parser.add_argument("--fieldtrial", default="fieldtrial")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()

    ports, router_port, console_port = [free_port(), free_port()], free_port(), free_port()
    folder: Path = given.folder / STUDY
    folder.mkdir(parents=True)
    urls = [f"ws://{HOST}:{port}" for port in ports]
    (folder / "study.yaml").write_text(json.dumps(study(urls, router_port, given.scenes), indent=1))
    fieldtrial = lambda *words: subprocess.run([given.fieldtrial, *words], check=True)  # noqa: E731

    with contextlib.ExitStack() as stack:
        for arm, port in zip(given.arms, ports, strict=True):
            run, _, step = arm.partition("@")
            command = [sys.executable, "-m", "insula", "serve", run, "--port", str(port), "--max-batch", "1"]
            stack.enter_context(process(*command, *(["--step", step] if step else [])))
        for port in ports:
            wait_for(f"http://{HOST}:{port}/readyz")

        fieldtrial("validate", str(folder))
        fieldtrial("lock", str(folder))
        fieldtrial("check-runners", str(folder))
        stack.enter_context(process(given.fieldtrial, "serve", str(folder), "--port", str(console_port)))
        wait_for(f"http://{HOST}:{console_port}/api/v1/studies/{STUDY}")

        trials = run_trials(Console(console_port), f"ws://{HOST}:{router_port}")
    assert trials == 2 * given.scenes, f"{trials} trials"

    fieldtrial("unblind", str(folder), "--yes")
    for kind in ("html", "md"):
        fieldtrial("report", str(folder), "--format", kind)
    print((folder / "reports" / "report.md").read_text())


if __name__ == "__main__":
    main()
