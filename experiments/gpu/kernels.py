"""Timings of the kernels, beside a copy on the same card in the same run, XLA's own attention and cuDNN's, and the bars they are held to.

Every entry names the bytes it cannot do without; over the time that is a rate, to be compared with the copy's. Implementations are forced:
a kernel that does not run is a failure and not a fallback.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.gather import gather_tokens
from kvjax.kernels.gather import mosaic_gpu as gather_gpu
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.h2o_evict import mosaic_gpu as h2o_gpu
from kvjax.kernels.paged_attention import Statistics, paged_attention
from kvjax.kernels.paged_attention import mosaic_gpu as paged_gpu
from kvjax.kernels.paged_attention.mosaic_gpu import Tiling
from kvjax.kernels.prefill_attention import column_mass, prefill_attention
from kvjax.kernels.prefill_attention import mosaic_gpu as prefill_gpu
from kvjax.kernels.speculate import mosaic_gpu as speculate_gpu
from kvjax.kernels.speculate import speculate

from experiments.gpu.book import Book, Record, table
from experiments.gpu.timing import Step, after, measure, sets_for
from kvjax.files import replace
from tests.kernels import shapes
from tests.kernels.shapes import Geometry

MOST_STATISTICS, MOST_EVICT, MOST_MASS, LEAST_OF_COPY = 0.05, 0.05, 0.60, 0.90
TOY = Geometry("toy", 4, 2, 64)


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to time.

    Attributes:
      carries: as in timing.measure, of as many sets as there will be.
      sets: makes one set of arguments from a key.
      moved: bytes a call cannot do without; 0: it is not judged by them.
    """

    step: Step
    carries: Callable[[int], Sequence[Any]]
    sets: Callable[[jax.Array], Any]
    moved: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A job by name; `make` allocates nothing before it is called."""

    operation: str
    implementation: str
    case: str
    make: Callable[[], Job]

    @property
    def name(self) -> str:
        return f"{self.operation} {self.implementation} {self.case}"


def perform(book: Book, dry_run: bool) -> None:
    """Times every entry, then writes kernels.md."""
    listed = list(entries(dry_run))
    book.drop([entry.name for entry in listed])
    for entry in listed:
        about = {"operation": entry.operation, "implementation": entry.implementation, "shape": entry.case}
        book.run(entry.name, lambda entry=entry: timed(entry.make(), book, dry_run), about)  # type: ignore[misc]
    replace(book.directory / "kernels.md", markdown(book))
    book.console.print(markdown(book), markup=False, highlight=False)


def timed(job: Job, book: Book, dry_run: bool) -> Record:
    first = jax.block_until_ready(jax.jit(job.sets)(jax.random.key(0)))
    count = 2 if dry_run else sets_for((first, job.carries(1)))
    arguments = [first, *(jax.block_until_ready(jax.jit(job.sets)(jax.random.key(i))) for i in range(1, count))]
    few: dict[str, Any] = dict(calls=(1, 2), repetitions=2) if dry_run else {}
    found = measure(job.step, job.carries(count), arguments, trace_dir=None if dry_run else book.directory / "trace", **few)
    record = found.record() | {"moved_bytes": job.moved}
    return record | ({"bytes_per_second": job.moved / found.best} if job.moved else {})


# ------------------------------------------------------------------------------------------------------------------------------- entries


def entries(dry_run: bool) -> Iterator[Entry]:
    """All of them, at toy sizes in a dry run."""
    kernel: Name = "xla" if dry_run else "mosaic_gpu"
    yield Entry("copy", "xla", "1 GiB" if not dry_run else "1 MiB", lambda: copy_job(2**20 if dry_run else 2**30))
    geometries = (TOY,) if dry_run else (shapes.LLAMA_3_8B, shapes.OPT_6_7B, shapes.OPT_13B)
    batch, context, page_size = (2, 128, 64) if dry_run else (32, 8192, 64)
    for at in geometries:
        case = f"{at.name} b{batch} c{context} z{page_size}"
        for variant in ("", "statistics", "int8"):
            yield _paged(kernel, at, batch, context, page_size, variant)
        yield _paged(kernel, at, batch, context, 16, "")
        yield Entry("attention", "xla", case, lambda at=at: dense_job("xla", at, batch, context))  # type: ignore[misc]
        if not dry_run:
            yield Entry("attention", "cudnn", case, lambda at=at: dense_job("cudnn", at, batch, context))  # type: ignore[misc]
    yield _paged("xla", geometries[0], batch, context, page_size, "")
    if not dry_run:
        yield _paged(kernel, shapes.LLAMA_3_8B, 1, 131072, 128, "")
    for at in geometries[:2]:
        yield from _h2o(kernel, at, batch, context)
    for at in geometries:
        rows, size = (1, 128) if dry_run else ((1, 8192) if at is shapes.LLAMA_3_8B else (4, 2048))
        yield from _prefill(kernel, at, rows, size, dry_run)
    for implementation in dict.fromkeys((kernel, "xla")):
        for at in geometries[:2]:
            yield _speculate(implementation, at, batch, context)
            yield _gather(implementation, at, batch, context)


def copy_job(size: int) -> Job:
    """Negation: every byte is read and written. What was written last is what is read next, so the array has to exceed the caches."""
    count = size // 2

    def step(x, nothing):
        return jax.lax.optimization_barrier(-x), ()

    return Job(step, lambda sets: [jnp.ones(count, jnp.bfloat16)], lambda key: (), 2 * size)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _paged(implementation: Name, at: Geometry, batch: int, context: int, page_size: int, variant: str) -> Entry:
    case = f"{at.name} b{batch} c{context} z{page_size}" + f" {variant}" * bool(variant)
    return Entry("paged_attention", implementation, case, lambda: paged_job(implementation, at, batch, context, page_size, variant))


def paged_job(
    implementation: Name, at: Geometry, batch: int, context: int, page_size: int, variant: str = "", config: Tiling | None = None
) -> Job:
    """Full rows, their pages in no order. The output is the next call's query."""
    pages = context // page_size
    pool = (batch * pages, at.kv_heads, page_size, at.head_dim)
    statistics, stored = variant == "statistics", jnp.int8 if variant == "int8" else jnp.bfloat16

    def sets(key):
        k, v, p = jax.random.split(key, 3)
        tables = jax.random.permutation(p, batch * pages).reshape(batch, pages).astype(jnp.int32)
        found = dict(block_tables=tables, lengths=jnp.full(batch, context, jnp.int32))
        if stored == jnp.int8:
            found |= {f"{n}_pages": jax.random.randint(x, pool, -127, 128, jnp.int8) for n, x in (("k", k), ("v", v))}
            return found | {f"{n}_scales": jnp.full(pool[:3], 0.01, jnp.float32) for n in "kv"}
        return found | {f"{n}_pages": normal(x, pool) for n, x in (("k", k), ("v", v))}

    def step(q, given):
        if config is not None:
            given = given | dict(block_tables=given["block_tables"][:, None], scale=at.head_dim**-0.5)
            return paged_gpu.paged_attention(q, **given, config=config)[0], ()
        result: Any = paged_attention(q, **given, statistics=statistics, implementation=implementation)
        return result if statistics else (result, ())

    def carries(count):
        return [normal(jax.random.key(9), (batch, at.heads, at.head_dim))]

    moved = 2 * math.prod(pool) * jnp.dtype(stored).itemsize + (8 * math.prod(pool[:3]) if variant == "int8" else 0)
    return Job(step, carries, sets, moved)


