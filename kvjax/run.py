"""Measures KV-cache strategies on a model: speed, bytes, fidelity to the full cache, and what is still remembered.

    python -m kvjax.run --strategy=h2o
    python -m kvjax.run --compare=full,streaming,h2o,oracle_topk --budget=0.2
    python -m kvjax.run --strategy="h2o(heavy=8,recent=8)" --output_dir=runs/h2o --profile_dir=runs/trace
    python -m kvjax.run --model=smollm2-135m --task=niah_single,kv --query=both --compare=full,h2o --nospeed
    python -m kvjax.run --strategy=vllm --request_rate=4
    python -m kvjax.run --compare=full,vllm,h2o+paged --request_rate=8 --kv_memory=32MiB --goodput=ttft:500,tpot:50

Without a load, whole batches run from start to end (offline). A load, any of --request_rate, --ramp, --max_concurrency, --prompts and
--trace, puts the serving engine under it: continuous batching within --kv_memory, latencies by the definitions of `vllm bench serve`.

A strategy is a name, or a name with arguments. An int is tokens, a float is a fraction of the prompt:

    full                              everything kept
    vllm                              the same on pages: full+paged
    streaming(sinks=4,window=252)     the first tokens and a sliding window
    h2o(heavy=0.1,recent=0.1)         heavy hitters and recent tokens; also decode=False, group=first|max
    oracle_topk(k=0.2)                keeps all, reads the exact top k: the upper bound
    h2o+paged                         any of them in the paged store; or --store=paged for all that name none
    offload                           everything in host memory, fetched whole layer by layer: full+host
    infinigen(alpha=8,budget=0.2)     everything in host memory; guesses one layer ahead which tokens matter and fetches those;
                                      infinigen(loss=0.05): reads so much that this share of attention is missed (kvjax.calibrate)
    infinigen_paper(alpha=4)          the rule as published

The default model ships with kvjax. Its prompts state facts, put Python source between them and ask for the facts afterwards, so the table
shows directly what a strategy forgets.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags, logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvjax import calibrate, checks, compilation
from kvjax.cache import STORES, TRANSFERS, Strategy, parse_strategy, split_specs
from kvjax.cache.policies import InfiniGen
from kvjax.command import Printer, answered, fail, notice, start
from kvjax.engine import load, metrics, offline, serve
from kvjax.engine.engine import Engine
from kvjax.errors import InputError, SpecError
from kvjax.files import plain
from kvjax.generation import PREFILL_MODES, PrefillPlan, check_positions, generate
from kvjax.interrupts import held
from kvjax.lock import locked
from kvjax.models import Model, load_model, parameters, public
from kvjax.quality import recall, task_flags
from kvjax.quality.speculation import audit_some
from kvjax.report import plots, profile, table
from kvjax.report import record as records
from kvjax.sampling import Sampling

FLAGS = flags.FLAGS

LOAD_FLAGS = ("request_rate", "ramp", "max_concurrency", "prompts", "trace")
"""Any of them asks for the serving engine."""

LOAD_ONLY = (
    *LOAD_FLAGS, "burstiness", "trace_speed", "shared_prefix", "kv_memory", "host_memory", "max_num_seqs", "max_num_batched_tokens",
    "enable_prefix_caching", "goodput",
)  # fmt: skip
OFFLINE_ONLY = ("batch_size", "prefill_mode", "quality", *task_flags.NAMES)


def define_flags() -> None:
    """Called once, when this module is the program."""
    compilation.define_flag()
    flags.DEFINE_string("strategy", "h2o", "The strategy to measure: a name, or a spec such as h2o(heavy=8,recent=8).")
    flags.DEFINE_string("compare", None, "Several strategies, separated by commas, side by side in one table; replaces --strategy.")
    flags.DEFINE_string("budget", None, "Tokens (an int) or fraction of the prompt (a float) each strategy may keep or read in total.")
    flags.DEFINE_enum("store", None, list(STORES), "Where the cache's bytes live, for strategies that do not say it; default: dense.")
    flags.DEFINE_enum(
        "transfer", None, TRANSFERS,
        "How tokens come from the host store: jit (the program gathers), driven (the host does, layer by layer; offline only), device (the "
        "pool is device memory, the upper bound); default: jit.",
    )  # fmt: skip
    flags.DEFINE_string("calibration", None, "What kvjax.calibrate wrote, for infinigen; default: calibrate now.")
    flags.DEFINE_float("link_gbps", None, "Also estimate the transfer time at this link speed, in GB/s (modelled).", lower_bound=0.001)
    flags.DEFINE_integer("page_size", None, "Slots of a page in the paged store; default: 64.", lower_bound=1)
    flags.DEFINE_string("model", "kvjax-4m", public.CHOICE)
    flags.DEFINE_bool("random_weights", False, "Random weights: speed and bytes are real, what the model says is not.")
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere.")
    flags.DEFINE_integer("num_prompts", None, "Prompts to run; default: 16 offline, 64 under load, all of a file.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Prompts per batch (offline).", lower_bound=1)
    flags.DEFINE_string("input_len", "952", "Tokens per prompt; under load also uniform(256,768) or lognormal(512,0.5) (median, sigma).")
    flags.DEFINE_string("output_len", "64", "Tokens to generate per prompt; under load also a distribution, like --input_len.")
    flags.DEFINE_integer("num_facts", 8, "Facts stated per prompt, at evenly spaced depths (byte-level models).", lower_bound=1)
    flags.DEFINE_integer("prefill_chunk", None, "Tokens of the prompt per call; default: all at once.", lower_bound=1)
    flags.DEFINE_enum("prefill_mode", "faithful", PREFILL_MODES, "With chunks: evict once the prompt is complete, or after every chunk.")
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: no limit.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Sample from the most likely tokens that reach this probability.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 0, "Seed of the prompts and of sampling.")
    flags.DEFINE_bool("quality", True, "Measure fidelity and recall; --noquality gives speed and bytes alone, sooner.")
    task_flags.define_flags()
    flags.DEFINE_string("request_rate", None, "Requests per second, or inf for all at once: serve under load.")
    flags.DEFINE_float("burstiness", 1.0, "Shape of the gamma distribution of gaps: 1 Poisson, less burstier, inf evenly spaced.")
    flags.DEFINE_string(
        "ramp", None, "A rate that moves, linear:1:8 or exponential:1:8 (first and last request), instead of --request_rate."
    )
    flags.DEFINE_integer("max_concurrency", None, "Requests a client has under way at most; others queue at the client.", lower_bound=1)
    flags.DEFINE_string("prompts", None, "A JSONL file of requests: prompt or prompt_token_ids, optionally max_tokens.")
    flags.DEFINE_string("trace", None, "A timed trace to replay, JSONL or CSV: arrival (s), input_length, output_length.")
    flags.DEFINE_float("trace_speed", 1.0, "Replay the trace this much faster.", lower_bound=1e-9)
    flags.DEFINE_integer("shared_prefix", 0, "Tokens that all prompts begin with (under load).", lower_bound=0)
    flags.DEFINE_string("kv_memory", "64MiB", "Memory of the engine's cache: pages, metadata and staging together.")
    flags.DEFINE_string("host_memory", None, "Memory of the host store's pool, such as 1GiB; default: twice what the rows in use need.")
    flags.DEFINE_integer("max_num_seqs", 64, "Requests the engine computes at a time.", lower_bound=1)
    flags.DEFINE_integer("max_num_batched_tokens", None, "Tokens of an engine step; default: max_num_seqs + 256.", lower_bound=1)
    flags.DEFINE_bool(
        "enable_prefix_caching", False, "Keep pages of ended requests for prompts that begin alike (strategies that keep all)."
    )
    flags.DEFINE_string("goodput", None, "Objectives in ms, all to be met: ttft:200,tpot:50 (also e2el).")
    flags.DEFINE_string(
        "output_dir", None,
        "Write record.json (with --compare: records.jsonl, a line a strategy), requests.jsonl, samples.txt (offline), series.jsonl (load) "
        "and a figure here, in place of an earlier run's.",
    )  # fmt: skip
    flags.DEFINE_string("profile_dir", None, "Write an XLA profiler trace of one batch per strategy here, and print time by scope.")


def parse_budget(text: str | None) -> int | float | None:
    """An int for tokens, a float for a fraction of the prompt. Raises SpecError."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            amount = kind(text)
        except ValueError:
            continue
        if amount > 0 and (kind is int or amount <= 1):
            return amount
    raise SpecError(f"--budget={text}: give a whole number of tokens (256) or a fraction of the prompt (0.2)")


