"""One update: loss, gradients, per-part norms, optimizer, running average."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from insula.batch import Batch
from insula.losses import Draws, Metrics, count_scored, draw, share_of_loss
from insula.model.config import ModelConfig
from insula.model.params import Params, abstract_params
from insula.parallel.sharding import shard_like_params
from insula.shapes import Array, Int, PRNGKeyArray
from insula.train.optimizer import PARTS

Share = Callable[..., tuple[Array, Metrics]]
"""`insula.losses.share_of_loss`, or `language_share`. Only the first is ever given a `gamma`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training. `ema_params` is the running mean of `params`, with None for each that has none:
    what does not learn is not held a second time. What is evaluated and served is `served_params`.

    Parameters and their mean are float32 even where products read bfloat16: a mean that moves by a thousandth of the
    difference would not move at all in bfloat16, which keeps two to three digits.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    optimizer: optax.OptState


def make_train_state(params: Params, optimizer: optax.GradientTransformation, averaged: Any = True) -> TrainState:
    """The state before the first update: no moments yet, and the mean is the parameters themselves. `averaged`
    (insula.train.optimizer) says which of them have one, as a prefix of their tree."""

    def copy(yes: bool, part: Any) -> Any:
        # A buffer of its own: both are donated to the step.
        return jax.tree.map(jnp.copy if yes else lambda leaf: None, part)

    ema_params = jax.tree.map(copy, averaged, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def served_params(state: TrainState) -> Params:
    """What is evaluated, certified, saved and served: the mean, and the parameters themselves where there is none."""
    # Where every parameter has a mean there is nothing to choose; a save waits for no walk through all of them.
    if len(jax.tree.leaves(state.ema_params)) == len(jax.tree.leaves(state.params)):
        return state.ema_params

    return _with_average(lambda mean, own: own if mean is None else mean, state.ema_params, state.params)


def _with_average(join: Callable[[Array | None, Array], Any], average: Params, params: Params) -> Params:
    """`join(mean, own)` of each parameter; its mean may be None."""
    return jax.tree.map(join, average, params, is_leaf=lambda x: x is None)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, averaged: Any = True
) -> TrainState:
    """Shapes, dtypes and where each leaf lives."""
    shapes = jax.eval_shape(lambda params: make_train_state(params, optimizer, averaged), abstract_params(config))
    places = shard_like_params(shapes, config, mesh)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, places)


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float | None,
    rng: PRNGKeyArray,
    *,
    share: Share = share_of_loss,
    prepare: Callable[[Batch, PRNGKeyArray], Batch] | None = None,
    parts: int = 1,
    places: TrainState | None = None,
    steps: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step. Its randomness depends on `rng` and the state's step alone, so a resumed run repeats it exactly.

    `prepare` changes the batch, on the device. `parts`: into how many parts it is cut, one after the other in memory;
    the update is the same. `places`: a sharding for each leaf of the state, which the one that is returned keeps.
    `steps`: the length of the whole training, which an objective with `flow_gradient_end` needs.

    Metrics are those of the loss, "total", and the gradient norm of each part before clipping. Where one of them is not
    finite nothing but the step changes: `run_loop` reports that update as skipped. The state that is passed in is
    donated: only the one that is returned can be used afterwards.
    """

    objective, gamma = config.objective, None
    if objective.flow_gradient_end is not None:
        assert steps is not None, "γ changes over the training, whose length is not given"
        gamma = optax.linear_schedule(objective.gamma, objective.flow_gradient_end, max(1, steps - 1))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(rng, state.step)
        if prepare is not None:
            # A key folded from `key`, which itself goes on unsplit: this changes no draw of noise or time.
            batch = prepare(batch, jax.random.fold_in(key, 1))

        draws = draw(config, batch.actions.shape[0], key)
        loss = share if gamma is None else functools.partial(share, gamma=gamma(state.step))
        (total, metrics), gradients = value_and_gradients(loss, state.params, config, batch, draws, parts)
        if places is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, places.params)
        norms = {f"gradient_norm/{part}": optax.tree.norm(getattr(gradients, part)) for part in PARTS}
        metrics |= norms | {"total": total}

        # One NaN in a gradient would be in every weight for good. The step counts all the same: the next one reads
        # other samples.
        finite = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))

        def keep(after: Any, before: Any) -> Any:
            # Chosen before anything is made of it: whatever reads both, what is new and what was, costs a copy.
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

        updates, moments = optimizer.update(gradients, state.optimizer, state.params, finite=finite)
        params = keep(optax.apply_updates(state.params, updates), state.params)

        average = follow(state, params, ema_decay)
        return TrainState(state.step + 1, params, keep(average, state.ema_params), moments), metrics

    # Donated, a state is updated in place. Without, two of them are in memory: parameters, mean and two moments each.
    outputs = None if places is None else (places, None)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def follow(state: TrainState, params: Params, ema_decay: float | None) -> Params:
    """The mean of a state's parameters and of `params`, those after it."""
    if ema_decay is None:
        assert not jax.tree.leaves(state.ema_params)
        return state.ema_params

    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))  # short memory while all is new
    # Written so that what does not move stays the same to the last bit in the average as well.
    return _with_average(
        lambda mean, own: None if mean is None else mean + (1 - decay) * (own - mean), state.ema_params, params
    )


def value_and_gradients(
    share: Share, params: Params, config: ModelConfig, batch: Batch, draws: Draws, parts: int
) -> tuple[tuple[Array, Metrics], Params]:
    """Loss, metrics and gradients of a batch, of which `parts` parts are in memory one after the other."""
    # Counted over all of it: a part that scores few tokens must not weigh as much as one that scores many.
    whole = count_scored(batch, draws)

    def of_part(batch: Batch, draws: Draws) -> tuple[tuple[Array, Metrics], Params]:
        return jax.value_and_grad(share, has_aux=True)(params, config, batch, draws, whole)

    if parts == 1:
        return of_part(batch, draws)

    def cut(x: Array) -> Array:
        # Every parts-th sample, and not neighbors: on a mesh each device then has some of every part.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def add(sums: Any, part: tuple[Batch, Draws]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_part(*part)), None

    pieces = jax.tree.map(cut, (batch, draws))
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], pieces))
    sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), pieces)
    return sums
