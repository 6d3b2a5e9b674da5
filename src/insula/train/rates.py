"""How fast a training is: samples a second, and the share of the devices' peak that its products are (MFU)."""

import logging
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from insula.parallel.cost import count_flops
from insula.parallel.devices import peak_of
from insula.train.config import TrainConfig
from insula.train.plan import PlanConfig, abstract_step

log = logging.getLogger(__name__)


class Rates:
    """`rates(seconds)` of an update of so many samples. `peak` in FLOP/s, of all devices together; where it is None,
    nothing is said of it, and `flops` is never called. Else it is called once, and gives those of one update."""

    def __init__(self, samples: int, peak: float | None, flops: Callable[[], int]):
        self._samples = samples
        self._peak = peak
        self._count = flops
        self._flops: int | None = None

    def __call__(self, seconds: float) -> dict[str, float]:
        """The metrics `samples_per_second`, and `mfu` as a share of 1 where the peak is known."""
        found = {"samples_per_second": self._samples / seconds}
        if self._peak is not None and self._flops is None:
            try:
                self._flops = self._count()
            except NotImplementedError as error:  # a program that cannot be counted is no reason not to run it
                log.warning("no MFU is logged: %s", error)
                self._peak = None

        if self._peak is not None and self._flops is not None:
            found["mfu"] = self._flops / (seconds * self._peak)
        return found


def make_rates(config: TrainConfig, mesh: Mesh) -> Rates:
    """For the training of `config` on the devices of `mesh`."""
    # The slowest would set the pace of unlike ones, so there is no one peak.
    kinds = {device.device_kind for device in mesh.devices.flat}
    peak = peak_of(kinds.pop()) if len(kinds) == 1 else None
    whole = None if peak is None else peak * mesh.size
    return Rates(config.batch_size, whole, lambda: model_flops(config, mesh))


def model_flops(config: TrainConfig, mesh: Mesh) -> int:
    """Of one update, all devices together: of the real step, but without what it computes again to save memory. Traced,
    not compiled."""
    plan = PlanConfig(
        model=config.model.with_compute(remat="none"),
        optimizer=config.optimizer,
        mesh=config.mesh,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
    )
    with jax.set_mesh(mesh):
        return count_flops(*abstract_step(plan, mesh))
