"""One update, many updates, and what survives an interruption: optimizers per part, checkpoints, the loop."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, by_leaf, difference, jit, largest, model

from insula.checkpoints.seal import SEAL_FILE, UNSEALED, add_to_seal, find_damage
from insula.checkpoints.store import CheckpointStore
from insula.errors import CheckpointError, FileError, NonFiniteError
from insula.losses import count_scored, draw, share_of_loss
from insula.model.params import Params
from insula.train.loop import Every, MetricsLog, run_loop
from insula.train.optimizer import DEFAULT, OptimizerConfig, make_optimizer
from insula.train.step import TrainState, make_train_state, make_train_step, value_and_gradients

SETTINGS = OptimizerConfig(warmup_steps=1, ema_decay=0.9)


def training(**objective: object):
    """A step function, and a state to start from."""
    config = SMALL.with_objective(**objective)
    params, batch = model(config)
    optimizer = make_optimizer(SETTINGS, config, 10)
    step = jit(make_train_step(config, optimizer, SETTINGS.ema_decay, jax.random.key(1)))
    return step, lambda: make_train_state(jax.tree.map(jnp.copy, params), optimizer), batch


@pytest.fixture(scope="module")
def usual():
    return training()


def run(step, state: TrainState, batch, steps: int) -> TrainState:
    for _ in range(steps):
        state, _ = step(state, batch)
    return jax.device_get(state)


def test_a_step_moves_every_part_and_reports(usual) -> None:
    step, start, batch = usual
    before = jax.device_get(start().params)
    state, metrics = step(start(), batch)  # the warm-up starts at zero
    state, metrics = step(state, batch)
    for part in ("vision", "backbone", "expert"):
        assert difference(getattr(state.params, part), getattr(before, part)) > 0
        assert float(metrics[f"gradient_norm/{part}"]) > 0
    assert int(state.step) == 2
    assert float(metrics["total"]) == pytest.approx(float(metrics["flow"] + metrics["fast"]), rel=1e-6)


@pytest.mark.parametrize("max_delay", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_of_a_batch_add_up_to_its_update(max_delay: int) -> None:
    """Four parts of eight samples, which score differing numbers of tokens and of steps, are one batch of 32. Control:
    the mean of the parts' means is not."""
    config = SMALL.with_objective(rtc_max_delay=max_delay, flow_samples=2)
    params, batch = model(config, batch_size=32)
    tokens = jnp.arange(32)[:, None] % 7  # the last of each fourth sample are many, of the others few
    batch = dataclasses.replace(
        batch,
        loss_mask=batch.loss_mask & ((jnp.arange(32)[:, None] % 4 == 3) | (tokens > 4)),
        action_is_pad=jnp.arange(config.horizon)[None] > jnp.arange(32)[:, None] % 4,
    )
    draws = draw(config, 32, jax.random.key(1))
    scored = [int(jnp.sum(batch.loss_mask[i::4])) for i in range(4)]
    assert len(set(scored)) > 1

    def update(parts: int) -> Any:
        run = jit(lambda p: value_and_gradients(share_of_loss, p, config, batch, draws, parts))
        (total, metrics), gradients = run(params)
        return {"total": total} | metrics, gradients

    (metrics, whole), (added, found) = update(1), update(4)
    for name, value in metrics.items():
        assert float(added[name]) == pytest.approx(float(value), rel=1e-6), name
    size = float(optax.tree.norm(whole))
    off = jax.tree.map(jnp.subtract, found, whole)
    assert float(optax.tree.norm(found)) == pytest.approx(size, rel=1e-6)
    # Entry by entry, sums over 600 rows are made in other orders: eps · √600 is 3e-6.
    assert float(optax.tree.norm(off)) < 1e-5 * size

    # And what it is for: the parameters after the third update, of those after whole batches.
    optimizer = make_optimizer(DEFAULT, config, 100)

    @jit
    def after(gradients: Any) -> Any:
        state, moved = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, moved)
            moved = optax.apply_updates(moved, updates)
        return moved

    def distance(one: Any, other: Any) -> float:
        apart = by_leaf(jax.tree.map(jnp.subtract, one, other))
        # Softmax does not see it: its gradient is rounding, of which Adam makes steps.
        del apart["vision.layers.key.bias"]
        return float(optax.tree.norm(apart)) / float(optax.tree.norm(params))

    assert distance(after(whole), after(found)) < 1e-6
    assert distance(after(whole), params) > 1e-4

    means = []
    for i in range(4):
        part, drawn = jax.tree.map(lambda x, i=i: x[i::4], (batch, draws))
        counts = count_scored(part, drawn)
        of_part = jit(jax.grad(share_of_loss, has_aux=True), static_argnums=1)
        means.append(of_part(params, config, part, drawn, counts)[0])
    assert difference(jax.tree.map(lambda *parts: sum(parts) / 4, *means), whole) > 1e-2 * size


