"""Plans a strategy on a card that is not here: does it fit, how much would, and how fast a decode step can be at best.

    python -m kvjax.plan --model=opt-13b --strategy=h2o --batch=64 --context=8192 --topology=h200
    python -m kvjax.plan --model=llama-3-8b --compare=full,vllm,h2o+paged,infinigen --batch=32 --context=8192 --topology=h100
    python -m kvjax.plan --model=opt-6.7b --strategy=full --batch=8 --context=2048 --topology=v5e:2x2 --json
    python -m kvjax.plan --table

The real decode and prefill programs are compiled for the card from shapes alone. Nothing runs, so nothing is measured: each figure is
compiled (a compiler says so), computed (arithmetic over the shapes of the arrays) or a bound (arithmetic over data sheets).

The context is all that a row holds in the end; the last --output_len tokens of it are generated. Prompts go in one at a time and in chunks,
as in the engine; --prefill_batch and --prefill_chunk=0 make it a whole batch at once. Compiling takes minutes a strategy and the search for
the largest batch and context compiles again at its answers (--norefine does not).
"""

import os
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from kvjax.cache import TRANSFERS, parse_strategy, split_specs
from kvjax.command import Printer, answered, start
from kvjax.errors import SpecError
from kvjax.files import dumps
from kvjax.models.config import preset
from kvjax.models.load import DTYPES
from kvjax.plan.devices import DEVICES, open_device
from kvjax.plan.planner import Answer, Model, Plan, largest, plan
from kvjax.plan.programs import Setting
from kvjax.report.table import human_bytes

FLAGS = flags.FLAGS

TABLE_MODELS = ("opt-6.7b", "opt-13b", "opt-30b", "llama-3-8b")
TABLE_STRATEGIES = ("full", "vllm", "h2o+paged", "infinigen")
TABLE_CARDS = {"80 GB": 80 * 10**9, "141 GB": 141 * 10**9}


def define_flags() -> None:
    """Called once, when this module is the program."""
    flags.DEFINE_string("model", "opt-13b", "A preset or a bundled model; its weights are not needed.")
    flags.DEFINE_string("strategy", "h2o", "The strategy to plan: a name, or a spec such as h2o(heavy=0.1,recent=0.1).")
    flags.DEFINE_string("compare", None, "Several strategies, separated by commas, side by side; replaces --strategy.")
    flags.DEFINE_integer("batch", 8, "Rows of a decode step.", lower_bound=1)
    flags.DEFINE_integer("context", 2048, "Tokens a row holds in the end, prompt and output.", lower_bound=2)
    flags.DEFINE_integer("output_len", 128, "Tokens of the context that are generated.", lower_bound=1)
    flags.DEFINE_string("topology", "h200", f"The card to compile for: {', '.join(DEVICES)}; of a TPU topology, one chip.")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Of parameters, activations and cache.")
    flags.DEFINE_enum("transfer", None, TRANSFERS, "Of the host store; device keeps the pool on the card.")
    flags.DEFINE_float("link_gbps", None, "GB/s from host to card; default: PCIe as in the card's data sheet.", lower_bound=0.001)
    flags.DEFINE_float("memory_fraction", 0.9, "Of the card's memory, what the process gets.", lower_bound=0.01, upper_bound=1.0)
    flags.DEFINE_integer("prefill_batch", 1, "Prompts that go in at a time.", lower_bound=1)
    flags.DEFINE_integer("prefill_chunk", 512, "Tokens of a prompt per call; 0: all at once.", lower_bound=0)
    flags.DEFINE_bool("exact", False, "Compile all layers, not two depths.")
    flags.DEFINE_bool("search", True, "Look for the largest batch and the largest context that fit.")
    flags.DEFINE_bool("refine", True, "Compile again at the largest batch and context, and correct them.")
    flags.DEFINE_bool("json", False, "One JSON object a strategy, on a line of its own.")
    flags.DEFINE_bool(
        "table", False, "Which strategy fits which model on an 80 GB and a 141 GB card (Markdown); most other flags are ignored."
    )


