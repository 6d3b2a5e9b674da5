"""What a killed training, damaged files and a failing disk end with: a few of each, for real."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import difference

from insula.checkpoints.snapshot import snapshot
from insula.checkpoints.store import CheckpointStore
from insula.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
STATE = {"w": np.arange(12.0, dtype=np.float32).reshape(3, 4), "n": np.int32(3)}


def test_a_dozen_faults() -> None:
    """Kills, damages and a disk that fails. `make faults` does 250 of them."""
    few = ["--kills", "1", "--damages", "10", "--disks", "1", "--steps", "20", "--seed", "1"]
    command = [sys.executable, "benchmarks/train_faults.py", *few]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")  # as a user trains
    environment = os.environ | {"XLA_FLAGS": flags}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "every promise was kept" in found.stdout
    assert "1 kills" in found.stdout and "10 damages" in found.stdout and "10 found" in found.stdout


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_snapshot_stays_when_the_state_is_donated(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was, also in pieces on a mesh; of an accelerator in the memory of its host. Control: the state goes."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    state = {"w": jax.device_put(STATE["w"], split), "n": jnp.asarray(STATE["n"])}
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    kept = snapshot(state)
    after = update(update(state))
    assert state["w"].is_deleted()
    assert difference(kept, STATE) == 0.0 and difference(after["w"], STATE["w"]) == 2.0
    place = kept["w"].sharding
    assert place == (split if backend == "cpu" else split.with_memory_kind("pinned_host"))


def test_a_save_that_fails_is_told_once_and_earlier_steps_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next look, or at the next save: the caller went on meanwhile."""
    tree = jax.tree.map(jnp.asarray, STATE)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(1, tree, dict, lambda folder: None)
        store.wait()
        store.check()

        def fail(*_: object, **__: object) -> None:
            raise ValueError("Error writing \"w\": Failed to write 9 bytes [os_error_code='28']")

        with monkeypatch.context() as patch:
            patch.setattr(store._manager, "save", fail)
            store.save(2, tree, dict, lambda folder: None)
            with pytest.raises(CheckpointError, match=r"step 2 cannot be written \(No space left on device\); earlier"):
                store.save(3, tree, dict, lambda folder: None)
        store.check()
        assert store.latest() == 1
        assert difference(store.restore("params", tree), STATE) == 0.0
