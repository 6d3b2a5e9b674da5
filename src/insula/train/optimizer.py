"""One optimizer per part, so that a cross-entropy near ln V can never throttle the expert.

With 257,152 entries the token loss starts near 12.5, the flow loss near 1. Under one clipping norm the gradients of the
first would shrink those of the second, and a larger λ would slow the expert.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from insula.checks import check_choice, check_integer, check_number
from insula.model.config import ModelConfig
from insula.model.params import Params, trainable, weight_table
from insula.model.weights import is_weight

PARTS = tuple(field.name for field in dataclasses.fields(Params))
EPSILON = 1e-8
FROZEN = "frozen"  # the label of every parameter that does not learn


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for each part of the model: warm-up, then cosine decay to `final_fraction` of the peak.

    The rates suit the preset `tiny`; other presets bring their own (insula.train.config). Raises InputError for values
    that cannot be.
    """

    # Measured (docs/log.md): after 500 updates the token loss is 4.40 at 1e-4 and 1e-3 (expert), 2.81 at these. New
    # FAST entries start from noise and want a high rate.
    vision_lr: float = 1e-3
    backbone_lr: float = 1e-3
    expert_lr: float = 2e-3
    warmup_steps: int = 200
    """Updates until the rates reach their peak, at most half of all."""
    final_fraction: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    """Largest gradient norm of each part, taken by itself."""
    beta1: float = 0.9
    beta2: float = 0.95
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment, as it is kept between updates; the second is float32 always."""
    ema_decay: float | None = 0.999
    """Of the averaged parameters that are evaluated and served. None: there is no average, and the parameters
    themselves are."""

    def __post_init__(self) -> None:
        for name in ("vision_lr", "backbone_lr", "expert_lr", "weight_decay"):
            check_number(f"optimizer: {name}", getattr(self, name), "≥ 0", lambda value: value >= 0)
        check_integer("optimizer: warmup_steps", self.warmup_steps, 0)
        check_number("optimizer: clip_norm", self.clip_norm, "> 0", lambda norm: norm > 0)
        check_number("optimizer: final_fraction", self.final_fraction, "≥ 0 and ≤ 1", lambda part: 0 <= part <= 1)
        check_choice("optimizer: moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        decays = ("beta1", "beta2") if self.ema_decay is None else ("beta1", "beta2", "ema_decay")
        for name in decays:
            check_number(f"optimizer: {name}", getattr(self, name), "≥ 0 and < 1", lambda decay: 0 <= decay < 1)


DEFAULT = OptimizerConfig()

SMALL_OPTIMIZER = OptimizerConfig(
    vision_lr=3e-4, backbone_lr=3e-4, expert_lr=3e-4, warmup_steps=1000, final_fraction=0.1
)
"""Usual rates for 300 M parameters that start from noise; not tuned."""

PI05_OPTIMIZER = OptimizerConfig(
    vision_lr=5e-5,
    backbone_lr=5e-5,
    expert_lr=5e-5,
    warmup_steps=10_000,
    final_fraction=1.0,  # no decay: openpi's schedule ends at its peak
    weight_decay=1e-10,
    ema_decay=0.999,
)
"""openpi's config "pi05_libero"."""

PI0_OPTIMIZER = OptimizerConfig(
    vision_lr=2.5e-5,
    backbone_lr=2.5e-5,
    expert_lr=2.5e-5,
    warmup_steps=1000,
    final_fraction=0.1,
    weight_decay=1e-10,
    ema_decay=0.99,
)
"""openpi's defaults, which its configs of π0 use."""


def make_schedule(config: OptimizerConfig, rate: float, steps: int) -> optax.Schedule:
    """The learning rate of each update, whose peak is `rate`, for a training of `steps` updates."""
    warmup = min(config.warmup_steps, steps // 2)  # a short run would otherwise end before its rates are reached
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, config.final_fraction * rate)


def averaged(config: OptimizerConfig, model: ModelConfig) -> Any:
    """Which parameters have an average, as a prefix of their tree: those that learn, or none at all."""
    return False if config.ema_decay is None else trainable(model)


def make_optimizer(config: OptimizerConfig, model: ModelConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """`steps` is the length of the whole training; the schedule ends there.

    Weight decay is for what starts as a random matrix. Norms, biases, modulations and positions start from a constant
    that means something, and are left alone. What is frozen has no moments, and counts in no norm.
    """
    learns = trainable(model)
    labels = Params(
        *(jax.tree.map(lambda yes, name=name: name if yes else FROZEN, getattr(learns, name)) for name in PARTS)
    )
    # From the weight table, not from shapes: stacked layers give a norm two axes, and it looks like a matrix.
    decayed = jax.tree.map(lambda weight: weight.init == "normal", weight_table(model), is_leaf=is_weight)

    def part(name: str, rate: float) -> optax.GradientTransformation:
        schedule = make_schedule(config, rate, steps)
        # `partition` shows a transform the whole tree with other parts masked, so its mask must have that form, too.
        mask = jax.tree.map(lambda label, tree: tree if label == name else optax.MaskedNode(), labels, decayed)
        adamw = optax.chain(
            scale_by_adam(config),
            optax.add_decayed_weights(config.weight_decay, mask),
            keep_count(optax.scale_by_learning_rate(schedule)),
        )
        # Clipped first: after AdamW, whose steps have one size, a norm would say nothing.
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

    parts = {name: part(name, getattr(config, f"{name}_lr")) for name in PARTS} | {FROZEN: optax.set_to_zero()}
    used = set(jax.tree.leaves(labels))
    return optax.partition({label: transform for label, transform in parts.items() if label in used}, labels)


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose state stays as it is where `finite` is given and False."""
    start = optax.scale_by_adam(config.beta1, config.beta2, mu_dtype=config.moment_dtype).init

    def update(
        gradients: optax.Updates, state: optax.OptState, params: Any = None, *, finite: Any = True, **others: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        # Chosen here, before the updates are made of them. Chosen afterwards the updates would read the moments as they
        # were, which could then not be overwritten: XLA copied all of them, 3 % of a step (docs/log.md).
        def moment(decay: float, order: int, old: Any) -> Any:
            return jax.tree.map(lambda g, m: jnp.where(finite, decay * m + (1 - decay) * g**order, m), gradients, old)

        assert isinstance(state, optax.ScaleByAdamState)
        kept = optax.tree.cast(state.mu, "float32")
        mu, nu = moment(config.beta1, 1, kept), moment(config.beta2, 2, state.nu)
        if config.moment_dtype != "float32":
            # Rounded before it is used, and behind a barrier: XLA would keep the unrounded one as well, all of it.
            mu = jax.lax.optimization_barrier(optax.tree.cast(mu, config.moment_dtype))

        count = state.count + 1
        first, second = 1 - config.beta1**count, 1 - config.beta2**count  # both moments start at zero
        updates = jax.tree.map(lambda m, v: m.astype(v.dtype) / first / (jnp.sqrt(v / second) + EPSILON), mu, nu)
        return updates, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(start, update)


def keep_count(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`transform`, whose state, a count of updates, stays as it is where `finite` is given and False."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, *, finite: Any = True, **others: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, after = transform.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)