def strategies() -> list[Strategy]:
    """What the flags ask for."""
    specs = split_specs(FLAGS.strategy if FLAGS.compare is None else FLAGS.compare)
    if not specs:
        raise SpecError("no strategy given; name at least one, for example --strategy=h2o")
    chosen = [parse_strategy(spec, FLAGS.store, FLAGS.page_size, FLAGS.transfer) for spec in specs]
    if (budget := parse_budget(FLAGS.budget)) is not None:
        chosen = [Strategy(s.policy.with_budget(budget), s.store) for s in chosen]
    names = [s.describe() for s in chosen]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"strategy {twice.pop()} is named twice")
    return chosen


def writable(flag: str) -> pathlib.Path | None:
    """The directory a flag names, made where it is missing; None without one. Raises InputError when nothing can be written there."""
    value = FLAGS[flag].value
    if value is None:
        return None
    if not value:
        raise InputError(f"--{flag} names no directory; write for example --{flag}=runs/first")
    path = pathlib.Path(value)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"--{flag}={path}: cannot write there: {error.strerror}") from None


def run(console: Console) -> None:
    """Loads, measures, writes, prints."""
    compilation.apply_flag()
    chosen = strategies()
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    under_load = any(FLAGS[name].value is not None for name in LOAD_FLAGS)
    measure = run_load if under_load else run_offline
    check_flags(under_load)
    checks.seed("--seed", FLAGS.seed, FLAGS.num_prompts or 64)
    output_dir, profile_dir = writable("output_dir"), writable("profile_dir")
    with claimed(output_dir):
        model = load_model(FLAGS.model, dtype=FLAGS.dtype, random_weights=FLAGS.random_weights)
        parameters.check_finite(model.params, model.config.name)
        calibrations.clear()
        measure(console, model, for_losses(model, chosen, console), sampling, output_dir, profile_dir)