def settings() -> list[Setting]:
    """What the flags ask for. Raises SpecError."""
    config = preset(FLAGS.model)
    specs = split_specs(FLAGS.strategy if FLAGS.compare is None else FLAGS.compare)
    if not specs:
        raise SpecError("no strategy given; name at least one, for example --strategy=h2o")
    chosen = [parse_strategy(spec, transfer=FLAGS.transfer) for spec in specs]
    names = [strategy.describe() for strategy in chosen]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"strategy {twice.pop()} is named twice")
    sizes = (FLAGS.batch, FLAGS.context, FLAGS.output_len, FLAGS.dtype, FLAGS.prefill_batch, FLAGS.prefill_chunk or None)
    return [Setting(config, strategy, *sizes) for strategy in chosen]


def run() -> None:
    """Compiles and prints."""
    if FLAGS.table:
        for line in fit_table():
            print(line, flush=True)
        return
    planned = settings()
    device = open_device(FLAGS.topology)
    link = None if FLAGS.link_gbps is None else 1e9 * FLAGS.link_gbps
    options: dict = dict(memory_fraction=FLAGS.memory_fraction, link=link, search=FLAGS.search, refine=FLAGS.refine)
    options["depths"] = "all" if FLAGS.exact else "two"
    plans = []
    with Console(stderr=True).status("compiling") as status:
        for setting in planned:

            def report(what: str, name: str = setting.strategy.describe()) -> None:
                status.update(f"{name}: compiling {what}")

            plans.append(plan(setting, device, progress=report, **options))
    if FLAGS.json:
        for found in plans:
            print(dumps(found.record()))
    else:
        show(plans, Printer())


# --------------------------------------------------------------------------------------------------------------------------- side by side


def show(plans: Sequence[Plan], console: Console) -> None:
    """Prints plans side by side; the last column says where a row comes from."""
    first = plans[0]
    setting, device = first.setting, first.device
    title = f"{setting.config.name} ({setting.dtype}) on {device.name}, batch {setting.batch}, context {setting.context}"
    console.print(f"\n[bold]{title} ({setting.output_len} of it generated)[/bold]; nothing ran, nothing is measured", highlight=False)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for found in plans:
        table.add_column(found.setting.strategy.describe().replace("(", "\n("), justify="right", overflow="fold")
    table.add_column("", style="dim")
    for heading, rows in SECTIONS:
        shown = [(label, cells, source) for label, make, source in rows if any(cells := [make(found) for found in plans])]
        if not shown:
            continue
        table.add_section()
        table.add_row(f"[bold cyan]{heading}[/bold cyan]")
        for label, cells, source in shown:
            table.add_row("  " + label, *(cell or "-" for cell in cells), source)
    console.print(table)
    for note in notes(plans):
        console.print(f"  {note}", style="dim", highlight=False)


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    setting, device = plans[0].setting, plans[0].device
    for how in dict.fromkeys(found.compiled for found in plans):
        yield "Compiled: all layers." if how == "compiled" else f"{how.capitalize()}."
    share = 100 * plans[0].available / device.memory
    yield f"Available is {share:.0f} % of {human_bytes(device.memory)} ({device.memory_source})."
    chunk = f"in chunks of {setting.prefill_chunk}" if setting.prefill_chunk else "whole"
    yield f"Prompts go in {setting.prefill_batch} at a time, {chunk}; an evicting policy stages a prompt that comes in chunks."
    contexts = [setting.context, *(found.largest_context.size for found in plans if found.largest_context is not None)]
    if max(contexts) > setting.config.max_position:
        yield f"{setting.config.name} has {setting.config.max_position} positions; longer contexts are planned all the same."
    if any(found.cache.host_pool for found in plans) and device.mesh is not None:
        yield "Host memory does not survive abstract compilation: the pool was compiled as device memory and taken off the device's bytes."
    if any(found.largest_batch is not None for found in plans):
        yield "Largest batch and context: arithmetic over shapes plus scratch in proportion, compiled again at the answer (c) or not (a)."


def _size(value: Callable[[Plan], float | None]) -> Callable[[Plan], str]:
    def make(found: Plan) -> str:
        size = value(found)
        return human_bytes(size) if size else ""

    return make


