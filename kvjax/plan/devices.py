"""The cards a plan can be made for, as their vendors describe them. Memory in bytes, bandwidths in bytes a second and one direction.

Sources: NVIDIA H200, H100 SXM and A100 80GB SXM data sheets (dense rates, without sparsity; PCIe 5.0 and 4.0, 16 lanes, half of the figure
for both directions); Google Cloud's TPU v5e and v6e pages (one chip). A TPU's link to its host is not published: give --link_gbps.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.errors import KvjaxError, SpecError
from kvjax.kernels import targets


class PlanError(KvjaxError):
    """A plan that cannot be made: the compiler for a card is not installed, or it refuses the program."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A card.

    Attributes:
      memory: of the device, bytes.
      bandwidth: bytes a second between it and the cores; None: not known (a CPU).
      flops: operations a second by dtype; without an entry no bound by arithmetic is given.
      link: bytes a second from the host; None: not published.
      memory_source: where `memory` comes from.
      mesh: a device to compile for, as a mesh of its own; None: the machine this runs on.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float | None
    flops: dict[str, float]
    link: float | None
    memory_source: str = "data sheet"
    mesh: Mesh | None = None

    def abstract(self, tree: Any) -> Any:
        """ShapeDtypeStructs that stand on this device, which is not this machine."""
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def in_scope(self) -> contextlib.AbstractContextManager:
        """Within it, operations choose this device's kernels."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _cpu() -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "cpu", memory, None, {}, None, memory_source="this machine")


def _gpu(name: str, memory: int, bandwidth: float, flops: dict[str, float], link: float, changes: dict[str, str]) -> Device:
    config = targets.H200_CONFIG
    for old, new in changes.items():
        assert old in config, old
        config = config.replace(old, new)
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise PlanError(_missing(name, "the CUDA plugin of JAX", error)) from None
    return Device(name, "gpu", memory, bandwidth, flops, link, mesh=Mesh(np.array(topology.devices[:1]), ("x",)))


def _hopper(name: str, memory: int, bandwidth: float, changes: dict[str, str]) -> Device:
    flops = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}
    return _gpu(name, memory, bandwidth, flops, 64e9, changes)


def _h200() -> Device:
    return _hopper("h200", 141 * 10**9, 4.8e12, {})


def _h100() -> Device:
    changes = {
        "memory_bandwidth: 4800000000000": "memory_bandwidth: 3350000000000",
        "device_memory_size: 151397597184": "device_memory_size: 85520809984",
        "NVIDIA H200 141GB HBM3e": "NVIDIA H100 80GB HBM3",
    }
    return _hopper("h100", 80 * 10**9, 3.35e12, changes)


def _a100() -> Device:
    changes = {
        "shared_memory_per_core: 233472": "shared_memory_per_core: 167936",
        "shared_memory_per_block_optin: 232448": "shared_memory_per_block_optin: 166912",
        "core_count: 132": "core_count: 108",
        "fpus_per_core: 128": "fpus_per_core: 64",
        "memory_bandwidth: 4800000000000": "memory_bandwidth: 2039000000000",
        "l2_cache_size: 52428800": "l2_cache_size: 41943040",
        "clock_rate_ghz: 1.98": "clock_rate_ghz: 1.41",
        "device_memory_size: 151397597184": "device_memory_size: 85094760448",
        "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }": "cuda_compute_capability { major: 8 }",
        "Compute Capability 9.0a": "Compute Capability 8.0",
        "pcie_bandwidth: 34359738368": "pcie_bandwidth: 17179869184",
        "NVIDIA H200 141GB HBM3e": "NVIDIA A100-SXM4-80GB",
    }
    flops = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}
    return _gpu("a100", 80 * 10**9, 2.039e12, flops, 32e9, changes)


def _tpu(name: str, memory: int, bandwidth: float, flops: float) -> Device:
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
        raise PlanError(_missing(name, "libtpu", error)) from None
    return Device(name, "tpu", memory, bandwidth, {"bfloat16": flops}, None, mesh=Mesh(np.array(topology.devices[:1]), ("x",)))


def _missing(name: str, compiler: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"--topology={name}: {compiler} is not usable here ({reason}); pip install 'kvjax[aot]' brings it, and cpu needs nothing"


DEVICES: dict[str, Callable[[], Device]] = {
    "h200": _h200,
    "h100": _h100,
    "a100": _a100,
    "v5e:2x2": lambda: _tpu("v5e:2x2", 16 * 2**30, 819e9, 197e12),
    "v6e:2x2": lambda: _tpu("v6e:2x2", 32 * 2**30, 1640e9, 918e12),
    "cpu": _cpu,
}
"""What makes each device, by name. Of a TPU topology one chip is planned for."""


def open_device(name: str) -> Device:
    """The device of this name, ready to compile for.

    Raises:
      SpecError: there is none.
      PlanError: its compiler is not installed.
    """
    if name not in DEVICES:
        raise SpecError(f"unknown topology {name!r}; choose from {', '.join(DEVICES)}")
    return DEVICES[name]()
