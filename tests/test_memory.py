"""What a state holds and what it need not: the average, the moments, and a guard that copies nothing."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, by_leaf, difference, jit, largest, model

from insula.checkpoints.store import CheckpointStore
from insula.errors import CheckpointError, InputError
from insula.model.config import LoraConfig, ModelConfig
from insula.train.optimizer import DEFAULT, OptimizerConfig, averaged, make_optimizer, scale_by_adam
from insula.train.step import TrainState, make_train_state, make_train_step, served_params

SETTINGS = OptimizerConfig(warmup_steps=1, ema_decay=0.9)
FROZEN = SMALL.with_objective(freeze_backbone=True)
LORA = dataclasses.replace(SMALL, lora=LoraConfig(rank=2))


def training(config: ModelConfig = SMALL, settings: OptimizerConfig = SETTINGS):
    """A step, what makes a state to start from, and a batch."""
    params, batch = model(config)
    optimizer = make_optimizer(settings, config, 10)
    step = make_train_step(config, optimizer, settings.ema_decay, jax.random.key(1))

    def start() -> TrainState:
        return make_train_state(jax.tree.map(jnp.copy, params), optimizer, averaged(settings, config))

    return step, start, batch


@functools.lru_cache
def after(steps: int, config: ModelConfig = SMALL, settings: OptimizerConfig = SETTINGS) -> TrainState:
    step, start, batch = training(config, settings)
    state, run = start(), jit(step)
    for _ in range(steps):
        state, _ = run(state, batch)
    return jax.device_get(state)


def numbers(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_adam_is_that_of_optax() -> None:
    """Updates and moments of five gradients, and the form of the state, which checkpoints have. Control: another
    decay."""
    params, _ = model()
    tree = {"w": params.backbone.embedding, "b": params.expert.action_out.bias}
    gradients = [jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), tree) for i in range(5)]

    def run(transform: Any, **more: Any) -> Any:
        state, found = transform.init(tree), []
        for gradient in gradients:
            updates, state = transform.update(gradient, state, tree, **more)
            found.append(updates)
        return found, state

    wanted, found = run(optax.scale_by_adam(DEFAULT.beta1, DEFAULT.beta2)), run(scale_by_adam(DEFAULT), finite=True)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert difference(found, wanted) < 1e-6 < largest(wanted)
    other = run(scale_by_adam(dataclasses.replace(DEFAULT, beta1=0.8)))
    assert difference(other, wanted) > 1e-2


def test_the_first_moment_may_be_kept_in_bfloat16() -> None:
    """It alone; half of its bytes, and steps that are nearly the same. Control: with float32 they are the same."""
    wide, narrow = after(3), after(3, settings=dataclasses.replace(SETTINGS, moment_dtype="bfloat16"))
    dtypes = {name: leaf.dtype for name, leaf in by_leaf(narrow.optimizer).items() if leaf.ndim}
    assert {d for name, d in dtypes.items() if ".mu." in name} == {np.dtype(jnp.bfloat16)}
    assert {d for name, d in dtypes.items() if ".nu." in name} == {np.dtype("float32")}

    moved = difference(wide.params, model()[0])
    assert 0 < difference(narrow.params, wide.params) < 0.05 * moved
    assert difference(after.__wrapped__(3).params, wide.params) == 0.0


# --- the guard -------------------------------------------------------------------------------------------------------

STATES = {
    "usual": (SMALL, SETTINGS),
    "no average": (SMALL, dataclasses.replace(SETTINGS, ema_decay=None)),
    "bfloat16 moment": (SMALL, dataclasses.replace(SETTINGS, moment_dtype="bfloat16")),
    "frozen backbone": (FROZEN, SETTINGS),
}


@pytest.mark.parametrize("name", STATES)
def test_nothing_of_a_state_changes_where_an_update_is_not_finite(name: str) -> None:
    """Not even where it is the first of all, whose moments are zero. Control: a finite one changes it."""
    step, start, batch = training(*STATES[name])
    run = jit(step)
    broken = dataclasses.replace(batch, actions=batch.actions.at[0, 0, 0].set(jnp.inf))
    state = start()
    for _ in range(2):
        before = jax.device_get(state)
        state, metrics = run(state, broken)
        assert not np.isfinite(metrics["total"]) and int(state.step) == int(before.step) + 1
        assert difference(dataclasses.replace(jax.device_get(state), step=before.step), before) == 0.0

        before = jax.device_get(state)
        state, _ = run(state, batch)
        assert difference(state.optimizer, before.optimizer) > 0
    assert difference(state.params, before.params) > 0  # the second: the warm-up starts at zero


def copies(step: Any, state: TrainState, batch: Any) -> int:
    """Of arrays of the state, in the compiled step."""
    text = step.lower(state, batch).compile().as_text()
    return len(re.findall(r"= f32\[[\d,]+\]\S* copy\(%state_", text))


def test_the_guard_copies_nothing() -> None:
    """A state is updated where it is. Control: chosen after the update, old and new are both needed."""
    step, start, batch = training()

    def late(state: TrainState, batch: Any) -> TrainState:
        new, metrics = step(state, batch)
        return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(metrics["total"]), a, b), new, state)

    assert copies(step, start(), batch) == 0
    assert copies(jax.jit(late, donate_argnums=0), start(), batch) > len(jax.tree.leaves(model()[0]))


# --- the average -----------------------------------------------------------------------------------------------------


def test_without_an_average_the_parameters_are_served() -> None:
    """They are trained the same. Control: with an average that is what is served, and it is another."""
    with_one, without = after(3), after(3, settings=dataclasses.replace(SETTINGS, ema_decay=None))
    assert difference(with_one.params, without.params) == 0.0
    assert jax.tree.leaves(without.ema_params) == []
    assert numbers(without) == numbers(with_one) - numbers(with_one.params)

    assert difference(served_params(without), without.params) == 0.0
    assert difference(served_params(with_one), with_one.ema_params) == 0.0
    assert difference(served_params(with_one), with_one.params) > 0


@pytest.mark.parametrize("config", [FROZEN, LORA], ids=["frozen", "LoRA"])
def test_what_is_frozen_is_held_once(config: ModelConfig) -> None:
    """What is served is as with an average of everything; what learns has one. Control: that holds the rest twice."""
    params, batch = model(config)
    state = after(3, config)
    learning = sum(leaf.size for leaf in by_leaf(state.optimizer).values() if leaf.ndim) // 2
    assert numbers(state.ema_params) == learning < numbers(params)
    assert jax.tree.structure(served_params(state)) == jax.tree.structure(params)

    optimizer = make_optimizer(SETTINGS, config, 10)
    whole = make_train_state(jax.tree.map(jnp.copy, params), optimizer)
    assert numbers(whole.ema_params) == numbers(params)
    step = jit(make_train_step(config, optimizer, SETTINGS.ema_decay, jax.random.key(1)))
    for _ in range(3):
        whole, _ = step(whole, batch)
    assert difference(served_params(whole), served_params(state)) == 0.0
    assert difference(served_params(state), state.params) > 0


def test_parameters_and_their_average_share_no_memory() -> None:
    """Both are donated to the step, which writes over them."""
    _, start, _ = training()
    state = start()
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema_params))]
    assert len(places) == len(set(places))


def test_a_checkpoint_that_held_more_is_read_all_the_same(tmp_path: Path) -> None:
    """Older versions kept an average of what is frozen. An average may be dropped on the way; one that was never made
    cannot be read."""
    params, _ = model(FROZEN)
    optimizer = make_optimizer(SETTINGS, FROZEN, 10)
    older = make_train_state(jax.tree.map(jnp.copy, params), optimizer)
    _, start, _ = training(FROZEN)
    none = make_train_state(params, optimizer, averaged=False)
    with CheckpointStore(tmp_path) as store:
        store.save(1, older, served_params, lambda path: None)
        for lean in (start(), none):
            found = store.restore("train_state", lean)
            assert jax.tree.structure(found) == jax.tree.structure(lean)
            assert difference(served_params(found), params) == 0.0

        store.save(2, none, served_params, lambda path: None)
        assert difference(store.restore("train_state", none), none) == 0.0
        with pytest.raises(CheckpointError, match="2/train_state"):
            store.restore("train_state", start())


def test_settings_that_cannot_be(unchecked: None) -> None:
    with pytest.raises(InputError, match=r"moment_dtype is 'bfloat61'.*did you mean 'bfloat16'"):
        OptimizerConfig(moment_dtype="bfloat61")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ema_decay is 1"):
        OptimizerConfig(ema_decay=1.0)
