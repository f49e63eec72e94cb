"""Times decode steps in the paged store beside the dense store, at the same live tokens.

    python -m experiments.bench.paged
    python -m experiments.bench.paged --cells=bench-32m:8:512,kvjax-4m:64:512 --page_sizes=64 --extents=1

A cell is a model, a batch and a context. A prompt is prefilled once per policy, in the dense store, and its slots are copied into pages
that lie about the pool in no order. Dense capacity is the context, which is what is live at the end of a sample. Every store then takes the
same greedy steps; that they agree on every token is checked. They take turns, sample by sample, and a sample during which another process
used more than 15 % of a core is discarded and taken again.

Writes paged.jsonl (a record per cell, policy and store, as cells finish) into --output_dir; cells not measured now keep their records.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import kvjax
from experiments.bench import kvjax_side, machine
from experiments.bench.peers import prompts
from experiments.bench.peers.agree import equal_tokens
from experiments.bench.timing import Sample, Timing, interleave
from kvjax.cache import KVState, Policy, Store, Strategy, dense, paged, parse_policy
from kvjax.cache.pool import page_table
from kvjax.files import json_lines, replace
from kvjax.generation import cache_shape, decode_steps, first_token, run_prefill
from kvjax.models import Model
from kvjax.report.record import setting

FLAGS = flags.FLAGS
BAR, BAR_PAGE_SIZE = 1.10, paged().page_size
_BENCH_32M = [f"{kvjax_side.PRESET}:{batch}:{context}" for batch in (1, 8) for context in (512, 1024, 2048)]


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_list("cells", [*_BENCH_32M, "kvjax-4m:64:512"], "What to measure, each as model:batch:context.")
    flags.DEFINE_list("page_sizes", ["16", "32", "64", "128"], "Slots of a page.")
    flags.DEFINE_list("extents", ["1", "4"], "Arrays the pool is cut into.")
    flags.DEFINE_multi_string("policies", ["full", "h2o(heavy=0.1,recent=0.1)"], "Policies; give the flag once for each.")
    flags.DEFINE_integer("steps", 16, "Decode steps a sample.", lower_bound=1)
    flags.DEFINE_integer("reps", 11, "Samples that count, per store and cell.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Samples before them; the first one compiles.", lower_bound=1)
    flags.DEFINE_integer("retries", 22, "Disturbed samples discarded per store and cell before they count.", lower_bound=0)
    flags.DEFINE_string("work_dir", "runs/bench", "Where the benchmark's model is kept between runs.")
    flags.DEFINE_string("output_dir", "experiments/results/paged_cpu", "Where paged.jsonl goes.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where the stores meet: the last decode step of a sample sees `context` tokens in every row."""

    model: str
    batch: int
    context: int

    @property
    def title(self) -> str:
        return f"{self.model} b{self.batch} c{self.context}"


@dataclasses.dataclass(frozen=True)
class Start:
    """A prefilled prompt in a store: the state, the prompt's next token and what each row still wants. Not to be donated."""

    kv: KVState
    token: jax.Array
    remaining: jax.Array


class Decode:
    """Greedy steps after a prompt; a sample is seconds per step. Decoding takes over the memory of its state, so every turn gets a copy."""

    def __init__(self, model: Model, strategy: Strategy, start: Start, steps: int):
        self.name = strategy.describe()
        self.strategy, self.pid = strategy, os.getpid()
        self._model, self._start, self._steps = model, start, steps

    def prepare(self) -> None:
        start = self._start
        self._given = jax.block_until_ready(jax.tree.map(jnp.copy, (start.kv, start.token, start.remaining)))

    def sample(self) -> Sample:
        kv, token, remaining = self._given
        del self._given
        model = self._model
        began = time.perf_counter()
        end = decode_steps(model.decoder, self.strategy, (), self._steps, model.params, kv, token, remaining)
        jax.block_until_ready(end)
        seconds = time.perf_counter() - began
        return Sample(seconds / self._steps, tuple(tuple(int(t) for t in row) for row in np.asarray(end[-1])))


