"""On a machine with an accelerator: does it compute the same, is the insulation exact there, and how fast is it?

    python benchmarks/gpu_check.py --out gpu.json              # a few minutes; `make gpu-check`
    python benchmarks/gpu_check.py --cpu --sizes tiny          # a rehearsal without one

Parity: losses, gradients and actions of the preset `tiny` against this machine's CPU in float32. Certificate: every
zero of insulation on the device, in float32 and in what it trains in. Snapshot: a state that is donated after it was
copied for a checkpoint. Sizes: the real train step, its median time, samples and memory, and MFU where the device's
peak is known. One JSON; exit code 1 where a check fails.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from insula.batch import Batch
from insula.certificate.gradients import prove
from insula.checkpoints.snapshot import snapshot
from insula.decode.flow import sample_actions
from insula.files import write_json
from insula.losses import compute_loss
from insula.model.config import TINY, ModelConfig
from insula.model.params import Params, abstract_params, count_params, init_params
from insula.parallel.cost import count_flops
from insula.parallel.devices import peak_of
from insula.parallel.mesh import ONE_DEVICE, make_mesh
from insula.testing import fake_batch, randomize
from insula.train.config import training_preset
from insula.train.optimizer import averaged, make_optimizer
from insula.train.step import abstract_state, make_train_state, make_train_step

BATCHES = {"tiny": (64, 256), "small": (32, 128), "pi05": (8, 32)}
"""By preset, the batches whose step is timed."""
EXACT, ROUNDED = 1e-3, 5e-2
"""The largest relative difference to float32 on the CPU: of float32 with products at full precision, of bfloat16."""


def on(device: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives on a device, as numpy arrays."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(work)(*jax.device_put(arguments, device)))


def parity(device: Any) -> dict[str, float]:
    """The largest relative difference of losses, gradients (by part) and actions."""
    wide = TINY.with_compute(dtype="float32")

    # Near fresh weights, but with gates that are open: gradients of weights that are all random are chaos, in which
    # every rounding doubles from layer to layer.
    def make(key: jax.Array) -> Any:
        mixed = jax.tree.map(lambda a, b: a + 0.1 * b, init_params(wide, key), randomize(abstract_params(wide), key))
        return mixed, fake_batch(wide, 8, key)

    params, batch = jax.device_get(jax.jit(make)(jax.random.key(0)))
    noise = np.asarray(jax.random.normal(jax.random.key(2), (8, wide.horizon, wide.action_dim)))

    def work(config: ModelConfig) -> Callable[[Params, Batch, Any], Any]:
        def run(params: Params, batch: Batch, noise: Any) -> Any:
            loss = lambda p: compute_loss(p, config, batch, jax.random.key(1))  # noqa: E731
            (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return metrics, gradients, sample_actions(params, config, batch.observation, noise)

        return run

    cpu = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        wanted = on(cpu, work(wide.with_compute(stream="float32")), params, batch, noise)
        exact = on(device, work(wide), params, batch, noise)
    rounded = on(device, work(TINY.with_compute(dtype="bfloat16", stream="dtype")), params, batch, noise)
    return compare(exact, wanted, "float32") | compare(rounded, wanted, "bfloat16")


def compare(found: Any, wanted: Any, name: str) -> dict[str, float]:
    """Of losses, of each part's gradient and of actions, relative to their size."""

    def distance(a: Any, b: Any) -> float:
        flat = [np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
        return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))

    (metrics, gradients, actions), (metrics_2, gradients_2, actions_2) = found, wanted
    losses = {loss: distance(metrics[loss], metrics_2[loss]) for loss in ("flow", "fast")}
    parts = {
        f.name: distance(getattr(gradients, f.name), getattr(gradients_2, f.name))
        for f in dataclasses.fields(gradients)
    }
    return {
        f"{name}/{key}": value for key, value in (losses | parts | {"actions": distance(actions, actions_2)}).items()
    }


def certificate() -> dict[str, Any]:
    """Outcome in float32; and in the type it trains in, the largest gradient that crossed and the control's."""
    config = TINY.with_compute(dtype="bfloat16", stream="dtype")
    make = jax.jit(lambda key: (randomize(abstract_params(config), key), fake_batch(config, 4, key)))
    params, batch = make(jax.random.key(0))
    proof = prove(params, config, batch, jax.random.key(1))

    def crossing(config: ModelConfig) -> float:
        flow = lambda p: compute_loss(p, config, batch, jax.random.key(1))[1]["flow"]  # noqa: E731
        gradients = jax.jit(jax.grad(flow))(params)
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves((gradients.vision, gradients.backbone)))

    leak = crossing(config.with_objective(knowledge_insulation=False))
    return {"outcome": str(proof.outcome), "narrow": crossing(config), "narrow, not insulated": leak}