def _number(value: Callable[[Plan], float | None], pattern: str) -> Callable[[Plan], str]:
    def make(found: Plan) -> str:
        number = value(found)
        return pattern.format(number) if number else ""

    return make


def _answer(found: Answer | None) -> str:
    if found is None:
        return ""
    if not found.size:
        return "none"
    return f"{found.size} ({'c' if found.compiled else 'a'})"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


SECTIONS: list[tuple[str, list[tuple[str, Callable[[Plan], str], str]]]] = [
    (
        "held on the device",
        [
            ("weights", _size(lambda p: p.weights), "computed"),
            ("guide of speculation", _size(lambda p: p.guide), "computed"),
            ("keys and values", _size(lambda p: p.cache.device_tokens), "computed"),
            ("metadata", _size(lambda p: p.cache.metadata), "computed"),
            ("partial keys", _size(lambda p: p.cache.partial_keys), "computed"),
        ],
    ),
    ("held on the host", [("pool of keys and values", _size(lambda p: p.cache.host_pool), "computed")]),
    (
        "beside it, while it runs",
        [
            ("decode, scratch", _size(lambda p: p.decode.temp), "compiled"),
            ("prefill, scratch", _size(lambda p: p.prefill.temp), "compiled"),
        ],
    ),
    (
        "peak of the device",
        [
            ("decode", _size(lambda p: p.decode_peak), "computed + compiled"),
            ("prefill", _size(lambda p: p.prefill_peak), "computed + compiled"),
            ("available", _size(lambda p: p.available), "data sheet"),
            ("fits", lambda p: "yes" if p.fits else "no", ""),
            ("largest batch", lambda p: _answer(p.largest_batch), "computed, (c)ompiled"),
            ("largest context", lambda p: _answer(p.largest_context), "computed, (c)ompiled"),
        ],
    ),
    (
        "a decode step of the batch",
        [
            ("bytes it has to read", _size(lambda p: p.work.read), "computed"),
            ("  of them weights", _size(lambda p: p.work.weight_bytes), "computed"),
            ("operations (G)", _number(lambda p: p.work.flops / 1e9, "{:.1f}"), "computed"),
            ("XLA's count of bytes", _size(lambda p: p.decode.accessed), "compiled"),
            ("XLA's count of operations (G)", _number(lambda p: p.decode.flops and p.decode.flops / 1e9, "{:.1f}"), "compiled"),
            ("no faster than (ms)", _number(lambda p: _ms(p.roofline), "{:.2f}"), "bound"),
            ("from the host, at most", _size(lambda p: p.work.from_host), "computed"),
            ("to the host", _size(lambda p: p.work.to_host), "computed"),
            ("link, at that much (ms)", _number(lambda p: _ms(p.link_seconds), "{:.2f}"), "bound"),
        ],
    ),
]


# ------------------------------------------------------------------------------------------------------------------------ the fit table


def fit_table() -> Iterator[str]:
    """Markdown: what fits on an 80 GB and a 141 GB card, line by line as found. Compiled once, for an H200, at batch 16."""
    device = open_device("h200")
    columns = [f"{card}: {what}" for card in TABLE_CARDS for what in ("batch at 2,048", "context at batch 16")]
    yield f"| model | strategy | weights | a row of 2,048: device, host | {' | '.join(columns)} |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for name in TABLE_MODELS:
        for spec in TABLE_STRATEGIES:
            setting = Setting(preset(name), parse_strategy(spec), batch=16, context=2048)
            found = plan(setting, device, search=False)
            setting = found.setting
            model = Model(setting, found.decode, found.prefill)
            cells = [name, spec, human_bytes(found.weights + found.guide)]
            row = (found.cache.device / 16, found.cache.host_pool / 16)
            cells.append(", ".join(human_bytes(size) for size in row if size))
            for memory in TABLE_CARDS.values():
                available = FLAGS.memory_fraction * memory
                batch = largest(model, lambda n, s=setting: s.resized(n, s.context), available)  # type: ignore[misc]
                context = largest(model, lambda n, s=setting: s.resized(s.batch, n), available, least=2, unit=64)  # type: ignore[misc]
                cells += [str(answer.size) if answer.size else "none" for answer in (batch, context)]
            yield f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for the cards themselves
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run()


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
