"""Devices that are not there, by the name of their topology, and what is published of their chips.

A TPU's compiler is package libtpu, a GPU's the plug-in of JAX for CUDA; neither asks for a device.
Each must be called in a process of its own, see `tpu`.
"""

import dataclasses
import re

import jax
from jax.experimental import topologies

from deltaproduct_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What its maker publishes: bytes of memory, bytes a second to and from it."""

    memory_bytes: int
    bandwidth: float


CHIPS = {
    "v4": Chip(32 * GIB, 1.228e12),
    "v5e": Chip(16 * GIB, 0.819e12),
    "v5p": Chip(95 * GIB, 2.765e12),
    "v6e": Chip(32 * GIB, 1.638e12),
    "h100": Chip(80 * 10**9, 3.35e12),
    "h200": Chip(141 * 10**9, 4.8e12),
}
# Both cores of a chip are one device, as they are where a program runs.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# What the compiler for GPUs asks of a chip, which is otherwise read from the one that is there.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }} core_count: 132 clock_rate_ghz: 1.98 fpus_per_core: 128
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""


def kind_of(topology: str) -> str:
    """The kind of chip of a topology, as in `CHIPS`.

    Raises:
      ConfigError: it is none that is known.
    """
    kind, colon, grid = topology.partition(":")
    if kind not in CHIPS or not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise ConfigError(
            f"topology={topology!r} is not known; it may be chips and how they are joined, as "
            f"v5e:16x16, v5p:4x4x4, h100:8 or h100:4x8 (4 hosts of 8); chips are {', '.join(CHIPS)}"
        )
    return kind


def platform_of(topology: str) -> str:
    """What JAX calls the platform of a topology: "tpu" or "cuda"."""
    return "cuda" if kind_of(topology) in _NAMES else "tpu"


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a topology, for which programs can be compiled but not run.

    Raises:
      ConfigError: the compiler does not know the topology.
    """
    kind = kind_of(topology)
    try:
        if platform_of(topology) == "tpu":
            options = _OPTIONS.get(kind, {})
            found = topologies.get_topology_desc(topology, platform="tpu", **options)
            return list(found.devices)
        chip, grid = CHIPS[kind], topology.partition(":")[2]
        described = _HOPPER.format(
            bandwidth=int(chip.bandwidth), memory=chip.memory_bytes, name=_NAMES[kind]
        )
        # Slices, hosts of each, devices of each.
        grid = "x".join([*["1"] * (2 - grid.count("x")), grid])
        found = topologies.get_topology_desc(
            topology, platform="cuda", target_config=described, topology=grid
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"topology={topology!r} is refused by the compiler: {str(error).splitlines()[0]}"
        ) from error
    return list(found.devices)