@contextlib.contextmanager
def claimed(directory: pathlib.Path | None) -> Iterator[None]:
    """Holds the directory of the results for this run, and says what it will replace. Raises InputError where another run is writing."""
    if directory is None:
        yield
        return
    with locked(directory):
        if names := records.earlier(directory):
            notice(f"{directory} has an earlier run's {', '.join(names)}: this run's will take their place")
        yield


def conclude(
    console: Console, found: list[dict[str, Any]], asked: int, output_dir: pathlib.Path | None, problem: BaseException | None,
    write: Callable[[pathlib.Path], list[str]], draw: Callable[[pathlib.Path], list[str]],
) -> None:  # fmt: skip
    """Writes and shows the records of what is complete, files first, and raises the problem that ended the run, if one did."""
    if found:
        names: list[str] = []
        if output_dir is not None:
            with held():
                names = [*write(output_dir), *draw(output_dir)]
        table.show(found, console)
        if problem is not None:
            console.print(
                f"the run has ended early: {len(found)} of {asked} strategies have a record", style="bold yellow", highlight=False
            )
        if output_dir is not None:
            console.print(f"wrote {records.listed(names)} to {output_dir}", highlight=False)
    if problem is not None:
        raise problem


calibrations: list[calibrate.Calibration] = []
"""Of this run's model, once one was needed."""


def calibration_of(model: Model, console: Console) -> calibrate.Calibration:
    """The one of this run."""
    if not calibrations:
        with console.status("calibrating"):
            calibrations.append(calibrate.calibrate(model) if FLAGS.calibration is None else calibrate.load(FLAGS.calibration, model))
    return calibrations[0]


def guided(model: Model, strategy: Strategy, console: Console) -> Model:
    """The model as the strategy needs it; what takes a calibration shares one."""
    return calibrate.calibrated(model, strategy, calibration_of(model, console)) if strategy.policy.guesses else model


def for_losses(model: Model, chosen: list[Strategy], console: Console) -> list[Strategy]:
    """The strategies, with an alpha where they state a loss (infinigen); a saved calibration has to have what that takes."""
    found = []
    for strategy in chosen:
        if (loss := getattr(strategy.policy, "loss", None)) is not None:
            calibration, policy = calibration_of(model, console), cast(InfiniGen, strategy.policy)
            if FLAGS.calibration is None:
                with console.status(f"measuring what loss={loss} takes"):
                    calibration = calibrate.with_curves(model, calibration, policy)
            named, strategy = strategy.describe(), calibrate.for_loss(strategy, calibration)
            console.print(f"{named} is {strategy.describe()}", highlight=False)
        found.append(strategy)
    return found