def snapshot_stays() -> bool:
    """Whether what a save reads is still there when the update has been given the memory."""
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32), "n": jnp.int32(3)}
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    kept = snapshot(state)
    for _ in range(3):
        state = update(state)
    return bool(np.array_equal(kept["w"], np.arange(1 << 20)) and kept["n"] == 3 and float(state["w"][1]) == 8)


def time_step(preset: str, batch_size: int, steps: int) -> dict[str, Any]:
    """The median of an update, and what it held; why not, where it does not fit."""
    config = dataclasses.replace(training_preset(preset, Path()), batch_size=batch_size)
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    device = mesh.devices.flat[0]
    try:
        with jax.set_mesh(mesh):
            optimizer = make_optimizer(config.optimizer, config.model, 1000)
            having = averaged(config.optimizer, config.model)
            places = jax.tree.map(lambda x: x.sharding, abstract_state(config.model, optimizer, mesh, having))
            start = lambda key: make_train_state(init_params(config.model, key), optimizer, having)  # noqa: E731
            state = jax.jit(start, out_shardings=places)(jax.random.key(0))
            batch = jax.jit(lambda key: fake_batch(config.model, batch_size, key))(jax.random.key(1))
            step = make_train_step(
                config.model, optimizer, config.optimizer.ema_decay, jax.random.key(2), places=places
            )
            begun = time.perf_counter()
            compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
            compiling = time.perf_counter() - begun

            seconds = []
            for _ in range(steps + 2):
                begun = time.perf_counter()
                state, metrics = compiled(state, batch)
                total = float(metrics["total"])  # waits for the update
                seconds.append(time.perf_counter() - begun)

            lean = config.model.with_compute(remat="none")
            plain = make_train_step(lean, optimizer, config.optimizer.ema_decay, jax.random.key(2), places=places)
            flops = count_flops(plain, state, batch)
    except jax.errors.JaxRuntimeError as error:
        return {"preset": preset, "batch_size": batch_size, "error": str(error).splitlines()[0][:200]}

    median = statistics.median(seconds[2:])
    peak = peak_of(device.device_kind)
    analysis = compiled.memory_analysis()
    return {
        "preset": preset,
        "parameters": count_params(abstract_params(config.model)),
        "batch_size": batch_size,
        "total": total,
        "compile_seconds": compiling,
        "step_seconds": median,
        "fastest": min(seconds[2:]),
        "slowest": max(seconds[2:]),
        "samples_per_second": batch_size / median,
        "tflop": flops / 1e12,
        "mfu": None if peak is None else flops / median / peak,
        "arguments_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "peak_bytes_in_use": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()

    device = jax.devices()[0]
    if device.platform == "cpu" and not given.cpu:
        print("no accelerator here; --cpu rehearses without one", file=sys.stderr)
        return 1

    report: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "python": sys.version.split()[0]}
    report["parity"] = parity(device)
    report["certificate"] = certificate()
    report["snapshot"] = snapshot_stays()
    for key, value in report.items():
        print(f"{key}: {value}", flush=True)

    report["sizes"] = []
    for preset in given.sizes:
        for batch_size in BATCHES[preset][: 1 if given.cpu else None]:
            report["sizes"].append(time_step(preset, batch_size, given.steps))
            print(report["sizes"][-1], flush=True)

    wrong = [n for n, value in report["parity"].items() if not value < (EXACT if n.startswith("float32") else ROUNDED)]
    proof = report["certificate"]
    if proof["outcome"] != "holds" or proof["narrow"] != 0 or not proof["narrow, not insulated"] > 0:
        wrong.append("certificate")
    if not report["snapshot"]:
        wrong.append("snapshot")
    wrong += [
        f"{row['preset']} {row['batch_size']}" for row in report["sizes"] if "error" in row and row["preset"] == "tiny"
    ]

    report["wrong"] = wrong
    if given.out is not None:
        write_json(given.out, report)
    print(f"wrong: {', '.join(wrong)}" if wrong else "all checks hold")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
