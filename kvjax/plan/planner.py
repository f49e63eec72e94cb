"""From a setting and a card to a plan: bytes by purpose and tier, whether they fit, what the largest batch and context are, and bounds.

Where every figure comes from is part of its name:
  compiled   a compiler said so of the real program, at full depth, or at two depths and on the line through them
  computed   arithmetic over the shapes of the real arrays
  bound      arithmetic over data sheets; nothing can be faster
"""

import dataclasses
import functools
from collections.abc import Callable

from kvjax.cache import KVState
from kvjax.cache.ledger import nbytes, pool_bytes
from kvjax.errors import KvjaxError
from kvjax.plan import bounds, programs
from kvjax.plan.devices import Device
from kvjax.plan.programs import Setting, Usage

ROUNDS = 3
"""Compilations at an answer before the search stops correcting itself."""

MOST = 2**24
"""Where a search ends that memory does not end."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Bytes of a cache for a batch, by tier and purpose: all that is allocated for the context, full or not."""

    device_tokens: float
    metadata: float
    partial_keys: float
    host_pool: float

    @property
    def device(self) -> float:
        return self.device_tokens + self.metadata + self.partial_keys


@dataclasses.dataclass(frozen=True)
class Answer:
    """The largest batch, or context, that fits; 0: none.

    Attributes:
      compiled: the programs were compiled at the answer, and they fit.
    """

    size: int
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one strategy on one card; bytes and seconds.

    Attributes:
      decode, prefill: of the compiled programs, at the depths `depths` and carried on to the model's own.
      decode_peak, prefill_peak: on the device. A prefill of few rows has the caches of the others beside it.
      available: the share of the card's memory that is planned with.
    """

    setting: Setting
    device: Device
    depths: tuple[int, int]
    weights: float
    guide: float
    cache: Cache
    decode: Usage
    prefill: Usage
    decode_peak: float
    prefill_peak: float
    available: float
    work: bounds.Work
    link: float | None
    largest_batch: Answer | None = None
    largest_context: Answer | None = None

    @property
    def peak(self) -> float:
        return max(self.decode_peak, self.prefill_peak)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def roofline(self) -> float | None:
        return self.work.roofline(self.device, self.setting.dtype)

    @property
    def link_seconds(self) -> float | None:
        """Of a decode step, the two directions at once."""
        return None if self.link is None else max(self.work.from_host, self.work.to_host) / self.link

    @property
    def compiled(self) -> str:
        """What "compiled" means in this plan."""
        deep, (low, high) = self.setting.config.num_layers, self.depths
        if low == deep:
            return "compiled"
        return f"compiled at {low} and {high} layers, computed for {deep}"

    def record(self) -> dict[str, object]:
        """Flat keys for JSON; a figure's key begins with how it came about: `planned_` is computed plus compiled."""
        setting, cache, work = self.setting, self.cache, self.work
        flat: dict[str, object] = {
            "model_id": setting.config.name,
            "strategy": setting.strategy.describe(),
            "topology": self.device.name,
            "dtype": setting.dtype,
            "batch_size": setting.batch,
            "context": setting.context,
            "output_len": setting.output_len,
            "prefill_batch": setting.prefill_batch,
            "prefill_chunk": setting.prefill_chunk,
            "compiled_layers": list(self.depths),
            "num_layers": setting.config.num_layers,
            "device_memory_bytes": self.device.memory,
            "device_memory_source": self.device.memory_source,
            "available_bytes": self.available,
            "computed_weights_bytes": self.weights,
            "computed_guide_bytes": self.guide,
            "computed_kv_device_tokens_bytes": cache.device_tokens,
            "computed_kv_device_metadata_bytes": cache.metadata,
            "computed_kv_device_partial_bytes": cache.partial_keys,
            "computed_kv_host_pool_bytes": cache.host_pool,
            "compiled_decode_temp_bytes": self.decode.temp,
            "compiled_prefill_temp_bytes": self.prefill.temp,
            "planned_decode_peak_bytes": self.decode_peak,
            "planned_prefill_peak_bytes": self.prefill_peak,
            "planned_peak_bytes": self.peak,
            "compiled_decode_flops": self.decode.flops,
            "compiled_decode_accessed_bytes": self.decode.accessed,
            "fits": self.fits,
            "computed_decode_read_bytes": work.read,
            "computed_decode_flops": work.flops,
            "computed_decode_from_host_bytes": work.from_host,
            "computed_decode_to_host_bytes": work.to_host,
            "bound_decode_ms": None if self.roofline is None else 1e3 * self.roofline,
            "bound_link_ms": None if self.link_seconds is None else 1e3 * self.link_seconds,
        }
        for name, answer in (("batch", self.largest_batch), ("context", self.largest_context)):
            flat[f"largest_{name}"] = None if answer is None else answer.size
            flat[f"largest_{name}_source"] = None if answer is None else "compiled" if answer.compiled else "computed"
        return flat