def check_flags(under_load: bool) -> None:
    """Raises SpecError for a flag that would have no effect."""
    idle = OFFLINE_ONLY if under_load else LOAD_ONLY
    if given := [name for name in idle if FLAGS[name].present]:
        if under_load:
            raise SpecError(
                f"--{given[0]} has no meaning under load; leave it out, or the load ({', '.join('--' + f for f in LOAD_FLAGS)})"
            )
        raise SpecError(f"--{given[0]} needs a load; add one of {', '.join('--' + f for f in LOAD_FLAGS)}, for example --request_rate=4")
    if not under_load:
        task_flags.check_flags()
    for flag in ("input_len", "output_len"):
        load.parse_lengths(str(FLAGS[flag].value))
        if not under_load:
            fixed_length(flag)


def fixed_length(flag: str) -> int:
    """The whole number a flag must be offline. Raises SpecError."""
    lengths = load.parse_lengths(str(FLAGS[flag].value))
    if not isinstance(lengths, load.Fixed):
        raise SpecError(f"--{flag}={FLAGS[flag].value}: offline all prompts have one length; give a number of tokens, or a load")
    return lengths.tokens


def run_load(
    console: Console, model: Model, chosen: list[Strategy], sampling: Sampling, output_dir: pathlib.Path | None,
    profile_dir: pathlib.Path | None,
) -> None:  # fmt: skip
    """Serves the same load under every strategy."""
    goodput = None if FLAGS.goodput is None else metrics.parse_goodput(FLAGS.goodput)
    requests = make_load(model)
    engines = [make_engine(guided(model, strategy, console), strategy, sampling, requests.max_length) for strategy in chosen[:1]]
    options = {name: FLAGS[name].value for name in (*LOAD_ONLY, "input_len", "output_len", "seed", "random_weights")}
    options["request_rate"] = "inf" if math.isinf(requests.request_rate) else requests.request_rate
    options["burstiness"] = requests.burstiness if math.isfinite(requests.burstiness) else "inf"
    found: list[dict[str, Any]] = []
    services: list[serve.Service] = []
    problem: BaseException | None = None
    try:
        for strategy in chosen:
            engine = engines.pop() if engines else make_engine(guided(model, strategy, console), strategy, sampling, requests.max_length)
            service = serve_one(console, engine, requests)
            with held():
                services.append(service)
                record = records.load_record(service, engine, model, requests, options, goodput, FLAGS.max_concurrency is not None)
                found.append(plain(record))
            if not service.complete:
                note = f"interrupted: {service.record_note()}; its record is marked incomplete"
                console.print(note, style="bold yellow", highlight=False)
                raise KeyboardInterrupt
            with console.status("judging guesses"):
                found[-1] |= judged(service, engine)
            if profile_dir is not None:
                found[-1] |= profile_load(profile_dir, engine, requests, console)
            del engine
    except BaseException as error:  # whatever it is, what is complete is kept
        problem = error

    def write(directory: pathlib.Path) -> list[str]:
        return records.write_load(directory, found, services, FLAGS.compare is not None)

    def draw(directory: pathlib.Path) -> list[str]:
        plots.under_load(found, services, directory / "load.png")
        return ["load.png"]

    conclude(console, found, len(chosen), output_dir, problem, write, draw)
    for record, service in zip(found, services, strict=True):
        if not record["completed"]:
            reason = next(one.reason for one in service.served)
            fail(f"{record['strategy']}: none of the {len(service.served)} requests was completed; the first: {reason}", code=1)


