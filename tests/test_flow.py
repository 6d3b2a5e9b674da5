"""Flow matching: the time convention, its sampling, Euler steps, and which actions the loss scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, difference, gradients, jit, largest, loss, model

from insula import flow
from insula.losses import flow_matching_loss, masked_mean


def test_one_is_noise_and_zero_is_data() -> None:
    actions, noise = jnp.full((1, 2, 3), 5.0), jnp.full((1, 2, 3), -1.0)
    for time, wanted in ((1.0, -1.0), (0.0, 5.0), (0.25, 3.5)):
        assert np.allclose(flow.add_noise(actions, noise, jnp.array([time])), wanted)
    assert np.all(flow.target_velocity(actions, noise) == -6)
    slope = flow.add_noise(actions, noise, jnp.array([0.75])) - flow.add_noise(actions, noise, jnp.array([0.25]))
    assert np.allclose(slope / 0.5, flow.target_velocity(actions, noise))


def test_time_is_beta_and_mostly_noise() -> None:
    """0.999 · Beta(1.5, 1) + 0.001: mean 0.6, variance 0.0686. Control: the other direction of time, mean 0.4."""
    time = np.asarray(jit(lambda key: flow.sample_time(key, (200, 500)))(jax.random.key(0)), np.float64)
    beta = (time - 0.001) / 0.999
    assert time.min() >= 0.001 and time.max() <= 1.0
    assert beta.mean() == pytest.approx(1.5 / 2.5, abs=0.003) and beta.mean() != pytest.approx(0.4, abs=0.1)
    assert beta.var() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.002)
    assert np.quantile(beta, 0.3) == pytest.approx(0.3 ** (1 / 1.5), abs=0.005)


def test_the_true_velocity_recovers_the_actions() -> None:
    noise, actions = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    for steps in (1, 10):
        found = flow.integrate(lambda x, t: flow.target_velocity(actions, noise), noise, steps)
        assert difference(found, actions) < 1e-5
    assert difference(flow.integrate(lambda x, t: actions - noise, noise, 10), actions) > 0.1


def test_euler_steps() -> None:
    """dx/dt = x from t = 1 to 0 shrinks by (1 − 1/n)^n, and e^−1 in the limit; each step sees its own time."""
    start = jnp.ones((2, 1, 1))
    assert np.allclose(flow.integrate(lambda x, t: x, start, 10), 0.9**10, rtol=1e-5)
    assert np.allclose(flow.integrate(lambda x, t: x, start, 2000), np.exp(-1), rtol=1e-3)
    times = flow.integrate(lambda x, t: jnp.broadcast_to(t[:, None, None], x.shape), 0 * start, 4)
    assert np.allclose(times, -(1 + 0.75 + 0.5 + 0.25) / 4)


def masked(batch, steps: int = 2, dims: int = 1):
    """The batch with the last steps of every episode and the last action dimensions missing."""
    is_pad = jnp.broadcast_to(jnp.arange(SMALL.horizon) >= SMALL.horizon - steps, batch.action_is_pad.shape)
    has = jnp.broadcast_to(jnp.arange(SMALL.action_dim) < SMALL.action_dim - dims, batch.action_dim_mask.shape)
    return dataclasses.replace(batch, action_is_pad=is_pad, action_dim_mask=has)


def test_the_loss_scores_every_real_action_and_no_other() -> None:
    _, batch = model()
    batch = masked(batch)
    v, u = jax.random.normal(jax.random.key(0), (2, 2, SMALL.horizon, SMALL.action_dim))
    per_step = flow_matching_loss(v, u, batch.action_mask)
    assert per_step.shape == (2, SMALL.horizon) and np.all(per_step[:, -2:] == 0) and np.all(per_step[:, :-2] > 0)
    wanted = np.mean(np.square(np.asarray(v - u))[:, :-2, :-1])
    assert float(masked_mean(per_step, batch.action_mask)) == pytest.approx(float(wanted), rel=1e-5)
    everything = np.mean(np.square(np.asarray(v - u)))
    assert float(everything) != pytest.approx(float(wanted), rel=1e-2)

    (gradient,) = jax.grad(lambda v: masked_mean(flow_matching_loss(v, u, batch.action_mask), batch.action_mask))(v)[
        None
    ]
    assert np.array_equal(gradient != 0, batch.action_mask)


def test_padding_adds_no_loss_and_no_gradient() -> None:
    """The read-out of a missing dimension gets no gradient; a present one does. One compiled program for both."""
    params, batch = model()
    for dims in (1, 0):
        gradient = gradients(params, SMALL, masked(batch, 0, dims))["flow"].expert.action_out
        assert (largest(gradient.kernel[:, -1:]) == largest(gradient.bias[-1:]) == 0.0) == (dims == 1)
        assert largest(gradient.kernel[:, :-1]) > 0

    # All steps padded but the first: only its error is left.
    single = loss(params, SMALL, masked(batch, SMALL.horizon - 1, 0))[1]["flow"]
    nothing = masked(batch, SMALL.horizon, 0)
    assert float(loss(params, SMALL, nothing)[1]["flow"]) == 0.0 < float(single)
    assert largest(gradients(params, SMALL, nothing)["flow"]) == 0.0


def test_the_token_mask_never_touches_it() -> None:
    params, batch = model()
    bare = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    (_, full), (_, none) = (loss(params, SMALL, b) for b in (batch, bare))
    assert float(full["flow"]) == float(none["flow"]) and float(full["fast"]) > 0 == float(none["fast"])
