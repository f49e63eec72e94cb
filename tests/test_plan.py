"""The planner: its bytes against those of real runs on a CPU, its search against brute force, its command line."""

import dataclasses
import functools
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kvjax.cache import Prefill, ledger, parse_strategy
from kvjax.cache.ledger import nbytes
from kvjax.calibrate import calibrated
from kvjax.errors import SpecError
from kvjax.generation import cache_shape, decode_program, run_prefill, unrolled_prefill
from kvjax.models import load_model, preset
from kvjax.plan import DEVICES, Plan, PlanError, Setting, bounds, open_device, plan, planner, programs
from kvjax.plan import __main__ as command
from kvjax.plan.planner import Model, largest
from kvjax.plan.programs import Usage
from kvjax.sampling import Sampling

BATCH, CONTEXT, NEW = 4, 192, 32


@pytest.fixture(scope="module")
def model():
    return load_model("kvjax-1m", "float32")


def setting(spec: str, batch: int = BATCH, context: int = CONTEXT, **changes) -> Setting:
    options: dict = dict(output_len=NEW, dtype="float32", prefill_batch=batch, prefill_chunk=None)
    return Setting(preset("kvjax-1m"), parse_strategy(spec), batch, context, **(options | changes))


# -------------------------------------------------------------------------------------------------------------- against what really runs


@functools.cache
def planned_full() -> Plan:
    return plan(setting("full"), open_device("cpu"), depths="all", search=False)


@pytest.mark.parametrize("spec", ["full", "h2o", "vllm", "infinigen", "infinigen(columns=sum,correction=False)"])
def test_planned_bytes_are_those_of_a_real_run(model, spec):
    """The ledger of a real state, and XLA's memory analysis of the decode program for it."""
    at, strategy = setting(spec), parse_strategy(spec)
    decode = planned_full().decode if spec == "full" else programs.compiled_decode(at, open_device("cpu"))
    cache = planner.cache_bytes(at)
    weights, guide = programs.weight_bytes(at)
    peak, _ = planner.peaks(at, decode, Usage(0, 0, 0))
    prepared = calibrated(model, strategy)
    tokens = np.random.default_rng().integers(0, 256, (BATCH, CONTEXT - NEW)).astype(np.int32)
    _, kv = run_prefill(prepared, strategy, tokens, np.full(BATCH, CONTEXT - NEW, np.int32), NEW)
    books = ledger(strategy, kv)
    assert cache.device == books.device.total
    assert cache.host_pool == books.host.total
    assert cache.metadata + cache.partial_keys == books.device.metadata
    buffers = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(prepared.params)}
    assert weights == nbytes(model.params["params"])
    assert weights + guide == sum(buffers.values())

    analysis = decode_program(prepared, strategy, Sampling(), kv).memory_analysis()
    if analysis is None:
        pytest.skip("this backend has no memory analysis")
    beside = analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
    assert peak == pytest.approx(sum(buffers.values()) + books.device.total + beside, rel=0.05)
    if spec == "full":
        assert planned_full().decode_peak == peak
    if not strategy.store.tier.fetches:  # whose program has the pool among its arguments, and leaves out what it never reads
        assert peak == pytest.approx(analysis.argument_size_in_bytes + beside, rel=0.05)


def test_planned_prefill_is_that_of_a_real_run(model):
    strategy, lengths = parse_strategy("full"), np.full(BATCH, CONTEXT - NEW, np.int32)
    empty = strategy.init(cache_shape(model), lengths, CONTEXT - NEW, NEW)
    tokens = jnp.zeros((BATCH, CONTEXT - NEW), jnp.int32)
    lowered = unrolled_prefill.lower(model.decoder, model.params, tokens, empty, Prefill(jnp.asarray(lengths), strategy))
    analysis = lowered.compile().memory_analysis()
    real = nbytes((model.params, empty)) + analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
    assert planned_full().prefill_peak == pytest.approx(real, rel=0.05)


def test_two_depths_tell_what_all_layers_take():
    at, device, every = setting("full"), open_device("cpu"), planned_full()
    assert (at.depths(), every.depths, every.compiled) == ((2, 4), (5, 5), "compiled")
    two, four = (programs.compiled_decode(at.with_layers(depth), device) for depth in at.depths())
    carried = planner._carried_on(2, two, 4, four, 5)
    assert planner.peaks(at, carried, every.prefill)[0] == pytest.approx(every.decode_peak, rel=0.05)
    assert carried.flops == pytest.approx(every.decode.flops, rel=0.05)


@pytest.mark.parametrize("spec", ["full", "vllm", "h2o+paged", "infinigen", "streaming(sinks=4,window=60)"])
def test_cache_of_any_batch_and_depth_follows_from_few(spec):
    """The arithmetic from one row and two, and two depths, against the shapes of the whole state."""
    many = setting(spec, batch=11, context=150)
    found = planner.cache_bytes(many)
    assert found.device + found.host_pool == nbytes(programs.state(many, 11))


# --------------------------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(("spec", "staged"), [("full", False), ("vllm", False), ("h2o", True)])
def test_largest_batch_and_context_are_those_of_brute_force(spec, staged):
    at = setting(spec, batch=4, context=64, prefill_batch=1, output_len=8, prefill_chunk=16 if staged else None)
    model = Model(at, Usage(40_000, 100, 0), Usage(90_000, 2_000, 0))
    available = model.peak(at) * 1.3
    for resized, least, unit in ((lambda n: at.resized(n, 64), 1, 1), (lambda n: at.resized(4, n), 2, 8)):
        sizes = [least, *range(unit, 2000, unit)]
        brute = 0
        for size in sizes:
            if size >= least and model.peak(resized(size)) > available:
                break
            brute = max(size, brute)
        found = largest(model, resized, available, least=least, unit=unit)
        assert (found.size, found.compiled) == (brute, False)
        assert largest(model, resized, 1.0, least=least, unit=unit).size == 0