def test_a_frozen_backbone_stays_bit_for_bit() -> None:
    step, start, batch = training(freeze_backbone=True, ki_fast_loss_weight=0.0)
    before = jax.device_get(start().params)
    state = run(step, start(), batch, 3)
    assert difference((state.params.vision, state.params.backbone), (before.vision, before.backbone)) == 0.0
    assert difference(state.params.expert, before.expert) > 0


def test_the_average_follows_the_parameters(usual) -> None:
    """Short memory while all is new: decay min(0.9, (1 + n) / (10 + n))."""
    step, start, batch = usual
    state, average = start(), jax.device_get(start().params)
    for n in range(3):
        state, _ = step(state, batch)
        decay = min(SETTINGS.ema_decay, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    assert difference(state.ema_params, average) < 1e-6 < difference(state.ema_params, state.params)


def test_two_runs_are_the_same(usual) -> None:
    """Control: one more step."""
    step, start, batch = usual
    first, second = run(step, start(), batch, 3), run(step, start(), batch, 3)
    assert difference(first, second) == 0.0 < difference(first.params, run(step, start(), batch, 4).params)


def updates_for(optimizer, gradient: Params, params: Params, steps: int = 2) -> Params:
    @jit
    def go(gradient, params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(gradient, state, params)
        return updates

    return go(gradient, params)


def test_a_huge_backbone_gradient_does_not_throttle_the_expert() -> None:
    """Clipping and optimizer per part. Control: one clipping for all parts does throttle it."""
    params, _ = model()
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), params)
    huge = dataclasses.replace(gradient, backbone=jax.tree.map(lambda leaf: 1e6 * leaf, gradient.backbone))
    ours = make_optimizer(dataclasses.replace(SETTINGS, warmup_steps=0), SMALL, 10)
    a, b = (updates_for(ours, g, params) for g in (gradient, huge))
    assert difference(a.expert, b.expert) == 0.0 < largest(a.expert)
    # SGD shows what Adam's normalization would hide.
    shared = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    a, b = (updates_for(shared, g, params) for g in (gradient, huge))
    assert largest(b.expert) < 1e-3 * largest(a.expert)


def test_a_part_is_clipped_by_its_own_norm() -> None:
    """Adam hides a constant scale, but not a gradient that grows a hundredfold; clipped, both are the same to it."""
    params, _ = model()
    small_gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1.0), params)

    def second_update(clip: float):
        optimizer = make_optimizer(
            dataclasses.replace(SETTINGS, clip_norm=clip, warmup_steps=0, weight_decay=0.0), SMALL, 10
        )

        @jit
        def go(gradient, params):
            _, state = optimizer.update(gradient, optimizer.init(params), params)
            return optimizer.update(jax.tree.map(lambda leaf: 100 * leaf, gradient), state, params)[0]

        return go(small_gradient, params)

    assert largest(second_update(1e9).expert) < 0.9 * largest(second_update(1.0).expert)


