"""What a cell can measure: whole batches offline, an engine under load, or quality alone.

    bench = Bench()
    run("rates", [Load("vllm", request_rate=rate).cell() for rate in (2, 4)], directory, bench)

A cell is the fields of `Offline`, `Load` or `Quality` without those that are None. Repeats have prompts and arrivals of their own, which
every strategy sees alike: they come from `seed` and `repeat` alone.
"""

import collections
import dataclasses
import gc
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from kvjax import matching
from kvjax.cache import CacheShape, Strategy, parse_strategy
from kvjax.calibrate import Calibration, calibrate, calibrated
from kvjax.engine import load as loads
from kvjax.engine import metrics, offline, serve
from kvjax.engine.engine import Engine
from kvjax.engine.memory import parse_memory
from kvjax.errors import KvjaxError, MemoryLimitError, SpecError
from kvjax.generation import PrefillPlan, as_strategy, cache_shape, check_positions
from kvjax.models import Model, ModelConfig, load_model, parameters
from kvjax.models.config import preset
from kvjax.quality import recall
from kvjax.quality.forced import Forced, strategy_of
from kvjax.report import record as records
from kvjax.sweep.cells import Cell
from kvjax.sweep.log import Record

REPEAT_STRIDE = 1009
"""Seeds of successive repeats are so far apart; the requests of a load have successive seeds."""

ENGINES = 12
"""Kept at most."""

WARM_UP_REQUESTS = 2

CROWDED = 0.5
"""Of the memory maps that the system allows a process: from here on a bench lets go of its compiled programs. Each of XLA's takes several,
and a process that runs out of them dies of a segmentation fault."""


class Declared:
    """What a cell of one measure consists of."""

    measure: ClassVar[str]

    def cell(self) -> Cell:
        """The flat dict."""
        assert dataclasses.is_dataclass(self)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"measure": self.measure} | {name: value for name, value in fields.items() if value is not None}


class HasModel(Protocol):
    """A model's name; how many of its layers, for a preset that is too deep (random weights); whether the weights are random."""

    @property
    def model(self) -> str: ...
    @property
    def num_layers(self) -> int | None: ...
    @property
    def random_weights(self) -> bool | None: ...


class HasStrategy(Protocol):
    """A spec string, and what its policy may keep or read: a fraction of the prompt, or tokens."""

    @property
    def strategy(self) -> str: ...
    @property
    def budget(self) -> float | int | None: ...


@dataclasses.dataclass(frozen=True)
class Offline(Declared):
    """Whole batches: speed, bytes, fidelity, recall.

    Attributes:
      currency, target: instead of a budget, the largest that costs no more (kvjax.matching); `target` may be text such as "4MiB".
      limit: of the cache's bytes on the device; a batch that needs more is infeasible.
      quality: measure fidelity and recall, too.
      audit: judge guesses as well.
      scratch: weigh the scratch of a decode step as well, which compiles its program once more.
      case: what the cell stands for, where its numbers do not say it.
    """

    strategy: str
    model: str = "kvjax-4m"
    budget: float | int | None = None
    num_layers: int | None = None
    random_weights: bool | None = None
    num_prompts: int = 8
    batch_size: int = 8
    input_len: int = 952
    output_len: int = 64
    num_facts: int = 8
    quality: bool = True
    audit: bool | None = None
    scratch: bool | None = None
    currency: str | None = None
    target: str | int | None = None
    limit: str | int | None = None
    case: str | None = None
    seed: int = 0
    repeat: int = 0

    measure: ClassVar[str] = "offline"


@dataclasses.dataclass(frozen=True)
class Load(Declared):
    """A serving engine under arrivals. Lengths may be distributions (kvjax.engine.load.parse_lengths), the rate may be "inf".

    Attributes:
      max_model_len: of the engine; None: the longest request.
    """

    strategy: str
    model: str = "kvjax-4m"
    budget: float | int | None = None
    num_layers: int | None = None
    random_weights: bool | None = None
    request_rate: float | str = "inf"
    burstiness: float = 1.0
    num_prompts: int = 32
    input_len: str | int = 256
    output_len: str | int = 64
    shared_prefix: int | None = None
    prefix_caching: bool | None = None
    kv_memory: str = "16MiB"
    host_memory: str | None = None
    max_num_seqs: int = 64
    max_model_len: int | None = None
    prefill_chunk: int = 256
    max_concurrency: int | None = None
    goodput: str | None = None
    case: str | None = None
    seed: int = 0
    repeat: int = 0

    measure: ClassVar[str] = "load"