def test_search_is_corrected_by_what_is_compiled():
    at = setting("full", batch=4, context=64)
    guess = Model(at, Usage(0, 0, 0), Usage(0, 0, 0))
    asked = []

    def confirm(there):
        asked.append(there.batch)
        return Model(there, Usage(50_000 * there.batch, 0, 0), Usage(0, 0, 0))

    available = guess.peak(at) * 2
    found = largest(guess, lambda n: at.resized(n, 64), available, confirm)
    assert found.compiled
    assert asked[-1] == found.size < asked[0]
    assert confirm(at.resized(found.size, 64)).peak(at.resized(found.size, 64)) <= available
    assert confirm(at.resized(found.size + 1, 64)).peak(at.resized(found.size + 1, 64)) > available


# --------------------------------------------------------------------------------------------------------------------------- the bounds


def test_bound_of_a_step_by_hand():
    """OPT-13B, batch 1: weights once, and 2 * layers * width * bytes of every token."""
    config = preset("opt-13b")
    work = bounds.decode_work(Setting(config, parse_strategy("full"), 1, 2048))
    learned = 2050 * 5120
    assert work.weight_bytes == 2 * (config.parameter_count - learned)
    assert work.cache_bytes == 2 * 40 * 5120 * 2 * 2048
    assert work.from_host == 0
    h200 = dataclasses.replace(open_device("cpu"), bandwidth=4.8e12, flops={"bfloat16": 989e12})
    assert work.roofline(h200, "bfloat16") == pytest.approx(work.read / 4.8e12)
    assert work.roofline(open_device("cpu"), "bfloat16") is None
    many = bounds.decode_work(Setting(config, parse_strategy("h2o"), 4096, 256))
    assert many.roofline(h200, "bfloat16") == pytest.approx(many.flops / 989e12)


def test_infinigen_moves_its_budget_and_the_first_layers():
    work = bounds.decode_work(setting("infinigen(budget=0.25)", batch=2, context=200))
    token = 2 * 2 * 32 * 4
    assert work.from_host == 2 * token * (2 * 200 + 3 * 50)
    assert work.to_host == 2 * token * 5
    at_home = Setting(preset("kvjax-1m"), parse_strategy("infinigen", transfer="device"), 2, 200)
    assert bounds.decode_work(at_home).from_host == 0
    offload = bounds.decode_work(setting("offload", batch=2, context=200))
    assert offload.from_host == 2 * token * 5 * 200


# --------------------------------------------------------------------------------------------------------------------- the command line


def test_json_of_the_command():
    args = (
        "--model=kvjax-1m --strategy=full --batch=2 --context=96 --output_len=16 --topology=cpu --dtype=float32 --exact --norefine --json"
    )
    process = subprocess.run([sys.executable, "-m", "kvjax.plan", *args.split()], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
    (record,) = [json.loads(line) for line in process.stdout.splitlines()]
    assert {"model_id", "strategy", "topology", "dtype", "batch_size", "context", "compiled_layers", "available_bytes"} <= record.keys()
    assert {"computed_weights_bytes", "compiled_decode_temp_bytes", "compiled_decode_flops", "bound_decode_ms"} <= record.keys()
    assert {"computed_kv_host_pool_bytes", "computed_decode_from_host_bytes", "bound_link_ms"} <= record.keys()
    assert not [key for key in record if "measured" in key]
    assert record["fits"]
    assert record["planned_peak_bytes"] == max(record["planned_decode_peak_bytes"], record["planned_prefill_peak_bytes"])
    assert record["largest_batch"] > 2
    assert record["largest_batch_source"] == record["largest_context_source"] == "computed"


def test_plans_stand_side_by_side():
    console = Console(width=150, record=True, file=io.StringIO())
    hosted = setting("infinigen")
    beside = dataclasses.replace(planned_full(), setting=hosted, cache=planner.cache_bytes(hosted), work=bounds.decode_work(hosted))
    command.show([planned_full(), beside], console)
    text = console.export_text()
    for words in (
        "kvjax-1m (float32) on cpu",
        "nothing is measured",
        "keys and values",
        "pool of keys",
        "partial keys",
        "fits",
        "Compiled: all layers",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: open_device("b300"), "unknown topology 'b300'; choose from h200, h100, a100"),
        (lambda: setting("infinigen", output_len=CONTEXT), f"output_len={CONTEXT}: a context of {CONTEXT} tokens has room for 1 to"),
        (lambda: setting("full", batch=0), "at least 1"),
        (lambda: Setting(preset("kvjax-1m"), parse_strategy("infinigen", transfer="driven"), 1, 256), "plan transfer=jit"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_bad_flags_end_the_command_in_one_line():
    process = subprocess.run([sys.executable, "-m", "kvjax.plan", "--model=opt-14b"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr.startswith("kvjax: unknown model 'opt-14b'")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "cpu"])
def test_a_card_compiles_or_says_which_extra_brings_its_compiler(name):
    try:
        device = open_device(name)
    except PlanError as error:
        if "pip install 'kvjax[aot]'" not in str(error) or "\n" in str(error):
            pytest.fail(f"not one line that names the extra: {error}")
        pytest.skip("the compiler for this card is not installed (extra aot)")
    small = dataclasses.replace(setting("full", batch=2, context=64), dtype="bfloat16")
    found = plan(small.with_layers(1), device, search=False)
    assert 0 < found.decode_peak < 1e8
    assert found.roofline is not None
