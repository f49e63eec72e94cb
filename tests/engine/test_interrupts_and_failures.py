"""Serving that is interrupted at any moment, and requests that fail: what is measured is told, and told apart."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import Engine, Model, NotFiniteError, Sampling, generate
from kvjax.cache import Strategy
from kvjax.cache.policies import Full
from kvjax.engine import offline, serve
from kvjax.engine.load import Fixed, Load, make_load
from kvjax.models import parameters
from kvjax.quality import fidelity


def make_engine(model: Model) -> Engine:
    return Engine(model, "vllm", kv_memory="1MiB", max_num_seqs=2, max_model_len=96, prefill_chunk=32)


@pytest.fixture(scope="module")
def engine(byte_model) -> Engine:
    warm = make_engine(byte_model)
    warm.warm_up([40])
    return warm


@pytest.fixture(scope="module")
def load(byte_model) -> Load:
    return make_load(byte_model, num_requests=12, input_len=Fixed(40), output_len=Fixed(8))


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C that much later, if the block still runs."""
    before = signal.signal(signal.SIGALRM, lambda signum, frame: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_at_any_moment_of_serving_keeps_what_was_served(engine, load):
    whole = serve.serve(engine, load)
    wanted = {one.request.index: one.tokens for one in whole.served}
    interrupted = 0
    for moment in np.linspace(1e-4, whole.duration, 25):
        service = None
        with contextlib.suppress(KeyboardInterrupt), interrupted_after(moment):  # of one that comes just before or after serving
            service = serve.serve(engine, load)
        assert (engine.busy, engine.requests, engine.sample(0.0).kv_usage) == (False, (), 0.0)
        if service is None or service.complete:
            continue
        interrupted += 1
        for one in service.served:
            assert one.reason in ("length", "abort")
            assert one.tokens == wanted[one.request.index][: len(one.tokens)]
            assert one.completed == (len(one.tokens) == 8)
        assert service.record(engine)["refused"] == 0
    assert interrupted >= 10


def test_peaks_are_seen_however_seldom_one_looks(engine, load, monkeypatch):
    """The whole load between two looks at the clock."""
    monkeypatch.setattr(serve, "SAMPLE_EVERY", np.inf)
    service = serve.serve(engine, load)
    most, blocks = max(s.kv_usage for s in service.samples), engine.scheduler.blocks
    assert most == 2 * np.ceil((40 + 8 - 1) / blocks.block_size) / blocks.num_blocks, "of two requests at a time"
    record = service.record(engine)
    assert record["kv_usage_peak"] == most
    assert record["kv_bytes_per_token"] > 0


def test_an_interrupt_comes_between_two_calls_of_an_engine(engine):
    prompt = list(range(40))
    expected = list(engine.stream(prompt, max_tokens=40, stop_tokens=[]))
    for moment in np.linspace(1e-4, 0.02, 10):
        engine.add("a", prompt, max_tokens=40, stop_tokens=[])
        tokens: list[int] = []
        with contextlib.suppress(KeyboardInterrupt), interrupted_after(moment):
            while engine.busy:
                tokens += [token for output in engine.step() for token in output.tokens]
        while engine.busy:
            tokens += [token for output in engine.step() for token in output.tokens]
        rest = iter(expected)
        assert all(token in rest for token in tokens)
        assert len(tokens) >= 40 - 1  # what a step returned to nobody is all that can be lost
        assert engine.requests == ()


# ----------------------------------------------------------------------------------------------------------------- not finite


def damaged(model: Model, value: float) -> Model:
    """The model with one weight of the head that is not finite."""
    params = jax.tree.map(lambda x: x, model.params)
    embed = params["params"]["embed"]
    return dataclasses.replace(model, params={**params, "params": {**params["params"], "embed": embed.at[7, 3].set(value)}})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_generation_from_logits_that_are_not_finite_is_an_error(byte_model, value):
    bad = damaged(byte_model, value)
    with pytest.raises(
        NotFiniteError, match=r"bytes in float32 under h2o.*the logits of prompt \d are not finite after 0 generated tokens"
    ):
        generate(bad, [[1, 2, 3], [4, 5]], strategy="h2o(heavy=2,recent=2)", max_new_tokens=4)


def test_a_weight_that_is_not_finite_is_named(byte_model):
    parameters.check_finite(byte_model.params, "bytes")
    with pytest.raises(NotFiniteError, match="model bytes: embed is not finite in float32"):
        parameters.check_finite(damaged(byte_model, np.nan).params, "bytes")
    big = jax.tree.map(lambda x: (x * 1e6).astype(jnp.float16), byte_model.params)
    with pytest.raises(NotFiniteError, match="is not finite in float16"):
        parameters.check_finite(big, "bytes")


def test_nothing_agrees_with_what_is_no_number():
    logits, broken = np.zeros((2, 3, 5), np.float32), np.full((2, 3, 5), np.nan, np.float32)
    targets = np.zeros((2, 3), np.int32)
    for full, other in ((logits, broken), (broken, logits), (broken, broken)):
        compared = fidelity.Comparison(*(np.asarray(x) for x in fidelity.compare(full, other, targets)))
        assert compared.summary()["same_top1"].value == 0
    assert fidelity.Comparison(*(np.asarray(x) for x in fidelity.compare(logits, logits, targets))).summary()["same_top1"].value == 1


def test_a_measurement_of_a_damaged_model_is_an_error(byte_model):
    workload = offline.make_workload(byte_model, 2, 96, 0, 2)
    with pytest.raises(NotFiniteError, match="logits are not finite, so there is nothing to compare"):
        offline.judge([(damaged(byte_model, np.nan), Strategy(Full()))], workload, batch_size=2)


def test_requests_that_fail_were_not_refused(byte_model, load):
    bad = make_engine(damaged(byte_model, np.nan))
    service = serve.serve(bad, dataclasses.replace(load, requests=load.requests[:3]))
    record = service.record(bad)
    assert (record["completed"], record["failed"], record["refused"]) == (0, 3, 0)
    assert {one.reason for one in service.served} == {"error: logits are not finite"}
    long = dataclasses.replace(load.requests[0], max_tokens=200)
    service = serve.serve(bad, dataclasses.replace(load, requests=(long, load.requests[1])))
    record = service.record(bad)
    assert (record["completed"], record["failed"], record["refused"]) == (0, 2, 1)


# ------------------------------------------------------------------------------------------------------------ a request's own draw


def test_a_sampled_request_does_not_depend_on_its_batch(byte_model):
    workload = offline.make_workload(byte_model, 5, 64, 0, 1)
    sampled = [
        offline.measure(byte_model, "full", workload, batch_size=size, output_len=6, seed=3, sampling=Sampling(1.0), weighs=False).samples
        for size in (2, 4)
    ]
    assert sampled[0] == sampled[1]
    engine = Engine(byte_model, "full", kv_memory="1MiB", max_model_len=96, sampling=Sampling(1.0))
    for index, prompt in enumerate(workload.prompts):
        assert list(engine.stream(prompt, max_tokens=6, seed=3 + index, stop_tokens=[])) == sampled[0][index]
