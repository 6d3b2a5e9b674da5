"""How programs are compiled that are not the train step."""

from collections.abc import Callable

import jax


def compiled_quickly(function: Callable) -> Callable:
    """`jax.jit`, for what runs a few times: on a CPU it compiles in half the time, and runs slower."""
    # XLA:CPU's own option names; another backend refuses them. Gradients of `insula inspect` took 47 s to compile, and
    # 35 s like this (docs/log.md). Not where several processes run it: their messages then come in different orders.
    options = (
        {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        if jax.default_backend() == "cpu" and jax.process_count() == 1
        else None
    )

    return jax.jit(function, compiler_options=options)