@dataclasses.dataclass(frozen=True)
class Quality(Declared):
    """Recall and fidelity alone, teacher-forced, without timing (kvjax.quality.forced)."""

    strategy: str
    model: str = "kvjax-4m"
    budget: float | int | None = None
    num_layers: int | None = None
    random_weights: bool | None = None
    num_prompts: int = 16
    batch_size: int = 16
    input_len: int = 952
    num_facts: int = 8
    case: str | None = None
    seed: int = 0
    repeat: int = 0

    measure: ClassVar[str] = "quality"


KINDS: dict[str, type] = {kind.measure: kind for kind in (Offline, Load, Quality)}


def parse(cell: Cell) -> Offline | Load | Quality:
    """What a cell declares. Raises SpecError for an unknown measure or field."""
    fields = {name: value for name, value in cell.items() if name != "measure"}
    kind: Any = KINDS.get(cell.get("measure", ""))
    if kind is None:
        raise SpecError(f"unknown measure {cell.get('measure')!r}; choose from {', '.join(KINDS)}")
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in fields if name not in known]:
        raise SpecError(f"a cell of measure {cell['measure']!r} has no {unknown[0]!r}; it has {', '.join(known)}")
    if "strategy" not in fields:
        raise SpecError("a cell names its strategy; add for example strategy='h2o'")
    return kind(**fields)