def plan(
    setting: Setting,
    device: Device,
    *,
    depths: programs.Depths = "two",
    memory_fraction: float = 0.9,
    link: float | None = None,
    search: bool = True,
    refine: bool = True,
    progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """Compiles the programs of a setting for a card, and adds up.

    Args:
      depths: compile two depths and carry on, or all layers.
      memory_fraction: of the card's memory, what a process gets.
      link: bytes a second from the host; None: what the card's data sheet says.
      search: look for the largest batch and the largest context.
      refine: compile at those, too.
      progress: told what is being compiled.

    Raises:
      PlanError: the compiler refuses, or reports nothing.
    """
    setting = setting.native(device)
    progress("decode and prefill")
    decode, prefill = usage(setting, device, depths)
    own, guide = programs.weight_bytes(setting)
    found = Plan(
        setting, device, setting.depths(depths), own, guide, cache_bytes(setting), decode, prefill, *peaks(setting, decode, prefill),
        memory_fraction * device.memory, bounds.decode_work(setting), device.link if link is None else link,
    )  # fmt: skip
    if not search:
        return found
    model = Model(setting, decode, prefill)

    def confirm(at: Setting) -> Model:
        progress(f"at batch {at.batch}, context {at.context}")
        return Model(at, *usage(at, device, depths))

    check = confirm if refine else None
    batches = largest(model, lambda n: setting.resized(n, setting.context), found.available, check)
    contexts = largest(model, lambda n: setting.resized(setting.batch, n), found.available, check, least=2, unit=64)
    return dataclasses.replace(found, largest_batch=batches, largest_context=contexts)


def usage(setting: Setting, device: Device, depths: programs.Depths = "two") -> tuple[Usage, Usage]:
    """Decode and prefill at the model's own depth."""
    deep = setting.config.num_layers
    low, high = setting.depths(depths)

    def both(compile: Callable[[Setting, Device], Usage]) -> Usage:
        first = compile(setting.with_layers(low), device)
        return first if low == high else _carried_on(low, first, high, compile(setting.with_layers(high), device), deep)

    return both(programs.compiled_decode), both(programs.compiled_prefill)


def _carried_on(low: int, first: Usage, high: int, second: Usage, deep: int) -> Usage:
    """The line through two depths, at a third; no less scratch than at the deeper one."""

    def at(name: str) -> float | None:
        a, b = getattr(first, name), getattr(second, name)
        return None if a is None or b is None else a + (b - a) * (deep - low) / (high - low)

    temp, results, padding = (max(at(name) or 0.0, getattr(second, name)) for name in ("temp", "results", "padding"))
    return Usage(temp, results, padding, at("flops"), at("accessed"))


def peaks(setting: Setting, decode: Usage, prefill: Usage) -> tuple[float, float]:
    """Bytes of the device at the height of a decode step and of a prefill: what is held, and what the program needs beside it."""
    return _held(setting) + decode.beside, _held(setting, prefilling=True) + prefill.beside


def _held(setting: Setting, prefilling: bool = False) -> float:
    """Weights and the caches of all rows; in a prefill also the prompts that are staged."""
    rows = max(setting.batch, setting.prefill_batch if prefilling else 1)
    staging = _staging(dataclasses.replace(setting, batch=1)) if prefilling and setting.stages else 0.0
    return sum(programs.weight_bytes(setting)) + _cache(setting, rows).device + staging


def cache_bytes(setting: Setting) -> Cache:
    """Of the whole batch."""
    return _cache(setting, setting.batch)


def _cache(setting: Setting, rows: int) -> Cache:
    """Of `rows` rows, each of which adds the same."""
    one, two = _few_rows(dataclasses.replace(setting, batch=1))
    return _line(1, one, 2, two, rows)


@functools.lru_cache(maxsize=4096)
def _few_rows(setting: Setting) -> tuple[Cache, Cache]:
    """Of one row and of two, from the shapes of two depths: all further layers add the same."""
    deep, policy = setting.config.num_layers, setting.strategy.policy
    low = min(policy.full_layers * policy.guesses + 1, deep)

    def at(layers: int, rows: int) -> Cache:
        return _books(setting, programs.state(setting.with_layers(layers), rows))

    return tuple(at(low, n) if low == deep else _line(low, at(low, n), low + 1, at(low + 1, n), deep) for n in (1, 2))  # type: ignore[return-value]


def _line(low: int, first: Cache, high: int, second: Cache, at: int) -> Cache:
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    return Cache(*(a + (b - a) * (at - low) / (high - low) for a, b in pairs))


def _books(setting: Setting, kv: KVState) -> Cache:
    pool = pool_bytes(kv)
    partial = nbytes([layer.own for layer in kv.layers]) if setting.strategy.policy.guesses else 0
    rest = nbytes(kv) - pool - partial
    return Cache(0, rest, partial, pool) if setting.strategy.store.tier.in_host else Cache(pool, rest, partial, 0)


# ------------------------------------------------------------------------------------------------------------- largest batch and context


@dataclasses.dataclass(frozen=True)
class Model:
    """Arithmetic for the peak of other sizes, from programs compiled at one.

    What is held is computed from the shapes. What a decode step needs beside it is taken to grow with batch times slots, what a prefill
    needs with the tokens of the context.
    """

    at: Setting
    decode: Usage
    prefill: Usage

    def peak(self, setting: Setting) -> float:
        """Bytes of the device for another batch or context."""
        wider = setting.batch * _width(setting) / (self.at.batch * _width(self.at))
        longer = setting.context / self.at.context
        return max(_held(setting) + self.decode.beside * wider, _held(setting, prefilling=True) + self.prefill.beside * longer)


def _width(setting: Setting) -> int:
    """Slots of a row."""
    return setting.strategy.slots(setting.prompt, setting.context)


@functools.lru_cache(maxsize=4096)
def _staging(setting: Setting) -> float:
    one, two = (nbytes(programs.staged(setting.with_layers(n))) for n in (1, 2))
    return one + (two - one) * (setting.config.num_layers - 1)


def largest(
    model: Model,
    resized: Callable[[int], Setting],
    available: float,
    confirm: Callable[[Setting], Model] | None = None,
    least: int = 1,
    unit: int = 1,
) -> Answer:
    """The largest size whose peak is within `available`.

    Args:
      resized: a setting of that size.
      confirm: compiles at the answer; where that does not fit, or a larger one might, the arithmetic goes on from there.
      unit: sizes above it are multiples of it.
    """
    compiled = False
    size = found = _search(lambda n: model.peak(resized(n)) <= available, least, unit)
    for _ in range(ROUNDS if confirm and size else 0):
        assert confirm is not None
        try:
            here = confirm(resized(size))
        except KvjaxError:
            break
        fits = here.peak(here.at) <= available
        found, compiled = (size, True) if fits else (found, compiled)
        following = _search(lambda n, here=here: here.peak(resized(n)) <= available, least, unit)  # type: ignore[misc]
        if following == size or (fits and following < size):
            break
        if not following:
            return Answer(0, False)
        size, model = following, here
        if not fits:
            found, compiled = following, False
    return Answer(found, compiled)


def _search(fits: Callable[[int], bool], least: int, unit: int) -> int:
    """The largest of `least`, unit, 2 * unit, ... that fits, if all below it do; 0 when not even `least` does."""
    if not fits(least):
        return 0
    low, high = 0, 1
    while fits(max(high * unit, least)) and high < MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(max(middle * unit, least)) else (low, middle)
    return max(low * unit, least)