def prefilled(model: Model, policy: Policy, cell: Cell, steps: int) -> Start:
    """The cell's prompts in a dense store that has no slot to spare."""
    length = cell.context - steps
    rows = np.array(prompts.prompt(cell.batch, length, model.config.vocab_size), np.int32)
    logits, kv = run_prefill(model, Strategy(policy), rows, np.full(cell.batch, length, np.int32), steps)
    token = first_token(logits, kv.length)
    return jax.block_until_ready(Start(kv, token, jnp.full(cell.batch, steps, jnp.int32)))


def in_pages(model: Model, policy: Policy, store: Store, start: Start, steps: int) -> Start:
    """The same state in pages, scattered over the pool."""
    batch, capacity = len(start.token), start.kv.layers[0].pool.page_size
    empty = Strategy(policy, store).init(cache_shape(model), start.kv.prompt_length, int(start.kv.length.max()), steps)
    assert empty.table is not None
    pages = empty.table.pages
    scattered = np.random.default_rng(0).permutation(pages.size).astype(np.int32).reshape(pages.shape)
    table = page_table(jnp.asarray(scattered), pages.size)
    spare = store.rounded(capacity) - capacity
    slots = jnp.ones((batch, capacity), bool)
    layers = []
    for source, target in zip(start.kv.layers, empty.layers, strict=True):
        filled = target.pool.filled(table, *dense().tokens(source.pool, None, batch), slots)
        position = source.position
        if position is not None:
            position = jnp.pad(position, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
        own = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]), source.own)
        layers.append(dataclasses.replace(source, pool=filled, position=position, own=own))
    return dataclasses.replace(start, kv=dataclasses.replace(start.kv, layers=tuple(layers), table=table))


