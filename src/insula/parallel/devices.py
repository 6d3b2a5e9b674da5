"""Accelerators by name, as their makers publish them. Peaks are dense bfloat16, never "with sparsity"."""

import dataclasses

from insula.errors import InputError, did_you_mean

GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory in bytes, peak in FLOP/s; bandwidth of the memory, and of the link to its neighbors, in bytes/s."""

    memory: float
    peak: float
    bandwidth: float
    link: float
    source: str


DEVICES = {
    # Links: NVLink, one direction, to all neighbors together.
    "a100": Device(80 * GB, 312 * TERA, 2039 * GB, 300 * GB, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Device(80 * GB, 989 * TERA, 3350 * GB, 450 * GB, "NVIDIA H100 SXM data sheet"),
    "h200": Device(141 * GB, 989 * TERA, 4800 * GB, 450 * GB, "NVIDIA H200 SXM data sheet"),
    # Links: PCIe, 16 lanes, one direction.
    "l40s": Device(48 * GB, 362 * TERA, 864 * GB, 32 * GB, "NVIDIA L40S data sheet"),
    "rtx4090": Device(24 * GB, 165 * TERA, 1008 * GB, 32 * GB, "NVIDIA Ada GPU architecture, appendix A"),
    "rtx5090": Device(32 * GB, 209.5 * TERA, 1792 * GB, 64 * GB, "NVIDIA RTX Blackwell GPU architecture, appendix A"),
    # Links: the chip's interconnect, one direction, half of the published sum.
    "v5e": Device(16 * GB, 197 * TERA, 819 * GB, 100 * GB, "Google Cloud, TPU v5e"),
    "v5p": Device(95 * GB, 459 * TERA, 2765 * GB, 300 * GB, "Google Cloud, TPU v5p"),
    "v6e": Device(32 * GB, 918 * TERA, 1640 * GB, 224 * GB, "Google Cloud, TPU v6e"),
}


def find_device(name: str) -> Device:
    """Raises InputError with the nearest name for one that is not known."""
    if name not in DEVICES:
        raise InputError(f"no device {name!r}{did_you_mean(name, DEVICES)}; known: {', '.join(DEVICES)}")
    return DEVICES[name]


KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100",  # less memory, the same peak
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""JAX's names (`jax.devices()[0].device_kind`), whole: an H100 of PCIe has another peak than one of SXM."""


def peak_of(kind: str) -> float | None:
    """FLOP/s of a device by JAX's name for it. None for one that is not known, such as a CPU: a guess would look like a
    measurement."""
    return DEVICES[KINDS[kind]].peak if kind in KINDS else None