def test_weight_decay_moves_matrices_only() -> None:
    """Without a gradient, what moves is what decays. Ten layers: a stack of vectors must not pass for a matrix."""
    deep = dataclasses.replace(SMALL.backbone, depth=10)
    config = dataclasses.replace(SMALL, backbone=deep, expert=dataclasses.replace(SMALL.expert, depth=10))
    params, _ = model(config)
    optimizer = make_optimizer(dataclasses.replace(SETTINGS, warmup_steps=0), config, 10)
    updates = by_leaf(updates_for(optimizer, jax.tree.map(jnp.zeros_like, params), params))
    still = {name for name, update in updates.items() if not update.any()}
    vectors = {name for name in updates if "norm" in name or name.endswith("bias") or name == "vision.position"}
    assert still == vectors and len(vectors) < len(updates)


@pytest.fixture(scope="module")
def saved(usual, tmp_path_factory: pytest.TempPathFactory):
    """A store with the state after two steps, and that state."""
    step, start, batch = usual
    state = run(step, start(), batch, 2)
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with CheckpointStore(directory) as store:
        store.save(
            2,
            state,
            lambda state: state.ema_params,
            lambda path: (path / "note.txt").write_text("all that travels") and None,
        )
    return directory, state


def test_a_restored_run_continues_bit_for_bit(usual, saved) -> None:
    step, start, batch = usual
    directory, state = saved
    with CheckpointStore(directory) as store:
        assert store.latest() == 2 and (store.assets() / "note.txt").read_text() == "all that travels"
        restored = store.restore("train_state", start())
        assert difference(store.restore("params", start().params), state.ema_params) == 0.0
    assert difference(restored, state) == 0.0
    assert difference(run(step, restored, batch, 2), run(step, start(), batch, 4)) == 0.0


def test_another_model_and_another_step_are_refused(saved) -> None:
    directory, _ = saved
    other = model(dataclasses.replace(SMALL, action_dim=5))[0]
    with CheckpointStore(directory) as store:
        with pytest.raises(CheckpointError, match="2/params"):
            store.restore("params", other)
        with pytest.raises(CheckpointError, match="no checkpoint at step 7; there are: 2"):
            store.restore("params", other, step=7)
    with CheckpointStore(directory.parent / "empty") as store, pytest.raises(CheckpointError, match="none"):
        store.restore("params", other)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for position in range(len(data) // 4, 3 * len(data) // 4, 97):
        data[position] ^= 0xFF
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named(damage, usual, saved, tmp_path: Path) -> None:
    """The largest file of the training state: flipped bytes, half of it, or none of it."""
    _, start, _ = usual
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    shards = [path for path in (tmp_path / "checkpoints" / "2" / "train_state").rglob("*") if path.is_file()]
    damage(max(shards, key=lambda path: path.stat().st_size))
    with (
        CheckpointStore(tmp_path / "checkpoints") as store,
        pytest.raises(CheckpointError, match="checkpoints/2/train_state"),
    ):
        store.restore("train_state", start())


def flip_one_bit(path: Path, where: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)


def test_every_file_of_a_checkpoint_is_sealed(saved, tmp_path: Path) -> None:
    """Two hundred single bits anywhere, files cut short, gone or longer, and one too many: all found, and nothing where
    nothing is wrong. `sha256sum` reads the same sums."""
    folder = tmp_path / "2"
    shutil.copytree(saved[0] / "2", folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE)
    assert {"params", "train_state", "assets"} <= {path.relative_to(folder).parts[0] for path in files}
    assert find_damage(folder) is None
    assert subprocess.run(["sha256sum", "-c", "--quiet", SEAL_FILE], cwd=folder, check=False).returncode == 0

    rng = np.random.default_rng(0)
    filled = [path for path in files if path.stat().st_size]
    for n in range(200):
        path = filled[n % len(filled)]
        before = path.read_bytes()
        flip_one_bit(path, rng.uniform(), int(rng.integers(8)))
        assert find_damage(folder) == f"{path.relative_to(folder)} has changed"
        path.write_bytes(before)
    for damage in (truncate, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"x")):
        before = filled[0].read_bytes()
        damage(filled[0])
        assert find_damage(folder) is not None
        filled[0].write_bytes(before)
    assert find_damage(folder) is None
    (folder / "assets" / "more.json").write_text("{}")
    assert find_damage(folder) == "assets/more.json was not there when it was sealed"
    assert find_damage(folder, {"params"}) is None


