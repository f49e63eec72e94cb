"""Small questions that only a card answers. Each has a record with the question, the answer in words, and the numbers behind it.

launch            do kernels at real shapes start, and with how much shared memory
command_buffers   are they recorded into command buffers, and what does a launch cost without
overlap           does a copy from pinned host memory hide behind a product in one program
zero_copy         does a Mosaic GPU kernel take operands that stand in pinned host memory, and how fast does it read them
host_gather       a gather by host compute inside a program, against the same rows copied whole
triton            the decode attention that JAX ships for Triton, against the kernel here
scatter           does promising unique indices make a scatter into pages faster
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on
from kvjax.kernels.gather import gather_rows

from experiments.gpu import kernels
from experiments.gpu.book import Book, Record
from experiments.gpu.kernels import TOY, normal
from experiments.gpu.timing import measure
from kvjax.files import replace
from tests.kernels import shapes
from tests.kernels.shapes import Geometry


def perform(book: Book, dry_run: bool) -> None:
    """Asks every question, then writes probes.md."""
    book.drop(list(QUESTIONS))
    for name, (question, probe) in QUESTIONS.items():
        book.run(name, partial(probe, book, dry_run), {"question": question})
    replace(book.directory / "probes.md", markdown(book))


def wall(call: Callable[[], Any], repetitions: int = 7) -> float:
    """Median seconds of a call and all it does, dispatch included; after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def in_host_memory(x: jax.Array) -> jax.Array:
    return jax.block_until_ready(jax.device_put(x, jax.memory.Space.Host))


def launch(book: Book, dry_run: bool) -> Record:
    """Head dims and page sizes of every model that is named, once each, with NaN looked for in the output."""
    implementation: Any = "xla" if dry_run else "mosaic_gpu"
    geometries = (TOY,) if dry_run else (shapes.LLAMA_3_8B, shapes.OPT_2_7B, shapes.LLAMA_3_2_1B, shapes.PHI_3_MINI, shapes.GEMMA_2B)
    refused: dict[str, str] = {}
    tried = 0
    for at in geometries:
        for page_size in (16, 32, 64, 128):
            job = kernels.paged_job(implementation, at, 2, 256, page_size)
            tried += 1
            try:
                out, _ = jax.jit(job.step)(job.carries(1)[0], job.sets(jax.random.key(0)))
                if not bool(jnp.isfinite(out.astype(jnp.float32)).all()):
                    refused[f"{at.name} z{page_size}"] = "the output is not finite"
            except Exception as error:
                refused[f"{at.name} z{page_size}"] = " ".join(str(error).split())[:200]
    return {"answer": f"{tried - len(refused)} of {tried} started and gave finite numbers", "refused": refused}


def command_buffers(book: Book, dry_run: bool) -> Record:
    """A short kernel many times in one program: what a call takes beyond the kernel, with and without command buffers."""
    at = TOY if dry_run else shapes.LLAMA_3_8B
    few: dict[str, Any] = dict(calls=(1, 2), repetitions=2) if dry_run else dict(calls=(10, 110), trace_dir=book.directory / "trace")
    found: Record = {}
    ways: dict[str, dict[str, Any] | None] = {"default": None}
    if not dry_run:
        ways["off"] = {"xla_gpu_enable_command_buffer": ""}
        ways["with the kernel"] = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"}
    for name, options in ways.items():
        job = kernels.evict_job("xla" if dry_run else "mosaic_gpu", at, 4, 128)
        arguments = [job.sets(jax.random.key(i)) for i in range(2)]
        try:
            timed = measure(job.step, job.carries(2), arguments, compiler_options=options, **few)
            found[name] = timed.record()
        except Exception as error:
            found[name] = {"refused": " ".join(str(error).split())[:300]}
    told = []
    for name, record in found.items():
        if "refused" in record:
            told.append(f"{name}: refused ({record['refused'][:80]})")
        else:
            kernel = record["kernel_seconds"]
            told.append(f"{name}: {1e6 * record['median_seconds']:.1f} us a call" + (f", {1e6 * kernel:.1f} in kernels" if kernel else ""))
    return {"answer": "; ".join(told), "ways": found}