def dense_job(implementation: str, at: Geometry, batch: int, context: int) -> Job:
    """`jax.nn.dot_product_attention` of one query a row over as many tokens, in one piece."""
    shape = (batch, context, at.kv_heads, at.head_dim)

    def sets(key):
        return [normal(x, shape) for x in jax.random.split(key)]

    def step(q, given):
        implementations: Any = implementation
        return jax.nn.dot_product_attention(q, *given, implementation=implementations), ()

    return Job(step, lambda count: [normal(jax.random.key(9), (batch, 1, at.heads, at.head_dim))], sets, 4 * math.prod(shape))


def _h2o(implementation: Name, at: Geometry, batch: int, context: int) -> Iterator[Entry]:
    """The attention over the slots that H2O keeps, a tenth and a tenth, and the eviction that follows it."""
    capacity = -(-(context // 5 + 1) // 128) * 128
    case = f"{at.name} b{batch} c{capacity}"
    yield Entry("h2o_attention", implementation, case, lambda: h2o_attention_job(implementation, at, batch, capacity))
    yield Entry("h2o_evict", implementation, case, lambda: evict_job(implementation, at, batch, capacity))


def h2o_attention_job(implementation: Name, at: Geometry, batch: int, capacity: int) -> Job:
    """With logits, log-sum-exps and positions, every kv head with tokens of its own, pages of 128."""
    pages, page_size = capacity // 128, 128
    pool = (batch * pages, at.kv_heads, page_size, at.head_dim)

    def sets(key):
        k, v, p = jax.random.split(key, 3)
        return dict(
            k_pages=normal(k, pool),
            v_pages=normal(v, pool),
            block_tables=jax.random.permutation(p, batch * pages).reshape(batch, pages).astype(jnp.int32),
            lengths=jnp.full(batch, capacity, jnp.int32),
            visible=jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, at.kv_heads, capacity)),
        )

    def step(q, given):
        return paged_attention(q, **given, statistics=True, implementation=implementation)

    return Job(step, lambda count: [normal(jax.random.key(9), (batch, at.heads, at.head_dim))], sets, 4 * math.prod(pool))


