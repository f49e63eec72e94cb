"""Block sizes: times the configurations of every kernel at real shapes, and makes the tables that stand beside them.

    python -m experiments.gpu_suite --part=tune             times on the card, into tune.jsonl
    python -m experiments.gpu_suite --part=tune --install   puts what was found into kernels/*/tuned.json; needs no card

A configuration enters a table when it takes less than 98 % of the time of what the kernel's own rule chooses; otherwise the rule holds.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from kvjax.kernels import dispatch, tuned
from kvjax.kernels.gather import mosaic_gpu as gather_gpu
from kvjax.kernels.h2o_evict import mosaic_gpu as h2o_gpu
from kvjax.kernels.paged_attention import mosaic_gpu as paged_gpu
from kvjax.kernels.prefill_attention import mosaic_gpu as prefill_gpu
from kvjax.kernels.speculate import mosaic_gpu as speculate_gpu

from experiments.gpu import kernels
from experiments.gpu.book import Book, Record, table
from experiments.gpu.kernels import TOY, Job
from experiments.gpu.timing import measure, sets_for
from kvjax.files import replace
from tests.kernels import shapes

GAIN = 0.98
Config = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Question:
    """Which configuration is best at a shape.

    Attributes:
      key: in the table.
      rule: what the kernel would choose without a table.
      others: to try.
      job: with a configuration.
    """

    operation: str
    key: str
    shape: str
    rule: Config
    others: tuple[Config, ...]
    job: Callable[[Config], Job]

    @property
    def name(self) -> str:
        return f"{self.operation} {self.key} ({self.shape})"


def perform(book: Book, dry_run: bool) -> None:
    """Times every configuration of every question, then writes tune.md."""
    listed = list(questions(dry_run))
    book.drop([question.name for question in listed])
    for question in listed:
        book.run(question.name, partial(_tried, question, book, dry_run), {"operation": question.operation, "key": question.key})
    replace(book.directory / "tune.md", markdown(book))
    book.console.print(markdown(book), markup=False, highlight=False)


def _tried(question: Question, book: Book, dry_run: bool) -> Record:
    """Every configuration's time; one that the card refuses is told why."""
    tried: list[Record] = []
    for config in (question.rule, *(c for c in question.others if c != question.rule)):
        record: Record = {"config": config}
        try:
            with dispatch.interpreted("mosaic_gpu", detect_races=False) if dry_run else contextlib.nullcontext():
                record["seconds"] = _seconds(question.job(config), book, dry_run)
        except Exception as error:
            record["failure"] = " ".join(str(error).split())[:200]
        tried.append(record)
    ran = [record for record in tried if "seconds" in record]
    if not ran or ran[0]["config"] != question.rule:
        raise RuntimeError(f"the rule's own configuration {question.rule} does not run: {tried[0].get('failure')}")
    fastest = min(ran, key=lambda record: record["seconds"])
    gain = fastest["seconds"] / ran[0]["seconds"]
    chosen = fastest["config"] if gain < GAIN else None
    told = f"{chosen}, {gain:.2f} of the rule's time" if chosen else f"the rule, {question.rule}"
    return {"rule": question.rule, "tried": tried, "chosen": chosen, "of_rule": gain, "answer": told}


def _seconds(job: Job, book: Book, dry_run: bool) -> float:
    first = jax.block_until_ready(jax.jit(job.sets)(jax.random.key(0)))
    count = 2 if dry_run else sets_for((first, job.carries(1)))
    arguments = [first, *(jax.block_until_ready(jax.jit(job.sets)(jax.random.key(i))) for i in range(1, count))]
    few: dict[str, Any] = dict(calls=(1, 2), repetitions=1) if dry_run else dict(repetitions=5, trace_dir=book.directory / "trace")
    return measure(job.step, job.carries(count), arguments, **few).best


def questions(dry_run: bool) -> Iterator[Question]:
    """Of every kernel, at the shapes of two models. A dry run asks one of them, in the interpreter."""
    if dry_run:
        yield _gather(TOY, 1, 32, 4)
        return
    cores = dispatch.current_device().cores or paged_gpu.DEFAULT_CORES
    for at, batch, context in ((shapes.LLAMA_3_8B, 32, 8192), (shapes.OPT_6_7B, 32, 8192), (shapes.LLAMA_3_8B, 1, 131072), (shapes.OPT_13B, 8, 2048)):  # fmt: skip # noqa: E501
        yield _paged(at, batch, context, cores)
    for at, batch, size in ((shapes.LLAMA_3_8B, 1, 8192), (shapes.OPT_13B, 4, 2048)):
        yield _mass(at, batch, size, cores)
    yield _attention(shapes.LLAMA_3_8B, 1, 8192)
    for at in (shapes.LLAMA_3_8B, shapes.OPT_6_7B):
        yield _evict(at, 32, 1664)
        yield _speculate(at, 32, 8192)
    yield _gather(shapes.LLAMA_3_8B, 32, 8192, 512)