def overlap(book: Book, dry_run: bool) -> Record:
    """A copy to the device and a chain of products that does not need it, alone and in one program."""
    size, order, products = (2**20, 64, 2) if dry_run else (2**28, 8192, 8)
    away = in_host_memory(jnp.ones(size, jnp.bfloat16))
    matrix = jnp.eye(order, dtype=jnp.bfloat16)

    def copied(x):
        return jax.device_put(x, jax.memory.Space.Device)

    def multiplied(x):
        for _ in range(products):
            x = x @ matrix
        return x

    copy, product, both = jax.jit(copied), jax.jit(multiplied), jax.jit(lambda a, x: (copied(a), multiplied(x)))
    alone = wall(lambda: copy(away)), wall(lambda: product(matrix))
    together = wall(lambda: both(away, matrix))
    hidden = (sum(alone) - together) / min(alone)
    numbers = {"copy_seconds": alone[0], "product_seconds": alone[1], "both_seconds": together, "hidden_fraction": hidden}
    numbers["link_bytes_per_second"] = 2 * size / alone[0]
    return {"answer": f"{hidden:.0%} of the shorter one hidden; link {numbers['link_bytes_per_second'] / 1e9:.1f} GB/s", **numbers}


def zero_copy(book: Book, dry_run: bool) -> Record:
    """Rows gathered by the kernel from a pool in pinned host memory, compared with the pool."""
    rows, width, count = (64, 128, 16) if dry_run else (2**20, 256, 65536)
    implementation: Any = "xla" if dry_run else "mosaic_gpu"
    pool = jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16)
    index = jax.random.randint(jax.random.key(1), (count,), 0, rows, jnp.int32)
    want = np.asarray(pool[index])
    away = in_host_memory(pool)
    gather = jax.jit(partial(gather_rows, implementation=implementation))
    try:
        got = np.asarray(gather(away, index))
    except Exception as error:
        return {"answer": f"refused: {' '.join(str(error).split())[:200]}", "accepted": False}
    same = bool((got.view(np.uint8) == want.view(np.uint8)).all())
    seconds = wall(lambda: gather(away, index))
    rate = count * width * 2 / seconds
    return {
        "answer": f"accepted, {'right' if same else 'WRONG'}, {rate / 1e9:.1f} GB/s",
        "accepted": True,
        "right": same,
        "seconds": seconds,
    }


def host_gather(book: Book, dry_run: bool) -> Record:
    """What the host store's `jit` transfer does, for one layer of InfiniGen at OPT-13B's shape; against a copy of the whole layer."""
    heads, slots, dim, count = (2, 64, 16, 8) if dry_run else (8 * 40, 2048, 128, 410)
    pool = in_host_memory(jnp.ones((heads, slots, dim), jnp.bfloat16))
    chosen = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32) * (slots // count), (heads, count))

    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,))

    def gathered(pool, chosen):
        def take(pool, rows):  # host memory and the constants of other ways to index do not go together
            within = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
            return jax.lax.gather(pool.reshape(-1, dim), rows[..., None], numbers, (1, dim), mode=within)

        rows = chosen + jnp.arange(heads, dtype=jnp.int32)[:, None] * slots
        on_host = compute_on(take, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
        return on_host(pool, jax.device_put(rows, jax.memory.Space.Host))

    some = jax.jit(gathered)
    every = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))
    gather, whole = wall(lambda: some(pool, chosen)), wall(lambda: every(pool))
    share = count / slots
    told = f"{share:.0%} of a layer by host compute {1e3 * gather:.2f} ms, all of it copied {1e3 * whole:.2f} ms"
    return {"answer": told, "gather_seconds": gather, "whole_seconds": whole, "share": share}


