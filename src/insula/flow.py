"""Flow matching: one time convention everywhere. t = 1 is noise, t = 0 is data.

openpi, LeRobot and transformers' PI0 use this direction; the papers (Lipman et al. 2023; Black et al. 2024, π0 §IV)
write time the other way round.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from insula.shapes import Array, Bool, Float, Int, PRNGKeyArray


def sample_time(rng: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Training times, t ~ 0.999 · Beta(1.5, 1) + 0.001: most weight on noisy chunks (π0, appendix B).

    From pure noise only the observation says where to go, which is what a policy must learn; a chunk with little noise
    says most of it itself.
    """
    # Beta(a, 1) has the closed inverse u^(1/a), so no rejection sampling is needed. Never below 0.001: longer Euler
    # steps never ask there.
    return jax.random.uniform(rng, shape) ** (1 / 1.5) * 0.999 + 0.001


def sample_delay(rng: PRNGKeyArray, shape: tuple[int, ...], most: int) -> Int[Array, "..."]:
    """How many steps of each training chunk are given clean: 0 … `most`, each as likely as another."""
    return jax.random.randint(rng, shape, 0, most + 1)


def add_noise(actions: Float[Array, "*c H D"], noise: Float[Array, "*b H D"], time: Float[Array, "*b"]) -> Array:
    """x_t = t · noise + (1 − t) · actions, [*b, H, D]; several draws of noise may share one chunk, by broadcasting."""
    # Axes of one for H and D: every value of a chunk is at the same time.
    t = time[..., None, None]
    return t * noise + (1 - t) * actions


def target_velocity(actions: Float[Array, "*c H D"], noise: Float[Array, "*b H D"]) -> Array:
    """u = dx_t/dt = noise − actions, constant along the straight path."""
    return noise - actions


def first_steps(count: Int[Array, "*b"], horizon: int) -> Bool[Array, "*b H"]:
    """True on the first `count` steps of each chunk."""
    return jnp.arange(horizon).reshape((1,) * count.ndim + (horizon,)) < count[..., None]


def hold(
    x: Float[Array, "*b H D"], time: Float[Array, "*b"], actions: Float[Array, "*c H D"], known: Bool[Array, "*b H"]
) -> tuple[Float[Array, "*b H D"], Float[Array, "*b H"]]:
    """Noisy chunks whose `known` steps are the `actions` themselves, and a time for each step: 0, data, at those. The
    one place where a chunk is at two times, for training and for sampling alike (training-time real-time chunking)."""
    return jnp.where(known[..., None], actions, x), jnp.where(known, 0.0, time[..., None])


def integrate(velocity: Callable[[Array, Array], Array], noise: Float[Array, "B H D"], steps: int) -> Array:
    """Carry noise (t = 1) to actions (t = 0) in `steps` Euler steps of dt = −1/steps.

    `velocity(x [B, H, D], time [B]) -> [B, H, D]`.
    """
    # Counted and not summed: in float32 ten times 0.1 is not 1, and the last step would start beside its place.
    times = jnp.asarray(1 - np.arange(steps) / steps, noise.dtype)

    def step(i: Array, x: Array) -> Array:
        return x - velocity(x, jnp.broadcast_to(times[i], x.shape[:1])) / steps

    return jax.lax.fori_loop(0, steps, step, noise)
