"""What `insula plan` does: the real train step, compiled for devices that are not there, and what it would need.

No weight is ever made: the step is lowered from shapes, for as many pretended CPU devices as there would be real ones.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from insula.batch import Batch, Observation
from insula.checks import check_integer
from insula.errors import InputError
from insula.files import write_json
from insula.model.config import TINY_BFLOAT16, ModelConfig
from insula.model.params import Params, abstract_params, count_params, trainable
from insula.parallel.cost import Messages, count_flops, count_messages
from insula.parallel.devices import find_device
from insula.parallel.mesh import ALL_DEVICES, MeshConfig, batch_shards, check_batch_size, make_mesh, split_batch
from insula.train.config import training_preset
from insula.train.optimizer import DEFAULT, OptimizerConfig, averaged, make_optimizer
from insula.train.step import TrainState, abstract_state, make_train_step

USABLE = 0.92
"""Of a device's memory: the rest is the driver's, the compiler's and what lies between arrays."""
REACHED = 0.4
"""Of a device's peak, in products of a well-fed training: an assumption, and printed as one."""
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What training on some devices would need: memory by kind, arithmetic, messages, and whether it fits. Compiles the
    real step (minutes for π0.5), without weights. Raises InputError for a device that is not known."""

    device: str = "h100"
    """One of a100, h100, h200, l40s, rtx4090, rtx5090, v5e, v5p, v6e."""
    count: int = 1
    """Devices."""
    model: ModelConfig = TINY_BFLOAT16
    optimizer: OptimizerConfig = DEFAULT
    mesh: MeshConfig = ALL_DEVICES
    batch_size: int = 32
    accumulate: int = 1
    json: Path | None = None
    """Write the figures there as well."""

    def __post_init__(self) -> None:
        find_device(self.device)
        check_integer("count", self.count, 1, 4096)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("accumulate", self.accumulate, 1)
        if self.json is not None and not self.json.parent.is_dir():  # now, rather than after minutes
            raise InputError(f"json: no folder {self.json.parent}")


def plan_defaults(preset: str | None, arguments: list[str]) -> PlanConfig:
    """The model and optimizer of a preset. Raises as `training_preset`."""
    chosen = training_preset(preset or "tiny", Path())
    return PlanConfig(model=chosen.model, optimizer=chosen.optimizer)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of one step. Bytes are those of the fullest device; `flops` are those of all devices together."""

    parameters: int
    kept: dict[str, int]
    """What stays between steps, by kind: parameters, average, moments."""
    batch: int
    working: int
    """What is made and freed in a step: gradients, logits, activations and what they are computed from."""
    gradients: int
    logits: int
    """Of one piece of the vocabulary, for one part of the batch."""
    samples: int
    """Of one part of the batch, on one device."""
    flops: int
    messages: dict[str, Messages]

    @property
    def activations(self) -> int:
        """Bytes that are left for them, with all that is on the way to a result."""
        return max(0, self.working - self.gradients - self.logits)

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return sum(self.kept.values()) + self.batch + self.working


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What follows from the needs for one kind of device. Seconds are of one step."""

    fits: bool
    largest_batch: int
    """0 where not even the smallest fits."""
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        """Messages travel while products are made: the slower of the two."""
        return max(self.computing, self.sending)


def run_plan(config: PlanConfig) -> int:
    """Print the figures. Exit code 1 where it does not fit. Raises InputError for a mesh or batch that cannot be."""
    # Before JAX looks for devices: this machine's own are of no interest.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config.count)

    # As the device would hand on, where nothing else is asked for.
    if config.model.compute.stream == "auto":
        config = dataclasses.replace(config, model=config.model.with_compute(stream="dtype"))

    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, config.batch_size, config.accumulate)
    if mesh.size < config.count:
        raise InputError(
            f"mesh: {mesh.size} of {config.count} devices are used; leave out --mesh.fsdp, or lower --count"
        )

    # Twice: what grows with the batch, and what does not, are told apart by the smallest one.
    least = batch_shards(mesh) * config.accumulate
    needs = measure(config, mesh)
    smallest = needs if config.batch_size == least else measure(dataclasses.replace(config, batch_size=least), mesh)

    found = estimate(config, needs, smallest)
    show(config, mesh, needs, found)
    if config.json is not None:
        write_json(config.json, to_json(config, mesh, needs, found))

    return 0 if found.fits else 1


def measure(config: PlanConfig, mesh: Mesh) -> Needs:
    """Compile the step, and read off what it needs."""
    with jax.set_mesh(mesh):
        step, state, batch = abstract_step(config, mesh)
        flops = count_flops(step, state, batch)
        compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]

    kept = {"parameters": state.params, "average": state.ema_params, "moments": state.optimizer}
    samples = config.batch_size // (batch_shards(mesh) * config.accumulate)
    return Needs(
        parameters=count_params(abstract_params(config.model)),
        kept={name: local_bytes(tree) for name, tree in kept.items()},
        batch=local_bytes(batch),
        working=compiled.memory_analysis().temp_size_in_bytes,
        gradients=local_bytes(learned(config, state.params)) * (1 if config.accumulate == 1 else 2),
        logits=4 * samples * config.model.max_fast_len * (config.model.compute.vocab_chunk or config.model.vocab_size),
        samples=samples,
        flops=flops,
        messages=count_messages(compiled.as_text()),
    )


def learned(config: PlanConfig, params: Params) -> Params:
    """`params` without what has no gradient."""
    return jax.tree.map(lambda learns, leaf: leaf if learns else None, trainable(config.model), params)


def abstract_step(config: PlanConfig, mesh: Mesh) -> tuple[Callable[..., Any], TrainState, Batch]:
    """The real step, and shapes of what it takes. For use in `jax.set_mesh(mesh)`."""
    steps = 1000  # of the schedules, whose numbers change nothing of the program's size
    optimizer = make_optimizer(config.optimizer, config.model, steps)
    state = abstract_state(config.model, optimizer, mesh, averaged(config.optimizer, config.model))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(
        config.model,
        optimizer,
        config.optimizer.ema_decay,
        jax.random.key(0),
        parts=config.accumulate,
        places=places,
        steps=steps,
    )
    return step, state, abstract_batch(config.model, config.batch_size, split_batch(mesh))


def abstract_batch(config: ModelConfig, batch_size: int, sharding: NamedSharding | None = None) -> Batch:
    """Shapes of a batch with actions and tokens, every camera at the model's own size."""

    def of(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    size, length = config.vision.image_size, config.max_token_len
    return Batch(
        observation=Observation(
            images={name: of("uint8", size, size, 3) for name in config.cameras},
            image_mask={name: of("bool") for name in config.cameras},
            state=of("float32", config.state_dim),
            tokens=of("int32", length),
            token_mask=of("bool", length),
        ),
        actions=of("float32", config.horizon, config.action_dim),
        action_is_pad=of("bool", config.horizon),
        action_dim_mask=of("bool", config.action_dim),
        ar_mask=of("bool", length),
        loss_mask=of("bool", length),
    )


def local_bytes(tree: Any) -> int:
    """What one device has of a tree of shapes that say where they live."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(config: PlanConfig, needs: Needs, smallest: Needs) -> Estimate:
    """For `config.device`, from the needs of two batches that differ in nothing else; `smallest` has one sample a
    device."""
    device = find_device(config.device)
    room = USABLE * device.memory - smallest.memory
    each = (needs.memory - smallest.memory) / max(needs.samples - smallest.samples, 1)
    # Where nothing tells what a sample takes, no more are promised than were compiled.
    more = needs.samples - 1 if each <= 0 else math.floor(room / each)
    least = config.batch_size // needs.samples

    return Estimate(
        fits=needs.memory <= USABLE * device.memory,
        largest_batch=0 if room < 0 else least * (1 + more),
        computing=needs.flops / config.count / (REACHED * device.peak),
        sending=sum(message.sent for message in needs.messages.values()) / device.link,
    )


def show(config: PlanConfig, mesh: Mesh, needs: Needs, found: Estimate) -> None:
    """The figures, what was assumed, and what to change where they are too large."""
    device = find_device(config.device)
    console = Console(width=100)
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(
        f"{config.model.name}: {needs.parameters / 1e6:,.1f} M parameters, batch {config.batch_size} in "
        f"{config.accumulate} part(s), {config.count} {config.device}, mesh {shape}"
    )

    memory = Table("memory of one device", "GiB")
    for name, size in needs.kept.items():
        memory.add_row(name, f"{size / GIB:,.3g}")
    memory.add_row("batch", f"{needs.batch / GIB:,.3g}")
    memory.add_row("made and freed in a step", f"{needs.working / GIB:,.3g}")
    memory.add_row("    gradients, all at once", f"{needs.gradients / GIB:,.3g}", style="dim")
    memory.add_row("    logits, a piece at a time", f"{needs.logits / GIB:,.3g}", style="dim")
    memory.add_row("    activations and the rest", f"{needs.activations / GIB:,.3g}", style="dim")
    memory.add_row("in all", f"{needs.memory / GIB:,.3g}", style="bold")
    memory.add_row(f"there is, less {1 - USABLE:.0%}", f"{USABLE * device.memory / GIB:,.3g}")
    console.print(memory)

    if needs.messages:
        sent = Table("messages of one device, a step", "number", "GiB sent")
        for kind, message in needs.messages.items():
            sent.add_row(kind, str(message.count), f"{message.sent / GIB:,.3g}")
        console.print(sent)

    rate = config.batch_size / found.seconds
    console.print(
        f"{needs.flops / 1e12:,.3g} TFLOP a step; about {found.seconds * 1e3:,.3g} ms, {rate:,.3g} samples a second. "
        f"Assumed: products at {REACHED:.0%} of {device.peak / 1e12:,.0f} TFLOP/s, {found.computing * 1e3:,.3g} ms; "
        f"messages at {device.link / 1e9:,.0f} GB/s {found.sending * 1e3:,.3g} ms, both at once ({device.source})"
    )
    if found.fits:
        console.print(f"fits; the largest batch that does is about {found.largest_batch}", style="green")
        return

    about = f"about {found.largest_batch} would fit" if found.largest_batch else "not even one sample a device would"
    console.print(f"does not fit: {about}. What helps: {'; '.join(remedies(config, mesh, needs))}", style="red")


def remedies(config: PlanConfig, mesh: Mesh, needs: Needs) -> list[str]:
    """What takes less memory, that which costs least first."""
    found = []
    if needs.samples > 1:
        found.append(f"--accumulate {config.accumulate * needs.samples} (the same update, one sample at a time)")
    if config.model.compute.remat != "all":
        found.append("--model.compute.remat all")
    if config.model.compute.vocab_chunk is None and config.model.vocab_size > 50_000:
        found.append("--model.compute.vocab-chunk N")
    if mesh.shape["data"] > 1:
        found.append(f"--mesh.data 1 --mesh.fsdp {mesh.shape['data'] * mesh.shape['fsdp']} (no copies of the model)")
    if config.optimizer.ema_decay is not None:
        found.append("--optimizer.ema-decay None (no average: the parameters themselves are served)")
    if config.optimizer.moment_dtype == "float32":
        found.append("--optimizer.moment-dtype bfloat16")
    if config.model.lora is None:
        found.append("model.lora:lora-config (no moments of frozen weights)")
    return [*found, f"more devices than {config.count}, or larger ones"]


def to_json(config: PlanConfig, mesh: Mesh, needs: Needs, found: Estimate) -> dict[str, Any]:
    """All figures, in bytes, FLOP and seconds."""
    return {
        "device": config.device,
        "count": config.count,
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "memory": needs.memory,
        **dataclasses.asdict(needs),
        **dataclasses.asdict(found),
        "assumed": {"usable": USABLE, "of_peak": REACHED},
    }