def test_a_pipe_among_the_files_is_not_waited_for(saved, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "2", tmp_path / "2")
    note = tmp_path / "2" / "assets" / "note.txt"
    note.unlink()
    os.mkfifo(note)
    with pytest.raises(FileError, match="is a named pipe"):
        find_damage(tmp_path / "2")


@pytest.mark.parametrize("text", ["", "hello", "00  x"])
def test_a_seal_that_is_none_is_damage(saved, tmp_path: Path, text: str) -> None:
    shutil.copytree(saved[0] / "2", tmp_path / "2")
    (tmp_path / "2" / SEAL_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="no list of SHA-256 sums"):
        find_damage(tmp_path / "2")


def test_a_file_that_comes_later_is_sealed_too(saved, tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.add_file(2, "late.txt", lambda path: path.write_text("late"))
    assert find_damage(tmp_path / "checkpoints" / "2") is None
    (tmp_path / "checkpoints" / "2" / "assets" / "late.txt").write_text("last")
    assert find_damage(tmp_path / "checkpoints" / "2") == "assets/late.txt has changed"


@pytest.mark.parametrize("instant", range(4))
def test_whoever_is_killed_while_a_file_is_added_leaves_a_whole_checkpoint(saved, instant: int, tmp_path: Path) -> None:
    """In the writing, before the seal, before the name, or with no seal at all: nothing is called damaged, and the file
    is there where it was sealed."""
    folder = tmp_path / "checkpoints" / "2"
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    late = folder / "assets" / "late.txt"
    unsealed = late.with_name(f"late.txt{UNSEALED}")
    if instant == 0:
        unsealed.with_name(f"{unsealed.name}.partial").write_text("la")
    elif instant == 1:
        unsealed.write_text("late")
    elif instant == 2:
        add_to_seal(folder, late, lambda path: path.write_text("late"))
        late.rename(unsealed)
    else:
        (folder / SEAL_FILE).unlink()

    assert find_damage(folder) is None
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.set_damaged_aside(tmp_path / "damaged") == 2
    assert find_damage(folder) is None and (folder / SEAL_FILE).is_file()
    assert late.exists() == (instant == 2)
    assert not list(folder.rglob(f"*{UNSEALED}*"))


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    tree = {"w": jnp.zeros(3)}
    with CheckpointStore(tmp_path, keep=2, keep_every=4) as store:
        for step in range(1, 9):
            store.save(step, tree, dict, lambda path: None)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [4, 7, 8]


# The loop knows nothing of models: a counter will do.


def counter(*bad_steps: int):
    def step(state: TrainState, batch: float):
        n = int(state.step) + 1
        metrics = {"total": jnp.asarray(batch), "flow": jnp.asarray(np.nan if n in bad_steps else 1.0)}
        return dataclasses.replace(state, step=jnp.asarray(n, jnp.int32)), metrics

    return step, TrainState(jnp.zeros((), jnp.int32), (), (), ())  # type: ignore[arg-type]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches():
    n = 0
    while True:
        n += 1
        yield float(n)


def test_the_loop_logs_means_and_calls_hooks(tmp_path: Path, unchecked: None) -> None:
    step, state = counter()
    called: list[int] = []
    hook = Every(2, lambda state: called.append(int(state.step)) or {"held_out/flow": 0.5})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    state, complete = run_loop(state, step, batches(), 5, log, 2, (hook,), quiet=True)
    log.close()
    assert complete and int(state.step) == 5 and called == [2, 4, 5]
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [2, 2, 4, 4, 5, 5]
    assert [row["total"] for row in found if "total" in row] == [1.5, 3.5, 5.0]


def test_what_is_kept_outlives_the_next_update(tmp_path: Path, unchecked: None) -> None:
    """Control: a state that is not has been given away."""
    update = jax.jit(lambda state, batch: (dataclasses.replace(state, step=state.step + 1), {}), donate_argnums=0)
    given: list[TrainState] = []
    kept: list[TrainState] = []
    hooks = (Every(1, given.append), Every(1, kept.append, kept=True))
    start = TrainState(jnp.zeros((), jnp.int32), jnp.ones(3), (), ())  # type: ignore[arg-type]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        run_loop(start, update, batches(), 3, log, 5, hooks, quiet=True)
    assert [int(state.step) for state in kept] == [1, 2, 3]
    assert [state.step.is_deleted() for state in given] == [True, True, False]


@pytest.mark.parametrize(("bad_step", "hook_every"), [(3, 100), (4, 100), (3, 3)])
def test_nan_ends_training_and_is_named(tmp_path: Path, unchecked: None, bad_step: int, hook_every: int) -> None:
    """Metric and step, though metrics are fetched later; and no hook, such as a checkpoint, sees that state."""
    bad = range(bad_step, bad_step + 4)
    step, state = counter(*bad)
    called: list[int] = []
    told: list[int] = []
    hook = Every(hook_every, lambda state: called.append(int(state.step)))
    with pytest.raises(NonFiniteError, match=f"flow is nan at step {bad[-1]}, the update was skipped as the 3 before"):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        run_loop(state, step, batches(), 20, log, 5, (hook,), quiet=True, on_skipped=told.append)
    assert told == list(bad) and max(called, default=0) < bad[-1]
    assert rows(tmp_path / "metrics.jsonl")[-1] == {"step": bad[-1], "total": bad[-1], "flow": "nan"}


def test_one_bad_update_is_passed_over(tmp_path: Path, unchecked: None, caplog: pytest.LogCaptureFixture) -> None:
    """It has a line of its own, and is in no mean. Three apart from each other are no reason to end."""
    step, state = counter(2, 3, 5, 7, 8, 9)
    told: list[int] = []
    log = MetricsLog(tmp_path / "metrics.jsonl")
    state, complete = run_loop(state, step, batches(), 10, log, 5, quiet=True, on_skipped=told.append)
    assert complete and told == [2, 3, 5, 7, 8, 9] and "flow is nan at step 5; the update was skipped" in caplog.text
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["total"] for row in found if "step_seconds" in row] == [2.5, 8.0]  # of 1 and 4, of 6 and 10
    assert [row["step"] for row in found if row["flow"] == "nan"] == told