def evict_job(implementation: Name, at: Geometry, batch: int, capacity: int, span: int | None = None) -> Job:
    """Score and evict in place. A full row is over its budget, half of its slots, for as many calls as that."""
    group, heads = at.heads // at.kv_heads, at.kv_heads
    slots = (batch, heads, capacity)

    def sets(key):
        logits = jax.random.normal(key, (batch, heads, group, capacity), jnp.float32)
        row = jnp.full(batch, 9 * capacity, jnp.int32)
        statistics = Statistics(logits, jax.nn.logsumexp(logits, -1))
        return statistics, row, jnp.full(batch, capacity // 2, jnp.int32), row // 90, jnp.ones(batch, bool)

    def carries(count):
        position = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), slots)
        score = jax.random.uniform(jax.random.key(5), slots)
        return [(position, score) for _ in range(count)]

    def step(kept, given):
        if span is not None:
            *kept, slot = h2o_gpu.h2o_evict(*kept, *given, span=span)
        else:
            *kept, slot = h2o_evict(*kept, *given, implementation=implementation)
        return tuple(kept), slot

    return Job(step, carries, sets, math.prod(slots) * 4 * (group + 3))


def _prefill(kernel: Name, at: Geometry, batch: int, size: int, dry_run: bool) -> Iterator[Entry]:
    case = f"{at.name} b{batch} {size}x{size}"
    yield Entry("prefill_attention", kernel, case, lambda: prefill_job(kernel, at, batch, size))
    flash = "xla" if dry_run else "cudnn"
    yield Entry("flash_prefill", flash, case, lambda: flash_job(flash, at, batch, size))
    yield Entry("column_mass", kernel, case, lambda: mass_job(kernel, at, batch, size))


def prefill_job(implementation: Name, at: Geometry, batch: int, size: int, stages: int | None = None) -> Job:
    row = jnp.zeros(batch, jnp.int32)

    def sets(key):
        return [normal(x, (batch, size, at.kv_heads, at.head_dim)) for x in jax.random.split(key)]

    def step(q, given):
        if stages is not None:
            return prefill_gpu.prefill_attention(q, *given, row, row + size, at.head_dim**-0.5, stages=stages)
        return prefill_attention(q, *given, row, row + size, implementation=implementation)

    return Job(step, lambda count: [normal(jax.random.key(9), (batch, size, at.heads, at.head_dim))], sets, 0)