class Bench:
    """One run: times cell by cell and writes the records after every one, beside those of the cells that were measured before."""

    def __init__(self, stores: Sequence[Store], policies: Sequence[Policy], output_dir: pathlib.Path, console: Console):
        self.stores, self.policies, self.console = stores, policies, console
        self._file = output_dir / "paged.jsonl"
        self.records: list[dict[str, Any]] = []
        if self._file.exists():
            self.records = [json.loads(line) for line in self._file.read_text("utf-8").splitlines()]
        self._models: dict[str, Model] = {}
        self._setting = setting() | {"device_kind": machine.cpu_model()}

    def run(self, cells: Sequence[Cell]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            began = time.perf_counter()
            added = self.measure(cell)
            self.records = sorted([r for r in self.records if cell_of(r) != cell] + added, key=lambda r: dataclasses.astuple(cell_of(r)))
            replace(self._file, json_lines(self.records))
            lost = sum(record["discarded"] for record in added)
            self.console.print(f"{cell.title}: {lost} samples discarded, {time.perf_counter() - began:.0f} s", highlight=False)

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        """Times a cell, all policies and stores in turns."""
        model = self.model(cell.model)
        entries = []
        for policy in self.policies:
            start = prefilled(model, policy, cell, FLAGS.steps)
            entries.append(Decode(model, Strategy(policy), start, FLAGS.steps))
            for store in self.stores:
                scattered = in_pages(model, policy, store, start, FLAGS.steps)
                entries.append(Decode(model, Strategy(policy, store), scattered, FLAGS.steps))
        timings = interleave(entries, watch=machine.Watch, reps=FLAGS.reps, warm_up=FLAGS.warm_up, retries=FLAGS.retries)
        baseline = {e.strategy.policy: t for e, t in zip(entries, timings, strict=True) if e.strategy.store == dense()}
        return [self.record(cell, e.strategy, t, baseline[e.strategy.policy]) for e, t in zip(entries, timings, strict=True)]

    def model(self, name: str) -> Model:
        if name not in self._models:
            where = kvjax_side.model_directory(pathlib.Path(FLAGS.work_dir)) if name == kvjax_side.PRESET else name
            self._models[name] = kvjax.load_model(where, dtype="float32")
        return self._models[name]

    def record(self, cell: Cell, strategy: Strategy, timing: Timing, baseline: Timing) -> dict[str, Any]:
        """The flat record of one policy in one store."""
        options = strategy.store.options
        return {
            **self._setting,
            "model_id": cell.model,
            "dtype": "float32",
            "batch": cell.batch,
            "context": cell.context,
            "steps": FLAGS.steps,
            "strategy": strategy.describe(),
            "policy": strategy.policy.describe(),
            "store": strategy.store.name,
            "page_size": options.get("page_size"),
            "extents": options.get("extents"),
            "slots": strategy.store.rounded(strategy.slots(cell.context - FLAGS.steps, cell.context)),
            "unit": "decode step of the batch",
            "median_seconds": timing.median,
            "min_seconds": min(timing.seconds),
            "max_seconds": max(timing.seconds),
            "samples_seconds": timing.seconds,
            "over_dense": timing.median / baseline.median,
            "reps": FLAGS.reps,
            "warm_up": FLAGS.warm_up,
            "discarded": len(timing.discarded),
            "disturbed": timing.disturbed,
            "tokens_equal": equal_tokens(timing.tokens, baseline.tokens),
            "tokens_total": sum(map(len, baseline.tokens)),
        }


def cell_of(record: dict[str, Any]) -> Cell:
    return Cell(record["model_id"], record["batch"], record["context"])


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """One table a policy: stores down, cells across."""
    for policy in dict.fromkeys(r["policy"] for r in records):
        mine = [r for r in records if r["policy"] == policy]
        cells = list(dict.fromkeys(map(cell_of, mine)))
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("store")
        for cell in cells:
            table.add_column(cell.title, justify="right")
        for store in dict.fromkeys((r["page_size"], r["extents"]) for r in mine):
            found = {cell_of(r): r for r in mine if (r["page_size"], r["extents"]) == store}
            label = "dense" if store[0] is None else f"pages of {store[0]}, {store[1]} extent{'s' * (store[1] > 1)}"
            table.add_row(label, *(_figure(found[cell]) if cell in found else "-" for cell in cells))
        console.print(f"\n[bold]{policy}: ms per step (times dense; * disturbed)[/bold]", highlight=False)
        console.print(table)
    judged = [r for r in records if r["page_size"] == BAR_PAGE_SIZE]
    if judged:
        over = [r for r in judged if r["over_dense"] > BAR]
        console.print(f"\npages of {BAR_PAGE_SIZE} within {BAR:.2f} of dense: {len(judged) - len(over)} of {len(judged)}", highlight=False)
    differ = sum(r["tokens_equal"] < r["tokens_total"] for r in records)
    console.print(f"stores with other greedy tokens than dense: {differ} of {len(records)}", highlight=False)


def _figure(record: dict[str, Any]) -> str:
    ratio = "" if record["page_size"] is None else f" ({record['over_dense']:.2f})"
    return f"{1e3 * record['median_seconds']:.2f}{ratio}{'*' if record['disturbed'] else ''}"


def parse_cell(text: str) -> Cell:
    """Ends the program with a message where the text is no cell."""
    model, *numbers = text.split(":")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers) or int(numbers[1]) <= FLAGS.steps:
        sys.exit(f"--cells: {text!r} is not model:batch:context, with a context of more than {FLAGS.steps} tokens")
    return Cell(model, int(numbers[0]), int(numbers[1]))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
    cells = [parse_cell(text) for text in FLAGS.cells]
    stores = [paged(int(size), int(extents)) for extents in FLAGS.extents for size in FLAGS.page_sizes]
    console = Console(width=None if sys.stdout.isatty() else 200)
    bench = Bench(stores, [parse_policy(spec) for spec in FLAGS.policies], pathlib.Path(FLAGS.output_dir), console)
    try:
        bench.run(cells)
    except KeyboardInterrupt:
        console.print("interrupted; what follows is what there is", style="bold red")
    show(bench.records, console)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