class Bench:
    """Measures cells, and keeps what takes long to make for the next: models, calibrations, prompts, references, engines.

    Compiled programs are jax's to keep, until there are very many (`CROWDED`); cells in the order of `in_turns` find them still there.
    """

    def __init__(self, models: dict[str, Model] | None = None):
        """`models`: by the names that cells use, for those that kvjax.load_model does not know."""
        self._given = models or {}
        self._models: dict[tuple[Any, ...], Model] = {}
        self._calibrations: dict[tuple[Any, ...], Calibration] = {}
        self._prepared: Kept[Model] = Kept(8)
        self._forced: Kept[Forced] = Kept(2)
        self._engines: Kept[Engine] = Kept(ENGINES)

    def __call__(self, cell: Cell) -> Record:
        declared = parse(cell)
        if maps_in_use() > CROWDED:
            self.clear()
        try:
            if isinstance(declared, Offline):
                return self.offline(declared)
            return self.load(declared) if isinstance(declared, Load) else self.quality(declared)
        except KvjaxError:
            raise
        except BaseException:
            self._engines.clear()  # one that was left in the middle of something serves no other cell
            raise

    def clear(self) -> None:
        """Lets go of everything, compiled programs included."""
        self.__init__(self._given)  # type: ignore[misc]
        jax.clear_caches()
        gc.collect()

    # -------------------------------------------------------------------------------------------------------------------------- measures

    def offline(self, cell: Offline) -> Record:
        model, strategy = self.model(cell), strategy_in(cell)
        questions = cell.num_facts * recall.STATEMENT_BYTES
        check_positions(model, cell.input_len, max(cell.output_len, questions))
        batch = min(cell.batch_size, cell.num_prompts)
        seed = cell.seed + REPEAT_STRIDE * cell.repeat
        workload = offline.make_workload(model, cell.num_prompts, cell.input_len, seed, cell.num_facts, cell.output_len)
        sizes = matching.Sizes(cache_shape(model), batch, cell.input_len, cell.output_len, workload.continuation.shape[1])
        matched: Record = {}
        if cell.currency is not None:
            found = match(strategy, cell, sizes)
            strategy, matched = found.strategy, {"matched_knob": found.knob, "matched_cost": found.cost}
        if cell.limit is not None:
            check_limit(strategy, parse_memory(cell.limit), sizes)
        plan = PrefillPlan()
        prepared, quality = self.guided(model, strategy, _model_key(cell)), offline.Quality()
        if cell.quality:
            judging = dict(batch_size=batch, reserve=cell.output_len, plan=plan, seed=seed, audits=bool(cell.audit))
            (quality,) = offline.judge([(prepared, strategy)], workload, **judging)  # type: ignore[arg-type]
        measured = offline.measure(
            prepared, strategy, workload, batch_size=batch, output_len=cell.output_len, seed=seed, plan=plan, quality=quality,
            weighs=bool(cell.scratch),
        )  # fmt: skip
        options: Record = {"input_len": cell.input_len, "output_len": cell.output_len, "batch_size": batch, "seed": seed}
        options |= {"random_weights": bool(cell.random_weights), "num_layers": model.config.num_layers, "budget": cell.budget}
        options |= {"parameter_count": model.config.parameter_count}
        samples = latency_samples(measured.timelines) | measured.per_prompt
        return records.record(measured, model, workload, options) | matched | {"samples": samples}

    def load(self, cell: Load) -> Record:
        model, strategy = self.model(cell), strategy_in(cell)
        seed = cell.seed + REPEAT_STRIDE * cell.repeat
        load = loads.make_load(
            model, num_requests=cell.num_prompts, input_len=loads.parse_lengths(str(cell.input_len)),
            output_len=loads.parse_lengths(str(cell.output_len)), request_rate=rate_of(cell.request_rate), burstiness=cell.burstiness,
            seed=seed, shared_prefix=cell.shared_prefix or 0,
        )  # fmt: skip
        engine = self.engine(cell, model, strategy, load)
        goodput = None if cell.goodput is None else metrics.parse_goodput(cell.goodput)
        service = serve.serve(engine, load, max_concurrency=cell.max_concurrency)
        if not service.complete:
            raise KeyboardInterrupt
        options = {
            "request_rate": "inf" if math.isinf(load.request_rate) else load.request_rate, "burstiness": cell.burstiness,
            "input_len": cell.input_len, "output_len": cell.output_len, "shared_prefix": cell.shared_prefix or 0, "seed": seed,
            "kv_memory": cell.kv_memory, "host_memory": cell.host_memory, "enable_prefix_caching": bool(cell.prefix_caching),
            "max_concurrency": cell.max_concurrency, "goodput": cell.goodput, "random_weights": bool(cell.random_weights),
            "num_layers": model.config.num_layers, "parameter_count": model.config.parameter_count, "budget": cell.budget,
        }  # fmt: skip
        served = [one.timeline if one.completed else None for one in service.served]
        closed = cell.max_concurrency is not None
        return records.load_record(service, engine, model, load, options, goodput, closed) | {"samples": latency_samples(served)}

    def quality(self, cell: Quality) -> Record:
        model, strategy = self.model(cell), strategy_in(cell)
        check_positions(model, cell.input_len, cell.num_facts * recall.STATEMENT_BYTES)
        asked = strategy.identity()
        strategy = strategy_of(strategy.policy, offloaded=strategy.store.tier.fetches)
        seed = cell.seed + REPEAT_STRIDE * cell.repeat
        key = (*_model_key(cell), cell.num_prompts, cell.input_len, seed, cell.num_facts, cell.batch_size)

        def make() -> Forced:
            workload = offline.make_workload(model, cell.num_prompts, cell.input_len, seed, cell.num_facts)
            return Forced(lambda s: self.guided(model, s, _model_key(cell)), workload, min(cell.batch_size, cell.num_prompts))

        found = self._forced.get(key, make).measure(strategy)
        del found["depths"], found["answered"]
        return {
            **records.setting(), **records.model_fields(model), **records.strategy_fields(asked), "workload": "recall",
            "num_prompts": cell.num_prompts, "input_len": cell.input_len, "batch_size": cell.batch_size, "seed": seed,
            "budget": cell.budget, "task_questions_per_depth": cell.num_prompts, **found,
        }  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------------- what cells share

    def model(self, cell: HasModel) -> Model:
        """The model of a cell, loaded once; only ever one in memory."""
        key = _model_key(cell)
        if key not in self._models:
            for kept in (self._models, self._calibrations, self._prepared, self._forced, self._engines):
                kept.clear()
            self._models[key] = self._made(cell)
        return self._models[key]

    def _made(self, cell: HasModel) -> Model:
        if cell.model in self._given:
            return self._given[cell.model]
        if cell.num_layers is None:
            return load_model(cell.model, random_weights=bool(cell.random_weights))
        if not cell.random_weights:
            raise SpecError(f"num_layers={cell.num_layers} makes another model of {cell.model}: it has random weights alone")
        config = preset(cell.model)
        if not 1 <= cell.num_layers <= config.num_layers:
            raise SpecError(f"num_layers={cell.num_layers}: {cell.model} has {config.num_layers}; give 1 to {config.num_layers}")
        config = dataclasses.replace(config, name=f"{config.name}, {cell.num_layers} layers", num_layers=cell.num_layers)
        return Model(config, parameters.random(config), None)

    def guided(self, model: Model, strategy: Strategy, key: tuple[Any, ...]) -> Model:
        """The model as the strategy needs it; one calibration serves all that speculate."""
        policy: Any = strategy.policy
        if not policy.guesses:
            return model
        if key not in self._calibrations:
            self._calibrations[key] = calibrate(model)
        options = tuple(getattr(policy, name, None) for name in ("partial", "columns", "skew"))
        return self._prepared.get((key, options), lambda: calibrated(model, strategy, self._calibrations[key]))

    def engine(self, cell: Load, model: Model, strategy: Strategy, load: loads.Load) -> Engine:
        """A warm engine for the load: one that served a cell with the same memory and lengths, or a new one. What is in a prefix cache is
        another cell's, so an engine that has one serves one cell."""
        longest = max(load.max_length, 2) if cell.max_model_len is None else cell.max_model_len
        lengths = tuple(sorted({len(request.prompt) for request in load.requests}))
        key = (
            *_model_key(cell), strategy, cell.kv_memory, cell.host_memory, cell.max_num_seqs, cell.prefill_chunk, cell.prefix_caching,
            longest, lengths if len(lengths) < 4 else None,
        )  # fmt: skip

        def make() -> Engine:
            made = Engine(
                self.guided(model, strategy, _model_key(cell)), strategy, kv_memory=cell.kv_memory,
                host_memory=cell.host_memory if strategy.store.tier.fetches else None, max_num_seqs=cell.max_num_seqs,
                max_model_len=longest, prefill_chunk=cell.prefill_chunk, prefix_caching=bool(cell.prefix_caching),
            )  # fmt: skip
            made.warm_up(lengths if len(lengths) < 4 else [longest - 1])
            shortest = lengths[0]
            output = loads.Fixed(min(8, longest - shortest))
            few = loads.make_load(
                model, num_requests=WARM_UP_REQUESTS, input_len=loads.Fixed(shortest), output_len=output, seed=cell.seed + 1
            )
            serve.serve(made, few)
            return made

        return make() if cell.prefix_caching else self._engines.get(key, make)


