"""Devices to compile for that are not here: an H200, and TPU v5e and v6e.

    target = targets.h200()
    with jax.set_mesh(target.mesh):  # so that operations choose the target's kernels
        jax.jit(step).lower(*target.abstract(arguments)).compile()

Needs the compilers, extra `aot`: the CUDA plugin of JAX with ptxas for the GPU, libtpu for the TPUs; no driver, no card. Run with
JAX_PLATFORMS=cpu, or JAX looks for the cards themselves.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class TargetError(RuntimeError):
    """The compiler for a target is not installed, or does not know the target."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One device that can be compiled for.

    Attributes:
      name: "h200", "v5e", "v6e".
      platform: "gpu" or "tpu".
      mesh: the device, as a mesh of one axis "x".
      memory: bytes of device memory.
      bandwidth: bytes a second between it and the cores, as the vendor states it.
    """

    name: str
    platform: str
    mesh: Mesh
    memory: int
    bandwidth: float

    def abstract(self, tree: Any) -> Any:
        """The arrays (or ShapeDtypeStructs) of a pytree as abstract arguments that stand on this device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def by_name(name: str) -> Target:
    """The target of this name.

    Raises:
      TargetError: there is none, or its compiler is not installed.
    """
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}; choose from {', '.join(TARGETS)}")
    return TARGETS[name]()


def h200() -> Target:
    """An NVIDIA H200 (141 GB, 132 streaming multiprocessors, compute capability 9.0)."""
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=H200_CONFIG, topology="1x1x1")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise TargetError(_missing("h200", "the CUDA plugin", "jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc", error)) from error
    return Target("h200", "gpu", topologies.make_mesh(topology, (1,), ("x",)), memory=151397597184, bandwidth=4.8e12)


def tpu_v5e() -> Target:
    """One chip of a TPU v5e."""
    return _tpu("v5e", memory=16 * 2**30, bandwidth=8.1e11)


def tpu_v6e() -> Target:
    """One chip of a TPU v6e."""
    return _tpu("v6e", memory=32 * 2**30, bandwidth=1.64e12)


def _tpu(name: str, memory: int, bandwidth: float) -> Target:
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x2")
    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
        raise TargetError(_missing(name, "libtpu", "libtpu", error)) from error
    return Target(name, "tpu", Mesh(topology.devices[:1], ("x",)), memory, bandwidth)


def _missing(target: str, compiler: str, packages: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"cannot compile for {target}: {compiler} is not usable here ({reason}); pip install 'kvjax[aot]' brings {packages}"


TARGETS = {"h200": h200, "v5e": tpu_v5e, "v6e": tpu_v6e}

# A GpuTargetConfigProto: what XLA would ask the driver for.
H200_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
