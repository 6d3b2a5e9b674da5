"""One optimiser per part, so that a cross-entropy near ln V can never throttle the expert."""

import dataclasses

import jax
import optax

from insula.model import Params

PARTS = tuple(field.name for field in dataclasses.fields(Params))


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW for each part of the model: warm-up, then cosine decay to `final_fraction` of the peak."""

    vision_rate: float = 5e-4
    backbone_rate: float = 5e-4
    expert_rate: float = 1e-3
    warmup_steps: int = 200
    final_fraction: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    """Largest gradient norm of each part, taken by itself."""
    beta1: float = 0.9
    beta2: float = 0.95
    ema_decay: float = 0.999
    """Of the averaged parameters that are evaluated and served."""


DEFAULT = OptimiserConfig()


def make_optimiser(config: OptimiserConfig, steps: int, freeze_backbone: bool) -> optax.GradientTransformation:
    """`steps` is the length of the whole training; the schedule ends there."""

    def part(rate: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, min(config.warmup_steps, steps // 2), steps, config.final_fraction * rate
        )
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=_matrices),
        )

    frozen = optax.set_to_zero()
    return optax.partition(
        {
            "vision": frozen if freeze_backbone else part(config.vision_rate),
            "backbone": frozen if freeze_backbone else part(config.backbone_rate),
            "expert": part(config.expert_rate),
        },
        Params(*PARTS),  # type: ignore[arg-type]  # a prefix of the parameters' tree: one label for each part
    )


def _matrices(tree: Params) -> Params:
    """Weight decay is for matrices; stacked vectors have two axes, and norms and biases are small ones."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2 and leaf.shape[-2] > 8, tree)