def serve_one(console: Console, engine: Engine, requests: load.Load) -> serve.Service:
    """Serves the load on an engine that is cold."""
    name = engine.strategy.describe()
    columns = (TextColumn("{task.description:<48}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{name}: compiling", total=None)
        lengths = [len(r.prompt) for r in requests.requests]
        samples = any((r.sampling or engine.sampling).temperature for r in requests.requests)
        engine.warm_up(lengths, lambda what: progress.update(task, description=f"{name}: compiling {what}"), samples)
        progress.reset(task, total=len(requests.requests))

        def report(ended: int, running: int) -> None:
            progress.update(task, completed=ended, description=f"{name}: serving {running}")

        return serve.serve(engine, requests, max_concurrency=FLAGS.max_concurrency, progress=report)


def judged(service: serve.Service, engine: Engine) -> dict[str, Any]:
    """How good the guesses of a policy that speculates are on what was served; empty for another."""
    if not engine.strategy.policy.guesses:
        return {}
    served = [(one.request.prompt, one.tokens) for one in service.served if one.completed]
    guesses = audit_some(engine.model, engine.strategy, served)
    return {} if guesses is None else guesses.record()


def make_load(model: Model) -> load.Load:
    """The load that the flags describe."""
    from_file = FLAGS.prompts is not None or FLAGS.trace is not None
    count = FLAGS.num_prompts if FLAGS.num_prompts is not None or from_file else 64
    return load.make_load(
        model, num_requests=count, input_len=load.parse_lengths(FLAGS.input_len), output_len=load.parse_lengths(FLAGS.output_len),
        request_rate=parse_rate(FLAGS.request_rate), burstiness=FLAGS.burstiness, ramp=parse_ramp(FLAGS.ramp), seed=FLAGS.seed,
        prompts=FLAGS.prompts, trace=FLAGS.trace, speed=FLAGS.trace_speed, shared_prefix=FLAGS.shared_prefix, num_facts=FLAGS.num_facts,
    )  # fmt: skip


def make_engine(model: Model, strategy: Strategy, sampling: Sampling, longest: int) -> Engine:
    """The engine that the flags describe, for requests of up to `longest` tokens."""
    return Engine(
        model, strategy, kv_memory=FLAGS.kv_memory, host_memory=host_memory(strategy), max_num_seqs=FLAGS.max_num_seqs,
        max_model_len=max(longest, 2), max_num_batched_tokens=FLAGS.max_num_batched_tokens, prefill_chunk=FLAGS.prefill_chunk or 256,
        prefix_caching=FLAGS.enable_prefix_caching, sampling=sampling,
    )  # fmt: skip


def host_memory(strategy: Strategy) -> str | None:
    """Of the pool, for those strategies of a comparison that have one."""
    return FLAGS.host_memory if strategy.store.tier.fetches else None


def parse_rate(text: str | None) -> float:
    """Requests per second; inf without a rate. Raises SpecError."""
    try:
        return math.inf if text is None else float(text)
    except ValueError:
        raise SpecError(f"--request_rate={text}: give requests per second, or inf for all at once") from None


def parse_ramp(text: str | None) -> load.Ramp | None:
    """`linear:1:8`. Raises SpecError."""
    if text is None:
        return None
    kind, *rates = text.split(":")
    try:
        start, end = (float(rate) for rate in rates)
    except ValueError:
        raise SpecError(f"--ramp={text}: give a kind and two rates in requests per second, such as linear:1:8 or exponential:1:8") from None
    return load.Ramp(kind, start, end)  # type: ignore[arg-type]


def profile_load(parent: pathlib.Path, engine: Engine, requests: load.Load, console: Console) -> dict[str, Any]:
    """A trace of the engine serving the first few requests, all at once, and the times in it that go into the record."""
    few = dataclasses.replace(requests, requests=tuple(dataclasses.replace(r, arrival=0.0) for r in requests.requests[:8]))
    directory = parent / engine.strategy.describe().replace(",", "_")
    with profile.trace(directory):
        serve.serve(engine, few)
    return show_profile(directory, engine.strategy, console)


def show_profile(directory: pathlib.Path, strategy: Strategy, console: Console) -> dict[str, Any]:
    """Prints the times of a trace; returns those that go into a record, of fetching."""
    console.print(f"\ntrace of {strategy.describe()} in {directory} (TensorBoard, XProf or Perfetto open it)", highlight=False)
    for scope, spent in profile.scope_times(directory).items():
        console.print(f"  {scope:<24}{1e3 * spent.seconds:>10.2f} ms in {spent.events} instructions", highlight=False)
    if not strategy.store.tier.fetches:
        return {}
    hidden = profile.hidden_fraction(directory)
    share = "" if hidden.fraction is None else f", {100 * hidden.fraction:.1f} % of it while other work ran"
    link = " (on a CPU the link is a copy in memory, and shares the cores)" if jax.default_backend() == "cpu" else ""
    console.print(f"  fetching{1e3 * hidden.seconds:>26.2f} ms by the clock{share}{link}", highlight=False)
    return {"fetch_seconds": hidden.seconds, "fetch_hidden_fraction": hidden.fraction}


def run_offline(
    console: Console, model: Model, chosen: list[Strategy], sampling: Sampling, output_dir: pathlib.Path | None,
    profile_dir: pathlib.Path | None,
) -> None:  # fmt: skip
    """Runs whole batches from start to end under every strategy."""
    plan = PrefillPlan(FLAGS.prefill_chunk, FLAGS.prefill_mode)
    input_len, output_len, num_prompts = fixed_length("input_len"), fixed_length("output_len"), FLAGS.num_prompts or 16
    batch_size = min(FLAGS.batch_size, num_prompts)
    questions = FLAGS.num_facts * recall.STATEMENT_BYTES
    check_positions(model, input_len, max(output_len, questions))
    workload = offline.make_workload(model, num_prompts, input_len, FLAGS.seed, FLAGS.num_facts)

    tasks = task_flags.check_flags()
    judges, times = FLAGS.quality and not tasks, FLAGS.speed
    batches = offline.steps_of(workload, batch_size) - 1
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    measured: list[offline.Measurement] = []
    found: list[dict[str, Any]] = []
    problem: BaseException | None = None
    options = {name: FLAGS[name].value for name in ("seed", "prefill_chunk", "prefill_mode")}
    options |= {name: FLAGS[name].value for name in ("calibration", "link_gbps")}
    options |= {"input_len": input_len, "output_len": output_len, "batch_size": batch_size, "random_weights": FLAGS.random_weights}
    try:
        guides = [guided(model, strategy, console) for strategy in chosen]
        with Progress(*columns, console=console, transient=True) as progress:
            judging = batches * (1 + len(chosen)) if judges else task_flags.steps(tasks, len(chosen), num_prompts, batch_size)
            task = progress.add_task("quality", total=judging + ((1 + batches) * len(chosen) if times else 0))

            def report(what: str, name: str) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            answers = task_flags.ask(
                list(zip(guides, chosen, strict=True)), tasks, length=input_len, count=num_prompts, batch_size=batch_size,
                progress=lambda what: progress.update(task, advance=1, description=what),
            )  # fmt: skip
            if not times:
                own = options | {"num_prompts": num_prompts}
                found += [plain(records.untimed(s, model, own) | asked) for s, asked in zip(chosen, answers, strict=True)]
            qualities = [offline.Quality()] * len(chosen)
            if judges:
                qualities = offline.judge(
                    list(zip(guides, chosen, strict=True)), workload, batch_size=batch_size, reserve=output_len, plan=plan,
                    seed=FLAGS.seed, progress=lambda what: report(what, "quality"),
                )  # fmt: skip
            for prepared, strategy, quality, asked in zip(guides, chosen, qualities, answers, strict=True) if times else ():
                name = strategy.describe()
                progress.update(task, description=f"{name}: compiling")
                one = offline.measure(
                    prepared, strategy, workload, batch_size=batch_size, output_len=output_len, seed=FLAGS.seed, sampling=sampling,
                    plan=plan, quality=quality, progress=functools.partial(report, name=name),
                )  # fmt: skip
                with held():
                    measured.append(one)
                    found.append(plain(records.record(one, model, workload, options) | asked))
        if profile_dir is not None:
            profile_strategies(profile_dir, model, chosen, workload, batch_size, sampling, plan, console, found)
    except BaseException as error:  # whatever it is, what is complete is kept
        problem = error

    def write(directory: pathlib.Path) -> list[str]:
        return records.write(directory, found, measured, workload, model, FLAGS.compare is not None)

    def draw(directory: pathlib.Path) -> list[str]:
        if not times:
            return []
        plots.overview(found, directory / "overview.png")
        return ["overview.png"]

    conclude(console, found, len(chosen), output_dir, problem, write, draw)


def profile_strategies(
    parent: pathlib.Path, model: Model, chosen: list[Strategy], workload, batch_size: int, sampling, plan, console: Console,
    found: list[dict[str, Any]],
) -> None:  # fmt: skip
    """One traced batch per strategy, after compiling, and the time its scopes took; adds to each record what belongs there."""
    settings: dict[str, Any] = dict(
        max_new_tokens=min(32, fixed_length("output_len")), sampling=sampling, seed=FLAGS.seed, stop_tokens=(), prefill=plan
    )
    prompts = workload.prompts[:batch_size]
    for strategy, record in zip(chosen, found, strict=True):
        directory = parent / strategy.describe().replace(",", "_")
        prepared, hosted = guided(model, strategy, console), strategy.store.tier.fetches
        steps = 1 if hosted else 16  # no loop around host memory, as when it was measured
        generate(prepared, prompts, strategy=strategy, steps_per_call=steps, **settings)
        with profile.trace(directory):
            generate(prepared, prompts, strategy=strategy, steps_per_call=steps, **settings)
        record |= show_profile(directory, strategy, console)


def main(argv: list[str]) -> None:
    with answered():
        if len(argv) > 1:
            raise SpecError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        run(Printer())


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    start(main)