def maps_in_use() -> float:
    """Of the memory maps that a process may have, the share that this one has; 0 where the system does not say."""
    try:
        most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
        with pathlib.Path("/proc/self/maps").open("rb") as maps:
            return sum(1 for _ in maps) / most
    except (OSError, ValueError):
        return 0.0


class Kept[T]:
    """The last few things that were made, by key."""

    def __init__(self, most: int):
        self._most = most
        self._made: collections.OrderedDict[Any, T] = collections.OrderedDict()

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """What was made for `key`, or is made now in place of what was wanted least lately."""
        if key not in self._made:
            while len(self._made) >= self._most:
                self._made.popitem(last=False)
            self._made[key] = make()
        self._made.move_to_end(key)
        return self._made[key]

    def clear(self) -> None:
        self._made.clear()


def _model_key(cell: HasModel) -> tuple[Any, ...]:
    return cell.model, cell.num_layers, cell.random_weights


def strategy_in(cell: HasStrategy) -> Strategy:
    """The strategy of a cell, its budget set."""
    strategy = parse_strategy(cell.strategy)
    return as_strategy(strategy if cell.budget is None else Strategy(strategy.policy.with_budget(cell.budget), strategy.store))


def match(strategy: Strategy, cell: Offline, sizes: matching.Sizes) -> matching.Match:
    """The strategy at the price of a cell. Raises MemoryLimitError when there is none."""
    if cell.target is None:
        raise SpecError(f"currency={cell.currency} has no price; give a target")
    target = cell.target if cell.currency == "tokens" else parse_memory(cell.target)
    try:
        return matching.match(strategy, cell.currency, float(target), sizes)  # type: ignore[arg-type]
    except matching.MatchError as error:
        raise MemoryLimitError(str(error)) from None


def check_limit(strategy: Strategy, limit: int, sizes: matching.Sizes) -> None:
    """Raises MemoryLimitError for a batch whose cache has more bytes on the device than it may."""
    need = matching.cost(strategy, "device_bytes", sizes)
    if need > limit:
        raise MemoryLimitError(f"a batch of {sizes.batch} takes {need:.0f} bytes of cache on the device; the limit is {limit}")


def shape_of(config: ModelConfig, dtype: str = "float32") -> CacheShape:
    """The sizes of a model that its cache depends on, without the model."""
    return CacheShape(config.num_layers, config.num_kv_heads, config.group_size, config.head_dim, jnp.dtype(dtype))


def rate_of(rate: float | str) -> float:
    """Requests per second. Raises SpecError."""
    try:
        return float(rate)
    except ValueError:
        raise SpecError(f"request_rate={rate!r} is no rate; give requests per second, or inf for all at once") from None


def latency_samples(timelines) -> Record:
    """Milliseconds of every request, in order; None for one that did not end (and the time per token of a single one)."""
    found: Record = {"ttft_ms": [], "tpot_ms": [], "e2el_ms": []}
    for timeline in timelines:
        for name, values in found.items():
            seconds = None if timeline is None else getattr(timeline, name.removesuffix("_ms"))
            values.append(None if seconds is None else 1e3 * seconds)
    return found
