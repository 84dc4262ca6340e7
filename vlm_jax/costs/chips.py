"""What one chip can do at most, from the vendors' data sheets. Imports no jax."""

from __future__ import annotations

import dataclasses
import math

GIB = 2**30
VALUE_BYTES = 2  # of a weight, a key or an activation (bfloat16)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip. They are upper bounds, so a time computed from them is a lower bound."""

    name: str
    device_kinds: tuple[str, ...]  # starts of jax's `Device.device_kind`
    peak_flops: float  # dense bfloat16, FLOP/s
    hbm_bytes: int  # size of the memory
    hbm_bandwidth_bytes: float  # per second
    link_bandwidth_bytes: float  # to the other chips, all links together, one direction, per second
    dcn_bandwidth_bytes: float = (
        math.inf
    )  # its share of the network between slices; infinite: not known


# In the order they are looked up: "TPU v5 lite" must stand before "TPU v5".
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The links' figure there is bidirectional (v5e 400, v5p 1200, v6e 800,
# v4 600 GB/s) or its half in Gbit/s (1600, 4800, 3200, 2400); a chip sends at the half. "16 GB" of HBM are GiB: the
# compiler gives programs 15.75 GiB of a v5e, 31.25 of a v6e, 95.74 of a v5p, 30.5 of a v4.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense, not sparse); NVLink 600, 900, 900 GB/s
# bidirectional.
# Network between slices: 6.4 and 25.6 Tbit/s per pod of 256 v5e and v6e (cloud.google.com/tpu/docs/v6e), 50 Gbit/s per v5p.
CHIPS: tuple[Chip, ...] = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
    Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 400e9, 12.5e9),
    Chip("A100", ("NVIDIA A100",), 312e12, 80_000_000_000, 2039e9, 300e9),
    Chip("H100", ("NVIDIA H100",), 989e12, 80_000_000_000, 3350e9, 450e9),
    Chip("H200", ("NVIDIA H200",), 989e12, 141_000_000_000, 4800e9, 450e9),
)


def find(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None when it is not in the table (a CPU)."""
    starts = ((start, chip) for chip in CHIPS for start in chip.device_kinds)
    return next((chip for start, chip in starts if device_kind.startswith(start)), None)


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one chip, or None where the peak is not known (a CPU)."""
    chip = find(device_kind)
    return None if chip is None else chip.peak_flops


def part(chip: Chip, of: int) -> Chip:
    """One of `of` equal parts of a chip that shows as several devices."""
    return dataclasses.replace(
        chip,
        name=f"1/{of} {chip.name}",
        peak_flops=chip.peak_flops / of,
        hbm_bytes=chip.hbm_bytes // of,
        hbm_bandwidth_bytes=chip.hbm_bandwidth_bytes / of,
        link_bandwidth_bytes=chip.link_bandwidth_bytes / of,
        dcn_bandwidth_bytes=chip.dcn_bandwidth_bytes / of,
    )