def flash_job(implementation: str, at: Geometry, batch: int, size: int) -> Job:
    """The fused attention that JAX offers, causal, without statistics."""

    def sets(key):
        return [normal(x, (batch, size, at.kv_heads, at.head_dim)) for x in jax.random.split(key)]

    def step(q, given):
        implementations: Any = implementation
        return jax.nn.dot_product_attention(q, *given, is_causal=True, implementation=implementations), ()

    return Job(step, lambda count: [normal(jax.random.key(9), (batch, size, at.heads, at.head_dim))], sets, 0)


def mass_job(implementation: Name, at: Geometry, batch: int, size: int, config: Any = None) -> Job:
    """On queries that attended a little to everything, so that the log-sum-exp need not be computed."""

    def sets(key):
        q, k = jax.random.split(key)
        lse = jnp.log1p(jnp.arange(size, dtype=jnp.float32)) + 0.5
        shape = (batch, size, at.heads, at.head_dim)
        return normal(q, shape), normal(k, (batch, size, at.kv_heads, at.head_dim)), jnp.broadcast_to(lse, (batch, at.heads, size))

    def step(start, given):
        if config is not None:
            mass = prefill_gpu.column_mass(*given, start, start + size, at.head_dim**-0.5, config=config)
        else:
            mass = column_mass(*given, start, start + size, implementation=implementation)
        return after(start, mass), mass

    return Job(step, lambda count: [jnp.zeros(batch, jnp.int32)], sets, 0)


def _speculate(implementation: Any, at: Geometry, batch: int, context: int) -> Entry:
    case = f"{at.name} b{batch} c{context} d{int(0.3 * at.head_dim)}"
    return Entry("speculate", implementation, case, lambda: speculate_job(implementation, at, batch, context))


def speculate_job(implementation: Name, at: Geometry, batch: int, context: int, config: Any = None) -> Job:
    """InfiniGen's 0.3 of the head dim, a fifth of the context at most."""
    group, dim, limit = at.heads // at.kv_heads, int(0.3 * at.head_dim), context // 5
    keys = (batch, at.kv_heads, dim, context)

    def sets(key):
        q, k = jax.random.split(key)
        return normal(q, (batch, at.kv_heads, group, dim)), normal(k, keys), jnp.ones((batch, 1, context), bool)

    def step(cap, given):
        if config is not None:
            found = speculate_gpu.speculate(*given, cap, None, 4.0, limit, config=config)
        else:
            found = speculate(*given, cap, alpha=4.0, limit=limit, implementation=implementation)
        return after(cap, found.maximum), found

    return Job(step, lambda count: [jnp.full(batch, limit, jnp.int32)], sets, 2 * math.prod(keys))


def _gather(implementation: Any, at: Geometry, batch: int, context: int) -> Entry:
    selected = context // 16
    case = f"{at.name} b{batch} c{context} {selected} tokens"
    return Entry("gather", implementation, case, lambda: gather_job(implementation, at, batch, context, selected))


def gather_job(implementation: Name, at: Geometry, batch: int, context: int, selected: int, block_bytes: int | None = None) -> Job:
    """Keys and values of a token in one row; random slots."""
    pool = (batch, at.kv_heads, context, 2 * at.head_dim)

    def sets(key):
        x, s = jax.random.split(key)
        return normal(x, pool), jax.random.randint(s, (batch, at.kv_heads, selected), 0, context, jnp.int32)

    def step(shift, given):
        values, slots = given
        if block_bytes is not None:
            first = jnp.arange(batch * at.kv_heads, dtype=jnp.int32)[:, None] * context
            index = (slots.reshape(-1, selected) + first + shift).reshape(-1)
            block = gather_gpu.gather_rows(values.reshape(-1, pool[-1]), index, block_bytes=block_bytes)
        else:
            block = gather_tokens(values, slots + shift, implementation=implementation)
        return after(shift, block), block

    return Job(step, lambda count: [jnp.zeros((), jnp.int32)], sets, 2 * batch * at.kv_heads * selected * pool[-1] * 2)