def test_an_update_that_is_not_finite_changes_nothing(usual) -> None:
    """But the step. Control: the same update of whole numbers changes every part."""
    step, start, batch = usual
    state, _ = step(start(), batch)
    before = jax.device_get(state)
    broken = dataclasses.replace(batch, actions=batch.actions.at[0, 0, 0].set(jnp.nan))
    after, metrics = step(state, broken)
    assert np.isnan(metrics["flow"]) and int(after.step) == int(before.step) + 1
    assert difference(dataclasses.replace(jax.device_get(after), step=before.step), before) == 0.0
    assert difference(step(after, batch)[0].params, before.params) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_after_the_running_update(tmp_path: Path, unchecked: None, number: int) -> None:
    step, state = counter()
    before = signal.getsignal(number)
    hook = Every(3, lambda state: os.kill(os.getpid(), number))
    state, complete = run_loop(state, step, batches(), 50, MetricsLog(tmp_path / "m.jsonl"), 5, (hook,), quiet=True)
    assert not complete and int(state.step) == 3
    assert signal.getsignal(number) is before


def test_nan_before_an_interruption_is_no_state_to_keep(tmp_path: Path, unchecked: None) -> None:
    step, state = counter(2, 3, 4, 5)

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)

    def stepping(state, batch):
        if int(state.step) == 5:
            interrupt(None)
        return step(state, batch)

    with pytest.raises(NonFiniteError, match="at step 5"):
        run_loop(state, stepping, batches(), 50, MetricsLog(tmp_path / "m.jsonl"), 20, quiet=True)


def test_a_second_interruption_ends_at_once(tmp_path: Path, unchecked: None) -> None:
    step, state = counter()

    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_loop(state, step, batches(), 50, MetricsLog(tmp_path / "m.jsonl"), 5, (Every(3, twice),), quiet=True)
