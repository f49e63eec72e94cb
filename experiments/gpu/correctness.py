"""The kernels' own cases on the card: those of the tests, larger ones, and whether two runs agree to the last bit.

Inputs are random, from the seed that the record has. A case that was tuned otherwise than the rule, or that only a large card's tiles
reach, is among the larger ones.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.kernels.dispatch import Name
from kvjax.kernels.gather import gather_rows
from kvjax.kernels.h2o_evict import h2o_evict
from kvjax.kernels.prefill_attention import column_mass, prefill_attention
from kvjax.kernels.prefill_attention import mosaic_gpu as prefill_gpu
from kvjax.kernels.speculate import speculate

from experiments.gpu.book import Book, Record, table
from kvjax.files import replace
from tests.kernels.gather import cases as gather_cases
from tests.kernels.h2o_evict import cases as h2o_cases
from tests.kernels.paged_attention import cases as paged_cases
from tests.kernels.prefill_attention import cases as prefill_cases
from tests.kernels.speculate import cases as speculate_cases

Verify = Callable[[np.random.Generator, Name], None]
PagedCase = paged_cases.Case
PrefillCase = prefill_cases.Case

LARGE_PAGED = {
    "llama b4 c8192": PagedCase((8192, 4097, 1, 0), kv_heads=8, group=4, dim=128, page_size=64, pages=128),
    "opt d80 b3 c2048": PagedCase((2048, 2047, 65), kv_heads=32, group=1, dim=80, page_size=16, pages=128),
    "one row of 131072": PagedCase((131071,), kv_heads=2, group=4, dim=128, page_size=128, pages=1024),
    "h2o b4 c1664": PagedCase((1664,) * 4, kv_heads=8, group=4, dim=128, page_size=128, pages=13, visible=(8, jnp.int32)),
    "int8 b4 c4096": PagedCase((4096, 4001, 33, 1), int8=True, kv_heads=8, group=4, dim=128, page_size=32, pages=128),
    "float32 b2 c2048": PagedCase((2048, 1000), jnp.float32, kv_heads=4, group=2, dim=128, page_size=64, pages=32),
    "d256 b2 c2048": PagedCase((2048, 100), kv_heads=1, group=8, dim=256, page_size=64, pages=32),
}
LARGE_PREFILL = (
    PrefillCase(counts=(2048, 1999), kv_heads=2, group=4, dim=128),
    PrefillCase(counts=(4096,), kv_heads=2, group=1, dim=64),
    PrefillCase(counts=(512, 100), starts=(3000, 1), queries=512, keys=3584, kv_heads=2, group=4, dim=128),
)
LARGE_H2O = (
    h2o_cases.Case(capacity=1664, heads=8, group=4, recent=160),
    h2o_cases.Case(capacity=26240, heads=1, group=4, recent=1000),
)
LARGE_SPECULATE = (
    speculate_cases.Case(capacity=8192, heads=8, group=4, dim=38, counts=(8192, 8191, 1), limit=1638),
    speculate_cases.Case(capacity=131072, heads=1, group=1, dim=38, counts=(131072,), limit=2048, scattered=True),
)
LARGE_GATHER = {
    "tokens of llama": gather_cases.Case(262144, 256, 16384),
    "pages of 128": gather_cases.Case(512, 8 * 128 * 128, 300),
}


def perform(book: Book, dry_run: bool) -> None:
    """Runs every case that the device can run, then writes correctness.md."""
    listed = list(cases(dry_run))
    book.drop([name for name, *_ in listed])
    for name, operation, implementation, verify in listed:
        about = {"operation": operation, "implementation": implementation}
        book.run(name, partial(_checked, verify, implementation), about)
    replace(book.directory / "correctness.md", markdown(book))
    book.console.print(markdown(book), markup=False, highlight=False)


def _checked(verify: Verify, implementation: Name) -> Record:
    seed = secrets.randbits(64)
    try:
        verify(np.random.default_rng(seed), implementation)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from None
    return {"seed": str(seed), "answer": "ok"}


def cases(dry_run: bool) -> Iterator[tuple[str, str, Name, Verify]]:
    """Name, operation, implementation and check. A dry run has the first ones alone, in XLA, and one kernel in its interpreter."""
    names: tuple[Name, ...] = ("xla",) if dry_run else ("mosaic_gpu", "xla")
    for implementation in names:
        for operation, found in _listed(implementation).items():
            chosen = dict(list(found.items())[:1]) if dry_run else found
            for case, verify in chosen.items():
                yield f"{operation} {implementation} {case}", operation, implementation, verify
    if dry_run:
        interpreted = partial(_call, gather_cases.verify, gather_cases.CASES["one row"])
        yield "gather mosaic_gpu one row", "gather", "mosaic_gpu", interpreted
        return
    for operation, verify in _repeated().items():
        yield f"{operation} mosaic_gpu twice the same", operation, "mosaic_gpu", verify
    for config in prefill_gpu.CONFIGS:
        prompts = PrefillCase(counts=(700, 260), kv_heads=2, group=2, dim=128)
        yield f"column_mass mosaic_gpu {config}", "column_mass", "mosaic_gpu", partial(_mass_with, config, prompts)


def _listed(implementation: Name) -> dict[str, dict[str, Verify]]:
    """By operation and case."""
    paged = {name: case for name, case in (paged_cases.CASES | LARGE_PAGED).items() if paged_cases.supported(implementation, case)}
    prefill = [*prefill_cases.CASES, *LARGE_PREFILL]
    attention = [case if case.dim in (64, 128) else dataclasses.replace(case, dim=64) for case in prefill]
    if implementation == "xla":
        prefill, attention = prefill + prefill_cases.EXACT, attention + prefill_cases.EXACT
    return {
        "paged_attention": {name: partial(_call, paged_cases.verify, case) for name, case in paged.items()},
        "prefill_attention": {str(case): partial(_call, prefill_cases.verify_attention, case) for case in attention},
        "column_mass": {str(case): partial(_call, prefill_cases.verify_mass, case) for case in prefill},
        "h2o_evict": {str(case): partial(_call, h2o_cases.verify, case) for case in (*h2o_cases.CASES, *LARGE_H2O)},
        "speculate": {str(case): partial(_call, speculate_cases.verify, case) for case in (*speculate_cases.CASES, *LARGE_SPECULATE)},
        "gather": {name: partial(_call, gather_cases.verify, case) for name, case in (gather_cases.CASES | LARGE_GATHER).items()},
    }


def _call(verify: Callable[[Any, np.random.Generator, Name], None], case: Any, rng: np.random.Generator, implementation: Name) -> None:
    verify(case, rng, implementation)


def _mass_with(config: Any, case: Any, rng: np.random.Generator, implementation: Name) -> None:
    """Every choice of tiles that a card may be given."""

    def function(q, k, lse, start, count, scale=None, implementation=None):
        return prefill_gpu.column_mass(q, k, lse, start, count, scale or q.shape[-1] ** -0.5, config=config)

    prefill_cases.verify_mass(case, rng, implementation, function)


def _repeated() -> dict[str, Verify]:
    """Runs a large case several times and compares bit for bit: an error that moves is a race."""

    def paged(rng, implementation):
        given = paged_cases.arguments(LARGE_PAGED["llama b4 c8192"], rng)
        _same(lambda: paged_cases.run(implementation, given, statistics=True))

    def attention(rng, implementation):
        p = prefill_cases.problem(LARGE_PREFILL[0], rng)
        _same(lambda: prefill_cases.call(prefill_attention, implementation, p.q, p.k, p.v, p.start, p.count))

    def mass(rng, implementation):
        p = prefill_cases.problem(LARGE_PREFILL[0], rng)
        lse = np.zeros((p.q.shape[0], p.q.shape[2], p.q.shape[1]), np.float32) + 8
        _same(lambda: prefill_cases.call(column_mass, implementation, p.q, p.k, lse, p.start, p.count))

    def evict(rng, implementation):
        given = h2o_cases.problem(LARGE_H2O[0], rng)
        _same(lambda: h2o_cases.outcome(h2o_evict, given.arguments, implementation))

    def guess(rng, implementation):
        case = LARGE_SPECULATE[0]
        given = speculate_cases.problem(case, rng)
        _same(lambda: speculate_cases.call(case, given, implementation, speculate))

    def gather(rng, implementation):
        given = gather_cases.arguments(LARGE_GATHER["tokens of llama"], rng)
        _same(lambda: gather_cases.run(implementation, gather_rows, *given))

    return {
        "paged_attention": paged,
        "prefill_attention": attention,
        "column_mass": mass,
        "h2o_evict": evict,
        "speculate": guess,
        "gather": gather,
    }


def _same(run: Callable[[], Any], times: int = 5) -> None:
    first, *others = ([np.asarray(x) for x in jax.tree.leaves(run())] for _ in range(times))
    for other in others:
        for a, b in zip(first, other, strict=True):
            if not np.array_equal(np.ascontiguousarray(a).reshape(-1).view(np.uint8), np.ascontiguousarray(b).reshape(-1).view(np.uint8)):
                raise AssertionError(f"two runs differ in {np.count_nonzero(a != b)} of {a.size} numbers")


def markdown(book: Book) -> str:
    records: Sequence[Record] = list(book.records.values())
    failed = [r for r in records if "failure" in r]
    lines = ["# Kernels against their references", ""]
    if book.dry_run:
        lines += ["A dry run on a CPU: the first case of every operation in XLA, and one kernel in its interpreter.", ""]
    rows = []
    for operation, implementation in sorted({(r["operation"], r["implementation"]) for r in records}):
        mine = [r for r in records if (r["operation"], r["implementation"]) == (operation, implementation)]
        rows.append([operation, implementation, str(len(mine)), str(sum("failure" not in r for r in mine))])
    lines += [table(["operation", "implementation", "cases", "passed"], rows)]
    lines += ["", "Failed:", "", *(f"- {r['case']}: {r['failure']}" for r in failed)] if failed else ["", "None failed."]
    return "\n".join(lines) + "\n"