# ---------------------------------------------------------------------------------------------------------------------------------- bars


def best(record: Record) -> float:
    """Seconds of the kernels alone where they were seen, else of a call."""
    return record["kernel_seconds"] if record.get("kernel_seconds") is not None else record["median_seconds"]


def bars(records: Sequence[Record]) -> Iterator[tuple[str, float | None, float, bool]]:
    """What the project holds its kernels to: in words, what was found, the limit, and whether more is better."""
    at = {(r["operation"], r["implementation"], r["shape"]): r for r in records}
    ours = {key: r for key, r in at.items() if key[1] == "mosaic_gpu"}
    copy = next((r["bytes_per_second"] for key, r in at.items() if key[0] == "copy"), None)
    for (operation, _, shape), r in ours.items():
        if operation == "paged_attention" and shape.endswith(" b32 c8192 z64"):
            group = "G=4" if shape.startswith("llama-3-8b") else "G=1"
            rate = None if copy is None else r["bytes_per_second"] / copy
            yield f"paged decode, {shape} ({group}): of the copy's bandwidth", rate, LEAST_OF_COPY, True
            more = ours.get((operation, "mosaic_gpu", f"{shape} statistics"))
            yield f"statistics, {shape}: more time", best(more) / best(r) - 1 if more else None, MOST_STATISTICS, False
        if operation == "h2o_evict":
            attention = ours.get(("h2o_attention", "mosaic_gpu", shape))
            yield f"evict, {shape}: of its attention", best(r) / best(attention) if attention else None, MOST_EVICT, False
        if operation == "column_mass":
            flash = at.get(("flash_prefill", "cudnn", shape)) or ours.get(("prefill_attention", "mosaic_gpu", shape))
            yield f"column mass, {shape}: of a flash prefill", best(r) / best(flash) if flash else None, MOST_MASS, False


def markdown(book: Book, peers: Sequence[Record] = ()) -> str:
    """The bars, the times, and what failed."""
    records = book.found
    device = records[0]["device_kind"] if records else "no device"
    lines = ["# Kernels: times and bars", "", f"On {device}, jax {records[0]['jax_version'] if records else '-'}."]
    if book.dry_run:
        lines += ["", "A dry run at toy sizes, with XLA's implementations on a CPU: the times mean nothing and no bar is judged."]
    judged = [
        [words, "-" if value is None else f"{value:.1%}", f"{'at least' if more else 'at most'} {limit:.0%}", _verdict(value, limit, more)]
        for words, value, limit, more in bars(records)
    ]
    lines += ["", table(["bar", "found", "asked for", "verdict"], judged) if judged else "No kernel was timed: no bar is judged."]
    rows = []
    for r in records:
        numbers = (r.get("kernel_seconds"), r["median_seconds"])
        spread = [f"{1e6 * f(r['samples_seconds']):.1f}" for f in (min, max)]
        rate = f"{r['bytes_per_second'] / 1e9:.0f}" if "bytes_per_second" in r else "-"
        times = ["-" if t is None else f"{1e6 * t:.1f}" for t in numbers]
        rows.append([r["operation"], r["implementation"], r["shape"], *times, " to ".join(spread), rate])
    lines += ["", table(["operation", "implementation", "shape", "kernels (us)", "a call (us)", "from, to (us)", "GB/s"], rows)]
    failed = [f"- {r['case']}: {r['failure']}" for r in book.records.values() if "failure" in r]
    lines += ["", "Failed:", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _verdict(value: float | None, limit: float, more: bool) -> str:
    if value is None or not np.isfinite(value):
        return "not measured"
    return "met" if (value >= limit if more else value <= limit) else "missed"
