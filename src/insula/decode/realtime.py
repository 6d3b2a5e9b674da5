"""Real-time chunking: a new chunk that goes on from the one a robot is still executing.

    the last chunk, from the observation on      0 … d − 1 | d … n − 1 |
    the new chunk                                   known  |  similar  |  free … H − 1

While a chunk is computed the robot moves on: the first d steps (`delay`) are past when it arrives. So they must be
those of the last chunk, of which n (`length`) are left; the others should not jump. Two ways:

keep     for a model trained with `rtc_max_delay` (arXiv 2512.05964): the d steps are given, clean and at time 0, in
         every Euler step, as they were in training.
guide    for any other (Black, Galliker & Levine 2025, arXiv 2506.07339): every Euler step is pulled to where its own
         prediction agrees with the last chunk. It costs a backward pass of the expert.

Guidance, in our time
---------------------
The paper's τ is 1 − t and its velocity v = dA/dτ is −u. It predicts Â = A + (1 − τ) v, here x̂ = x − t u,
the rest of the way along u. With Y the last chunk and W the soft mask it adds to v

    w · (Y − Â)ᵀ diag(W) ∂Â/∂A,    w = min(β, (1 − τ) / (τ r²)),    r² = (1 − τ)² / (τ² + (1 − τ)²)

which is w times the way down ½ Σ W (Y − Â)². From v to u the sign turns. With e = W (Y − x̂) and ∂x̂/∂x = 1 − t ∂u/∂x,

    u_guided = u − w · (e − t · eᵀ ∂u/∂x),    w = min(β, ((1 − t)² + t²) / (t (1 − t)))

β is 5. Without it w would be infinite at pure noise, where the first Euler step is, and few steps could not follow it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from insula import flow
from insula.batch import Previous
from insula.shapes import AnyArray, Array, Bool, Float, Int

MAX_GUIDANCE = 5.0  # β, as in the paper (§4.2)
Velocity = Callable[[Array, Array], Array]
"""`velocity(x [B, H, D], time [B] or [B, H]) -> [B, H, D]`."""


def keep(velocity: Velocity, noise: Float[Array, "B H D"], previous: Previous) -> tuple[Velocity, Array]:
    """A velocity and a start [B, H, D] for `flow.integrate`, with the steps of the delay held where they are."""
    actions = jnp.asarray(previous.actions)
    known = flow.first_steps(jnp.asarray(previous.delay), noise.shape[1])

    def kept(x: Array, time: Array) -> Array:
        # What is known does not move. Without this the expert's answer to it, never scored, would carry it away.
        return jnp.where(known[..., None], 0.0, velocity(*flow.hold(x, time, actions, known)))

    start, _ = flow.hold(noise, jnp.ones(noise.shape[0]), actions, known)
    return kept, start


def guide(velocity: Velocity, previous: Previous, real: Bool[AnyArray, "H D"] | None = None) -> Velocity:
    """The velocity pulled towards `previous`. Neither rows with nothing left nor values that are not `real` are."""
    target = jnp.asarray(previous.actions)
    weight = soft_mask(jnp.asarray(previous.delay), jnp.asarray(previous.length), target.shape[1])[..., None]
    if real is not None:
        weight = jnp.where(jnp.asarray(real)[None], weight, 0.0)

    def guided(x: Array, time: Array) -> Array:
        # The expert alone: what it reads of the observation is fixed.
        u, pull = jax.vjp(lambda x: velocity(x, time), x)
        t = time[:, None, None]
        error = weight * (target - (x - t * u))
        (through_u,) = pull(error)
        pulled = u - guidance_weight(time)[:, None, None] * (error - t * through_u)
        return pulled if real is None else jnp.where(jnp.asarray(real)[None], pulled, u)

    return guided


def soft_mask(delay: Int[Array, "B"], length: Int[Array, "B"], horizon: int) -> Float[Array, "B H"]:
    """How much each step should be that of the last chunk, W: 1 before the delay, then ever less, 0 where nothing is
    left. Expects 0 ≤ delay ≤ length ≤ horizon."""
    d, n = delay[:, None], length[:, None]
    linear = (n - jnp.arange(horizon)[None]) / (n - d + 1)
    decay = linear * jnp.expm1(linear) / jnp.expm1(1.0)

    known, left = (flow.first_steps(count, horizon) for count in (delay, length))
    return jnp.where(known, 1.0, jnp.where(left, decay, 0.0))


def guidance_weight(time: Float[Array, "B"], most: float = MAX_GUIDANCE) -> Float[Array, "B"]:
    """w of the module's text, at most `most`."""
    above, below = (1 - time) ** 2 + time**2, time * (1 - time)
    # The same as min(most, above / below), without dividing by 0 at either end.
    return above / jnp.maximum(below, above / most)