def triton(book: Book, dry_run: bool) -> Record:
    """`jax.experimental.pallas.ops.gpu.decode_attention.gqa`, deprecated, over the same bytes."""
    from jax.experimental.pallas.ops.gpu import decode_attention

    at, batch, context = (TOY, 1, 128) if dry_run else (shapes.LLAMA_3_8B, 32, 8192)
    few: dict[str, Any] = dict(calls=(1, 2), repetitions=2) if dry_run else dict(trace_dir=book.directory / "trace")
    dense = kernels.dense_job("xla", at, batch, context)
    arguments = [dense.sets(jax.random.key(i)) for i in range(2)]
    options: dict[str, Any] = {"interpret": True} if dry_run else {}

    def step(q, given):
        return decode_attention.gqa(q, *given, k_splits=4 if dry_run else 16, **options), ()

    q = normal(jax.random.key(9), (batch, at.heads, at.head_dim))
    theirs = measure(step, [q], arguments, **few)
    paged = kernels.paged_job("xla" if dry_run else "mosaic_gpu", at, batch, context, 64)
    ours = measure(paged.step, paged.carries(1), [paged.sets(jax.random.key(i)) for i in range(2)], **few)
    rates = [dense.moved / x.best / 1e9 for x in (theirs, ours)]
    return {"answer": f"Triton {rates[0]:.0f} GB/s, the kernel here {rates[1]:.0f} GB/s", "triton": theirs.record(), "ours": ours.record()}


def scatter(book: Book, dry_run: bool) -> Record:
    """A token a row into pages, with and without the promise; in place."""
    at: Geometry = TOY if dry_run else shapes.LLAMA_3_8B
    batch, pages, size = (2, 4, 16) if dry_run else (256, 8192, 64)
    few: dict[str, Any] = dict(calls=(1, 2), repetitions=2) if dry_run else dict(trace_dir=book.directory / "trace")
    pool = jnp.zeros((pages, at.kv_heads, size, at.head_dim), jnp.bfloat16)
    found = {}
    for unique in (False, True):

        def step(pool, given, unique=unique):
            page, offset, new = given
            return pool.at[page[:, None], jnp.arange(at.kv_heads), offset[:, None]].set(new, mode="drop", unique_indices=unique), ()

        arguments = []
        for i in range(2):
            page = jax.random.permutation(jax.random.key(i), pages)[:batch].astype(jnp.int32)
            arguments.append((page, page % size, normal(jax.random.key(i), (batch, at.kv_heads, at.head_dim))))
        found[unique] = measure(step, [pool], arguments, **few)
    gain = found[False].best / found[True].best
    told = f"{1e6 * found[True].best:.1f} us with unique_indices, {1e6 * found[False].best:.1f} without: {gain:.2f} times"
    return {"answer": told, "with": found[True].record(), "without": found[False].record()}


QUESTIONS: dict[str, tuple[str, Callable[[Book, bool], Record]]] = {
    "launch": ("Do the kernels start at every head dim and page size?", launch),
    "command_buffers": ("What does a launch cost, and do command buffers take Mosaic kernels?", command_buffers),
    "overlap": ("Does a copy from pinned host memory hide behind compute in one program?", overlap),
    "zero_copy": ("Does a Mosaic GPU kernel take operands in pinned host memory?", zero_copy),
    "host_gather": ("Is a gather by host compute faster than copying the layer whole?", host_gather),
    "triton": ("Is JAX's Triton decode attention faster than the kernel here?", triton),
    "scatter": ("Does unique_indices make the scatter of new tokens faster?", scatter),
}


def markdown(book: Book) -> str:
    lines = ["# Probes", ""]
    lines += ["A dry run on a CPU: only that the questions can be asked.", ""] if book.dry_run else []
    for name, record in book.records.items():
        lines.append(f"- {name}: {record['question']} {record.get('answer') or 'Failed: ' + record.get('failure', '')}")
    return "\n".join(lines) + "\n"
