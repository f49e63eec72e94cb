"""Which implementation of an operation runs: the fastest one that the device has and that takes the arguments.

An operation is a tuple of implementations, fastest first; `xla` comes last, takes everything and is the operation's definition in a form
that runs anywhere. The choice is made while tracing. The device is that of the mesh in scope (`jax.set_mesh`), which may be a mesh of a
compile-only topology (targets.py), else the default device.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

Name = Literal["mosaic_gpu", "mosaic_tpu", "xla_cpu", "xla"]

logger = logging.getLogger(__name__)


class UnsupportedError(NotImplementedError):
    """The implementation asked for does not exist, does not run on this device, or does not take these arguments."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What an implementation may know of the device it is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: as the driver names it, for example "NVIDIA H200".
      cores: streaming multiprocessors of a GPU, cores of a TPU chip; None where JAX does not tell.
    """

    platform: str
    kind: str
    cores: int | None = None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      run: the function itself.
      supports: called with the arguments of `run`; None, or in one line why it cannot take them.
    """

    name: Name
    run: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclasses.dataclass(frozen=True)
class Operation:
    """A function with several implementations, fastest first. Calling it picks one and runs it."""

    name: str
    implementations: tuple[Implementation, ...]

    def __call__(self, *args: Any, implementation: Name | None = None, **kwargs: Any) -> Any:
        """Runs the first implementation that can, in a named scope; `implementation` forces one.

        Raises:
          UnsupportedError: the forced one cannot, and why.
        """
        chosen = self.choose(*args, implementation=implementation, **kwargs)
        with jax.named_scope(f"{self.name}_{chosen.name}"):
            return chosen.run(*args, **kwargs)

    def choose(self, *args: Any, implementation: Name | None = None, **kwargs: Any) -> Implementation:
        """The implementation that a call with these arguments runs. Why a faster one is not it is logged once a reason."""
        device = current_device()
        if implementation is not None:
            candidate = self._named(implementation)
            reason = unavailable(candidate.name, device) or candidate.supports(*args, **kwargs)
            if reason:
                raise UnsupportedError(f"{self.name}: {implementation} cannot run this: {reason}")
            return candidate
        reasons = []
        for candidate in self.implementations:
            reason = unavailable(candidate.name, device)
            if reason is None and (reason := candidate.supports(*args, **kwargs)) is None:
                return candidate
            if candidate.name.startswith("mosaic") and _meant_for(candidate.name, device):
                _log_once(self.name, candidate.name, reason)
            reasons.append(f"{candidate.name}: {reason}")
        raise UnsupportedError(f"{self.name}: nothing can run this: {'; '.join(reasons)}")

    def _named(self, name: str) -> Implementation:
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        names = ", ".join(candidate.name for candidate in self.implementations)
        raise UnsupportedError(f"{self.name}: there is no implementation {name!r}; choose from {names}")


def current_device() -> Device:
    """The device that what is being traced will run on."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return Device(mesh.abstract_device.platform, mesh.abstract_device.device_kind, mesh.abstract_device.num_cores)
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    cores = getattr(device, "core_count" if device.platform == "gpu" else "num_cores", None)
    return Device(device.platform, device.device_kind, cores)


def unavailable(name: Name, device: Device) -> str | None:
    """Why no kernel of this kind runs on the device, or None."""
    if name == "xla" or _interpreted.get() == name:
        return None
    if not _meant_for(name, device):
        return f"it needs {_NEEDS[name]}, this is {device.kind!r}"
    if name == "mosaic_gpu" and not is_hopper(device):
        return f"it is written for Hopper GPUs (H100, H200, GH200), this is {device.kind!r}"
    return None


def is_hopper(device: Device) -> bool:
    """Whether a device is a GPU of compute capability 9.0, by its name."""
    return device.platform == "gpu" and re.search(r"\bG?H\d{2,3}\b", device.kind) is not None


@contextlib.contextmanager
def interpreted(name: Literal["mosaic_gpu", "mosaic_tpu"], *, threads: int = 1, detect_races: bool = True) -> Iterator[None]:
    """Within it, kernels of this kind are available on a CPU, in their interpreter: slow, and exact about order and memory.

    Args:
      threads: threads of a block that a Mosaic GPU kernel asks for (its `num_threads`).
      detect_races: two unordered accesses to one place in memory are an error.
    """
    if name == "mosaic_gpu":
        force = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races, num_cores_or_threads=threads))
    else:
        force = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races))
    token = _interpreted.set(name)
    try:
        with force:  # part of JAX's cache keys, so nothing traced inside is reused outside
            yield
    finally:
        _interpreted.reset(token)


_interpreted: ContextVar[Name | None] = ContextVar("interpreted", default=None)


_NEEDS = {"mosaic_gpu": "an NVIDIA GPU", "mosaic_tpu": "a TPU", "xla_cpu": "a CPU"}


def _meant_for(name: Name, device: Device) -> bool:
    return {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu", "xla_cpu": "cpu"}.get(name) == device.platform


@cache
def _log_once(operation: str, name: str, reason: str | None) -> None:
    logger.warning("%s: %s is not used: %s", operation, name, reason)