def _paged(at: shapes.Geometry, batch: int, context: int, cores: int) -> Question:
    sizes = (batch, at.kv_heads, context, at.head_dim, 2)
    rule = paged_gpu.tiling(*sizes, cores)
    stage = 2 * paged_gpu.TILE * at.head_dim * 2
    stages = [n for n in (2, 3, 4) if n * stage <= paged_gpu.SHARED_MEMORY - 48 * 1024]
    splits = sorted({1, max(1, rule.splits // 2), rule.splits, 2 * rule.splits, 4 * rule.splits})
    others = tuple({"splits": a, "stages": b} for a in splits for b in stages)
    key = paged_gpu.tuning_key(batch * at.kv_heads, context, at.head_dim, 2)

    def job(config: Config) -> Job:
        return kernels.paged_job("mosaic_gpu", at, batch, context, 64, config=paged_gpu.Tiling(**config))

    return Question("paged_attention", key, f"{at.name} b{batch} c{context}", dataclasses.asdict(rule), others, job)


def _mass(at: shapes.Geometry, batch: int, size: int, cores: int) -> Question:
    rule = prefill_gpu.config_for(batch, at.kv_heads, size, at.head_dim, cores)
    every = (prefill_gpu.Config(w, q, s) for w in (1, 2, 4) for q in (64, 128) for s in (2, 3, 4))
    fitting = [config for config in every if config.shared_memory(at.head_dim) <= prefill_gpu.SHARED_MEMORY]
    key = prefill_gpu.tuning_key(batch * at.kv_heads, size, at.head_dim)

    def job(config: Config) -> Job:
        return kernels.mass_job("mosaic_gpu", at, batch, size, prefill_gpu.Config(**config))

    others = tuple(dataclasses.asdict(config) for config in fitting)
    return Question("prefill_attention", key, f"{at.name} b{batch} {size}", dataclasses.asdict(rule), others, job)


def _attention(at: shapes.Geometry, batch: int, size: int) -> Question:
    others = tuple({"stages": n} for n in (2, 3, 4))
    rule = {"stages": prefill_gpu.STAGES}

    def job(config: Config) -> Job:
        return kernels.prefill_job("mosaic_gpu", at, batch, size, config["stages"])

    return Question("prefill_attention", prefill_gpu.attention_key(at.head_dim), f"{at.name} b{batch} {size}", rule, others, job)


def _evict(at: shapes.Geometry, batch: int, capacity: int) -> Question:
    group = at.heads // at.kv_heads
    others = tuple({"span": n} for n in (256, 512, 1024))

    def job(config: Config) -> Job:
        return kernels.evict_job("mosaic_gpu", at, batch, capacity, config["span"])

    key = h2o_gpu.tuning_key(group, capacity)
    return Question("h2o_evict", key, f"{at.name} b{batch} c{capacity}", {"span": h2o_gpu.SPAN}, others, job)


def _speculate(at: shapes.Geometry, batch: int, context: int) -> Question:
    group, dim = at.heads // at.kv_heads, int(0.3 * at.head_dim)
    others = tuple({"span": span, "together": n} for span in (128, 256, 512) for n in (4, 8, 16))

    def job(config: Config) -> Job:
        return kernels.speculate_job("mosaic_gpu", at, batch, context, speculate_gpu.Config(**config))

    rule = dataclasses.asdict(speculate_gpu.Config())
    return Question("speculate", speculate_gpu.tuning_key(group, dim), f"{at.name} b{batch} c{context}", rule, others, job)


def _gather(at: shapes.Geometry, batch: int, context: int, selected: int) -> Question:
    others = tuple({"block_bytes": n << 10} for n in ((8,) if at is TOY else (4, 8, 16, 32)))

    def job(config: Config) -> Job:
        return kernels.gather_job("mosaic_gpu", at, batch, context, selected, config["block_bytes"])

    key = gather_gpu.tuning_key(2 * at.head_dim * 2)
    return Question("gather", key, f"{at.name} b{batch} c{context}", {"block_bytes": gather_gpu.BLOCK_BYTES}, others, job)


def install(book: Book) -> None:
    """Puts what was found into the tables beside the kernels; entries of other devices and keys stay."""
    measured = [record for record in book.found if not record["dry_run"]]
    for operation in sorted({record["operation"] for record in measured}):
        found = dict(tuned.table(operation))
        for record in (r for r in measured if r["operation"] == operation):
            mine = dict(found.get(record["device_kind"], {}))
            mine.pop(record["key"], None)
            if record["chosen"]:
                mine[record["key"]] = record["chosen"]
            found[record["device_kind"]] = mine
        found = {device: keys for device, keys in found.items() if keys}
        replace(tuned.where(operation), json.dumps(found, indent=2, sort_keys=True) + "\n")
        tuned.table.cache_clear()
        book.console.print(f"wrote {operation}/{tuned.FILE}", highlight=False)
    if not measured:
        book.console.print(f"nothing was tuned on a card in {book.directory}: the tables stay as they are", highlight=False)


def markdown(book: Book) -> str:
    rows = []
    for record in book.found:
        times = [x["seconds"] for x in record["tried"] if "seconds" in x]
        share = f"{record['of_rule']:.3f}"
        rows.append([record["case"], str(record["rule"]), str(record["chosen"] or "the rule"), share, str(len(times))])
    lines = ["# Block sizes", ""]
    lines += ["A dry run, in the interpreter: the times mean nothing.", ""] if book.dry_run else []
    lines += [table(["kernel, key (shape)", "rule", "chosen", "fastest, of the rule's time", "tried"], rows)]
    lines += ["", *(f"- {r['case']}: {r['failure']}" for r in book.records.values() if "failure" in r)]
    return "\n".join(lines).rstrip() + "\n"
