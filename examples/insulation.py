"""The flow loss reaches no parameter of the backbone: a gradient of exactly zero, beside a control that is not zero."""

import jax

import insula
from insula.testing import fake_batch, randomize

config = insula.preset("tiny")
params = randomize(insula.init_params(config, jax.random.key(0)), jax.random.key(1))  # fresh gates are zero: no proof
batch = fake_batch(config, batch_size=2, rng=jax.random.key(2))


def largest_gradient(config: insula.ModelConfig) -> float:
    """Of the flow loss, on any parameter of the backbone."""
    loss = jax.jit(jax.grad(lambda p: insula.compute_loss(p, config, batch, jax.random.key(3))[1]["flow"]))
    return float(max(abs(g).max() for g in jax.tree.leaves(loss(params).backbone)))


print("insulated:", largest_gradient(config))  # 0.0: exactly nothing
print("control:  ", largest_gradient(config.with_objective(knowledge_insulation=False)))  # not zero
