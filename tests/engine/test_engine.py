"""The engine on the device: whatever it does with a request, the tokens are those of `kvjax.generate` of this request alone."""

import collections
import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import InputError, KvjaxError, Sampling, SpecError, generate, load_model
from kvjax.cache import parse_strategy
from kvjax.cache.ledger import nbytes
from kvjax.engine import programs
from kvjax.engine.engine import Engine, RequestRefused
from kvjax.engine.memory import parse_memory
from kvjax.engine.scheduler import Status
from kvjax.models import Model
from kvjax.runtime import forward

POLICIES = [
    "full",
    "streaming(sinks=4,window=16)",
    "h2o(heavy=8,recent=8)",
    "h2o(heavy=0.1,recent=0.1)",
    "h2o(heavy=8,recent=8,decode=False)",
    "oracle_topk(k=8)",
]
STORES = [("dense", None), ("paged", 16), ("paged", 64)]
LENGTHS = (
    (1, 40),
    (180, 12),
    (7, 60),
    (33, 1),
    (64, 17),
    (100, 8),
    (50, 60),
    (122, 10),
    (58, 44),
    (61, 50),
    (97, 3),
)  # prompt and max_tokens
LONGEST = 224
HARMFUL = 251  # the token whose embedding is not finite in some tests


pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(scope="module")
def model(restless) -> Model:
    return restless()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, HARMFUL, length) for length, _ in LENGTHS]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Policy -> what `kvjax.generate` makes of each prompt: one ragged batch, whose rows do not see each other (test_generation)."""

    @functools.cache
    def tokens(policy: str) -> list[list[int]]:
        rows = generate(model, prompts, strategy=policy, max_new_tokens=60, steps_per_call=59).tokens
        return [row[:new] for row, (_, new) in zip(rows, LENGTHS, strict=True)]

    return tokens


def make(model: Model, spec: str = "full", store: str = "paged", page_size: int | None = 16, **options) -> Engine:
    """An engine of three rows, and hardly more pages than the longest request takes if they are taken one by one.

    Tests that ask for the same share its compiled programs.
    """
    strategy = parse_strategy(spec, store, page_size=page_size)
    scarce = not strategy.policy.evicts and store == "paged"
    memory = "512KiB" if not scarce else "160KiB" if page_size == 64 else "128KiB"
    limits: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": LONGEST, "prefill_chunk": 32, "kv_memory": memory, "extents": 1 + scarce}
    return Engine(model, strategy, **limits | options)


@dataclasses.dataclass
class News:
    """What has been heard of requests, by name and sample."""

    tokens: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    reasons: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)

    def hear(self, outputs):
        for output in outputs:
            key = (output.request, output.index)
            assert key not in self.reasons, "news after the end"
            self.tokens[key] += output.tokens
            if output.finished:
                self.reasons[key] = output.reason


def finish(engine: Engine, news: News | None = None) -> News:
    """Steps until nothing is left to do, and makes sure that nothing is left behind."""
    news = News() if news is None else news
    while engine.busy:
        news.hear(engine.step())
    engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.used_blocks == 0
    assert sorted(engine.scheduler._rows) == list(range(engine.limits.max_num_seqs))
    return news


def until(engine: Engine, condition, news: News | None = None) -> News:
    news = News() if news is None else news
    for _ in range(200):
        if condition():
            return news
        news.hear(engine.step())
    raise AssertionError("it never came to that")


def serve(engine: Engine, requests: dict[str, tuple], rng: np.random.Generator, preempt: float = 0.0) -> News:
    """Adds requests (prompt and options of `add`) in random order while others are served, and preempts some before a step.

    Twelve preemptions at most: where generated tokens are fed again one by one, nothing would ever end under a steady rain of them.
    """
    news = News()
    waiting = list(rng.permutation(list(requests)))
    enough = engine.scheduler.preemptions + 12
    while waiting or engine.busy:
        if waiting and rng.random() < 0.4:
            prompt, options = requests[waiting[-1]]
            engine.add(str(waiting.pop()), prompt, **options)
        if engine._sequences and rng.random() < preempt and engine.scheduler.preemptions < enough:
            engine.preempt(str(rng.choice(list(engine._sequences))))
        news.hear(engine.step())
    return finish(engine, news)


def load_of(prompts, tokens: list[list[int]]) -> tuple[dict[str, tuple], dict[tuple[str, int], list[int]]]:
    """All prompts as requests, some with a stop token, and the tokens each should get."""
    stops = {2: tokens[2][5], 5: tokens[5][0], 7: 255}
    requests, expected = {}, {}
    for i, (prompt, (_, new)) in enumerate(zip(prompts, LENGTHS, strict=True)):
        requests[f"r{i}"] = (prompt, {"max_tokens": new, "stop_tokens": [stops[i]] if i in stops else None})
        stopped = tokens[i].index(stops[i]) + 1 if stops.get(i) in tokens[i] else new
        expected[f"r{i}", 0] = tokens[i][:stopped]
    return requests, expected


def reference(model: Model, prompt, strategy: str, sampling: Sampling, seed: int, max_tokens: int) -> list[int]:
    return generate(model, [prompt], strategy=strategy, max_new_tokens=max_tokens, sampling=sampling, seed=seed).tokens[0]


# ----------------------------------------------------------------------------------------------------------------- as if it were alone


def test_the_model_tells_strategies_and_contexts_apart(model, alone, prompts):
    assert len({str(alone(policy)) for policy in POLICIES}) == len(POLICIES)
    others = [(prompt + (np.arange(len(prompt)) == 0)) % HARMFUL for prompt in prompts]
    changed = generate(model, others, max_new_tokens=60, steps_per_call=59).tokens
    for row, other in zip(alone("full"), changed, strict=True):
        assert sum(a != b for a, b in zip(row, other, strict=False)) > len(row) // 2


@pytest.mark.parametrize(("store", "page_size"), STORES)
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_tokens_are_those_of_each_request_alone(model, alone, prompts, policy, store, page_size):
    engine = make(model, policy, store, page_size)
    requests, expected = load_of(prompts, alone(policy))
    growing = ("r6", "r8", "r9")
    for name in growing:
        engine.add(name, requests[name][0], **requests[name][1])
    assert finish(engine).tokens == {(name, 0): expected[name, 0] for name in growing}
    assert (engine.scheduler.preemptions > 0) == engine.scheduler.need.grows, "pages run out for those who take them as they go"
    for seed in range(4):
        news = serve(engine, requests, np.random.default_rng(seed), preempt=0.25 * (seed > 0))
        assert news.tokens == expected
        assert set(news.reasons.values()) == {"length", "stop"}
    assert engine.scheduler.preemptions >= 30


def test_prefix_caching_changes_no_token(model, alone, prompts):
    engine = make(model, prefix_caching=True)
    requests, expected = load_of(prompts, alone("full"))
    for seed in range(5):
        assert serve(engine, requests, np.random.default_rng(seed), preempt=0.25 * (seed > 1)).tokens == expected
    assert engine.scheduler.blocks.prefix_hit_tokens > 200


def test_text_on_a_trained_model():
    trained = load_model("kvjax-1m", dtype="float32")
    source = pathlib.Path(__file__).read_text()
    texts = [source[:90], source[700:711], source[900:1000]]
    engine = Engine(trained, "vllm", kv_memory="2MiB", max_num_seqs=2, max_model_len=128, prefill_chunk=64, extents=1)
    for i, text in enumerate(texts):
        engine.add(f"r{i}", text, max_tokens=20)
    tokens = generate(trained, texts, max_new_tokens=20, steps_per_call=19).tokens
    assert finish(engine).tokens == {(f"r{i}", 0): row for i, row in enumerate(tokens)}


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_short_outputs_end_and_leave_nothing(model, alone, prompts, max_tokens):
    for options in ({}, {"prefix_caching": True}):
        engine = make(model, **options)
        for i in (0, 2, 4, 6):
            engine.add(f"r{i}", prompts[i], max_tokens=max_tokens)
        assert finish(engine).tokens == {(f"r{i}", 0): alone("full")[i][:max_tokens] for i in (0, 2, 4, 6)}


def test_a_stop_is_noticed_one_step_late(model, alone, prompts):
    """The step after the stop token is under way when it becomes known; nothing of it is told."""
    engine = make(model)
    tokens = alone("full")[2]
    engine.add("r", prompts[2], max_tokens=24, stop_tokens=[tokens[3]])
    (sequence,) = engine._sequences["r"]
    news = finish(engine)
    assert (news.tokens["r", 0], news.reasons["r", 0]) == (tokens[:4], "stop")
    assert sequence.dispatched == 5


def test_models_own_stop_tokens_are_the_default(model, alone, prompts):
    tokens = alone("full")[2]
    stopping = Model(dataclasses.replace(model.config, stop_tokens=(tokens[3],)), model.params, None)
    engine = make(model)
    engine.model = stopping
    engine.add("own", prompts[2], max_tokens=8)
    engine.add("none", prompts[2], max_tokens=8, stop_tokens=())
    assert finish(engine).tokens == {("own", 0): tokens[:4], ("none", 0): tokens[:8]}


# -------------------------------------------------------------------------------------------------------------------- samples and seeds

HOT = Sampling(temperature=4.0)


@pytest.fixture(scope="module")
def sampled(model, prompts):
    """Policy -> the tokens of prompt 5 alone with seeds 7 to 11, and of prompt 1 with seed 12."""

    @functools.cache
    def tokens(policy: str) -> list[list[int]]:
        rows = [prompts[5]] * 5 + [prompts[1]]
        return generate(model, rows, strategy=policy, max_new_tokens=8, sampling=HOT, seed=7, steps_per_call=7).tokens

    return tokens


def test_samples_share_their_prompt_and_write_apart(model, prompts, sampled):
    engine = make(model, sampling=HOT)
    blocks = engine.scheduler.blocks
    engine.add("r", prompts[5], max_tokens=8, n=3, seed=7)
    news, used = News(), []
    while engine.busy:
        news.hear(engine.step())
        tables = [list(blocks.table(s.id)) for s in engine.scheduler.running]
        used.append((len(tables), blocks.used_blocks))
        assert len({str(table[:6]) for table in tables}) <= 1
    rows = sampled("full")
    assert len({str(row) for row in rows}) == 6
    assert news.tokens == {("r", i): rows[i] for i in range(3)}
    assert (3, 7) in used, "100 tokens and the next one take seven pages, all of them shared at first"
    assert max(used) == (3, 6 + 3), "the last of them, when they write, is copied for two of the three"
    finish(engine)


@pytest.mark.parametrize("policy", ["full", "h2o(heavy=8,recent=8)"])
def test_every_sample_is_a_request_with_its_own_seed(model, prompts, sampled, policy):
    """Five samples and three rows: two of them queue. What else is served, and preemption, make no difference."""
    engine = make(model, policy, sampling=HOT)
    rows = sampled(policy)
    for seed in range(3):
        requests = {
            "five": (prompts[5], dict(max_tokens=8, n=5, seed=7)),
            "alone": (prompts[5], dict(max_tokens=8, seed=9)),
            "first": (prompts[5], dict(max_tokens=1, n=2, seed=10)),
            "long": (prompts[1], dict(max_tokens=8, seed=12)),
            "other": (prompts[2], dict(max_tokens=5, n=2, seed=0)),
        }
        news = serve(engine, requests, np.random.default_rng(seed), preempt=0.2 * (seed > 0))
        assert [news.tokens["five", i] for i in range(5)] == rows[:5]
        assert news.tokens["alone", 0] == rows[2]
        assert [news.tokens["first", i] for i in range(2)] == [row[:1] for row in rows[3:5]]
        assert news.tokens["long", 0] == rows[5]
        assert len(news.reasons) == 11


def test_samples_without_room_for_their_pages_queue(model, prompts, sampled):
    """Two requests of h2o fit into the pool: the third sample waits until one has ended."""
    policy = "h2o(heavy=8,recent=8)"
    engine = make(model, policy, sampling=HOT)
    budget = engine.budget
    engine.scheduler.blocks.admit(-1, budget.num_pages - 4)
    engine.add("r", prompts[5], max_tokens=8, n=3, seed=7)
    news = until(engine, lambda: engine.scheduler.running)
    assert (len(engine.scheduler.running), [s.index for s in engine.scheduler.waiting]) == (2, [2])
    while engine.busy:
        news.hear(engine.step())
    assert [news.tokens["r", i] for i in range(3)] == sampled(policy)[:3]
    engine.scheduler.blocks.release(-1)
    finish(engine)


# ---------------------------------------------------------------------------------------------------- ends before its time


STATES = {
    "waiting": lambda engine, s: s.status is Status.WAITING and engine.scheduler.waiting,
    "mid-prefill": lambda engine, s: s.status is Status.PREFILL and 0 < s.computed < len(s.target),
    "running": lambda engine, s: s.status is Status.RUNNING and s.outputs,
    "first token under way": lambda engine, s: s.status is Status.RUNNING and not s.outputs,
    "retired": lambda engine, s: s.status is Status.RUNNING and s.row < 0,
}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("state", STATES)
def test_abort(model, alone, prompts, state, n):
    engine = make(model)
    full = alone("full")
    for i in (2, 4):
        engine.add(f"r{i}", prompts[i], max_tokens=LENGTHS[i][1])
    if state == "waiting":
        engine.add("before", prompts[0], max_tokens=9)
    engine.add("r", prompts[5], max_tokens=4, n=n)
    sequences = engine._sequences["r"]
    news = until(engine, lambda: STATES[state](engine, sequences[0]))
    engine.abort("r")
    assert {s.status for s in sequences} == {Status.ABORTED}
    engine.scheduler.blocks.check()
    with pytest.raises(InputError, match="no request 'r' is being served"):
        engine.abort("r")
    engine.add("r", prompts[6], max_tokens=3)  # the name is free again
    later = News()
    for output in engine.step():
        (later if output.request == "r" and output.reason != "abort" else news).hear([output])
    ends = {news.reasons.pop(("r", i)) for i in range(n)}
    assert ends == {"abort"}
    for i in range(n):
        told = news.tokens.pop(("r", i))
        assert told == full[5][: len(told)]
        assert len(told) < 4
    finish(engine, news)
    assert news.tokens.pop(("r", 0)) == full[6][:3]
    assert {name: row for (name, _), row in news.tokens.items() if name != "before"} == {f"r{i}": full[i] for i in (2, 4)}


def test_abort_of_samples_that_have_not_begun(model, prompts):
    engine = make(model)
    engine.add("r", prompts[5], max_tokens=4, n=5)
    until(engine, lambda: engine.scheduler.running)
    assert len(engine.scheduler.waiting) == 2
    engine.abort("r")
    news = finish(engine)
    assert set(news.reasons.values()) == {"abort"}
    assert len(news.reasons) == 5


def test_abort_of_nobody(model):
    with pytest.raises(InputError, match="no request 'x' is being served"):
        make(model).abort("x")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            [1] * 200,
            {"max_tokens": 25},
            "request 'r' with 200 prompt tokens and max_tokens=25 exceeds max_model_len=224; shorten one of them",
        ),
        ([1], {"max_tokens": 0}, "request 'r': max_tokens=0 is out of range; give one of at least 1"),
        ([1], {"n": 0}, "n=0 is out of range; give one of at least 1"),
        ([1], {"seed": 2**31}, "seed=2147483648 is out of range; give one of at least 0"),
        ([1], {"seed": 2**31 - 2, "n": 3}, "seed=2147483646 is out of range; give one from 0 to 2147483645"),
        ([], {}, "prompt 0 is not a non-empty list of token ids"),
        ("", {}, "prompt 0 is not a non-empty list of token ids"),
        ([256], {}, "token ids from 256 to 256"),
    ],
)
def test_requests_are_checked(model, prompt, options, message):
    engine = make(model)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        engine.add("r", prompt, **options)
    assert isinstance(error.value, RequestRefused) == ("max_model_len" in message)
    assert not engine.busy
    engine.add("r", [1], max_tokens=1)  # the name is free
    assert finish(engine).reasons == {("r", 0): "length"}


def test_names_are_unique_while_they_are_in_use(model):
    engine = make(model)
    engine.add("r", [1], max_tokens=2)
    with pytest.raises(InputError, match="request 'r' is being served already; give it another name"):
        engine.add("r", [2])
    assert len(finish(engine).tokens["r", 0]) == 2


# ------------------------------------------------------------------------------------------------------------------------------- streams


def test_streams_beside_each_other_and_beside_requests(model, alone, prompts):
    engine = make(model)
    full = alone("full")
    engine.add("r", prompts[4], max_tokens=17)
    streams = {i: engine.stream(prompts[i], max_tokens=LENGTHS[i][1]) for i in (2, 3, 5)}
    found, news = {i: [next(stream)] for i, stream in streams.items()}, News()
    for _ in range(5):
        found[2].append(next(streams[2]))
        news.hear(engine.step())
    for i, stream in streams.items():
        found[i] += stream
    assert found == {i: full[i] for i in streams}
    assert finish(engine, news).tokens == {("r", 0): full[4]}


def test_a_stream_that_is_closed_is_aborted(model, alone, prompts):
    engine = make(model)
    engine.add("r", prompts[4], max_tokens=17)
    stream = engine.stream(prompts[2], max_tokens=24)
    assert [next(stream), next(stream)] == alone("full")[2][:2]
    stream.close()
    assert list(engine._sequences) == ["r"]
    assert finish(engine).tokens == {("r", 0): alone("full")[4]}


def test_a_stream_that_is_refused_leaves_nothing(model):
    engine = make(model)
    with pytest.raises(RequestRefused, match="exceeds max_model_len=224"):
        next(engine.stream([1] * 220, max_tokens=5))
    with pytest.raises(InputError, match="a stream is one sample"):
        next(engine.stream([1], n=2))
    assert not engine.busy


# ------------------------------------------------------------------------------------------------------------------------ prefix caching


def test_an_equal_prompt_finds_its_full_pages(model, alone, prompts):
    engine = make(model, prefix_caching=True)
    for i in range(3):
        engine.add(f"r{i}", prompts[5], max_tokens=8)
        assert finish(engine).tokens[f"r{i}", 0] == alone("full")[5]
        assert engine.scheduler.blocks.prefix_hit_tokens == i * 96
    engine.add("r", prompts[4], max_tokens=1)
    finish(engine)
    engine.add("r", prompts[4], max_tokens=1)
    assert finish(engine).tokens["r", 0] == alone("full")[4][:1]
    assert engine.scheduler.blocks.prefix_hit_tokens == 2 * 96 + 48, "one token at least is computed: the last page is not taken"


def test_a_conversation_finds_what_was_generated(model, prompts, alone):
    engine = make(model, prefix_caching=True)
    blocks = engine.scheduler.blocks
    engine.add("one", prompts[5], max_tokens=29)
    news = until(engine, lambda: len(engine._sequences["one"][0].outputs) == 29 - 8)
    text = np.concatenate([prompts[5], engine._sequences["one"][0].outputs])
    engine.add("while it runs", np.concatenate([text, prompts[2]]), max_tokens=2)
    until(engine, lambda: not engine.scheduler.waiting, news)
    assert blocks.prefix_hit_tokens == 112, "100 tokens of prompt and 12 of the output fill seven pages"
    finish(engine, news)
    second = np.concatenate([prompts[5], news.tokens["one", 0], prompts[2]])
    engine.add("two", second, max_tokens=6)
    finish(engine, news)
    assert blocks.prefix_hit_tokens == 112 + 128, "129 tokens were there; the last one was never fed"
    rows = generate(model, [np.concatenate([text, prompts[2]]), second], max_new_tokens=6, steps_per_call=5).tokens
    assert (news.tokens["while it runs", 0], news.tokens["two", 0]) == (rows[0][:2], rows[1])


# ----------------------------------------------------------------------------------------------------------------- what goes wrong stays


def harmed(model: Model, token: int) -> Model:
    """The model with an embedding that is not a number."""
    params = {"params": dict(model.params["params"])}
    params["params"]["embed"] = params["params"]["embed"].at[token].set(jnp.nan)
    return Model(model.config, params, None)


NOT_FINITE = "error: logits are not finite"
KINDS = {
    "vllm": dict(),
    "prefix-caching": dict(prefix_caching=True),
    "dense": dict(store="dense", page_size=None),
    "h2o": dict(spec="h2o(heavy=8,recent=8)"),
    "h2o-dense": dict(spec="h2o(heavy=8,recent=8)", store="dense", page_size=None),
    "oracle": dict(spec="oracle_topk(k=8)"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "max_tokens"), [(0, 9), (-1, 2), (40, 1), (80, 4)])
def test_a_request_that_fails_fails_alone(model, alone, prompts, kind, place, max_tokens):
    """Beside it, after it in its pages, and in the row where prompts are staged."""
    engine = make(harmed(model, HARMFUL), **KINDS[kind])
    bad = prompts[5].copy()
    bad[place] = HARMFUL
    rows = alone(KINDS[kind].get("spec", "full"))
    names = {f"r{i}": (prompts[i], dict(max_tokens=LENGTHS[i][1])) for i in (1, 2, 4, 7)}
    expected = {(f"r{i}", 0): rows[i] for i in (1, 2, 4, 7)}
    for seed in range(2):
        engine.add("bad", bad, max_tokens=max_tokens)
        news = serve(engine, names, np.random.default_rng(seed), preempt=0.1)
        assert news.reasons.pop(("bad", 0)) == NOT_FINITE
        assert news.tokens.pop(("bad", 0)) == []
        assert news.tokens == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "max_tokens"), [(0, 9), (-1, 2), (80, 1)])
def test_who_gets_the_pages_of_a_failure_finds_them_clean(model, alone, prompts, kind, place, max_tokens):
    """The next request takes the same pages, staging slots and row, and fills them up to just before the harmful end."""
    engine = make(harmed(model, HARMFUL), **KINDS[kind])
    bad = prompts[5].copy()
    bad[place] = HARMFUL
    need, blocks = engine.scheduler.need, engine.scheduler.blocks
    blocks.admit(-1, engine.budget.num_pages - need.pages(101 if need.grows else need.slots(100, 100 + max_tokens)))
    engine.add("bad", bad, max_tokens=max_tokens)
    engine.add("good", prompts[10], max_tokens=3)
    news = News()
    while engine.busy:
        news.hear(engine.step())
        assert len(blocks._tables) <= 2, "one of them at a time"
    blocks.release(-1)
    finish(engine, news)
    assert news.reasons == {("bad", 0): NOT_FINITE, ("good", 0): "length"}
    assert news.tokens["good", 0] == alone(KINDS[kind].get("spec", "full"))[10]


def test_a_harmful_prefix_is_harmful_from_the_cache_too(model, alone, prompts):
    engine = make(harmed(model, HARMFUL), prefix_caching=True)
    bad = prompts[5].copy()
    bad[70] = HARMFUL
    for name in ("bad", "again"):
        engine.add(name, bad, max_tokens=5)
        assert finish(engine).reasons == {(name, 0): NOT_FINITE}
    assert engine.scheduler.blocks.prefix_hit_tokens == 96
    engine.add("good", prompts[5], max_tokens=8)
    assert finish(engine).tokens["good", 0] == alone("full")[5]
    assert engine.scheduler.blocks.prefix_hit_tokens == 96 + 64, "what stands before the harmful token is as good as ever"


@pytest.mark.parametrize("kind", ["vllm", "h2o-dense"])
def test_pages_of_a_failure_nobody_noticed_are_clean(model, alone, prompts, kind):
    """Aborted and preempted half way through its prompt: its logits were never looked at."""
    engine = make(harmed(model, HARMFUL), **KINDS[kind])
    bad = prompts[1].copy()
    bad[:60] = HARMFUL
    rows = alone(KINDS[kind].get("spec", "full"))
    for act in (engine.abort, engine.preempt):
        engine.add("bad", bad, max_tokens=9)
        engine.add("good", prompts[7], max_tokens=5)
        news = until(engine, lambda: engine._sequences["bad"][0].computed > 60)
        act("bad")
        finish(engine, news)
        assert news.tokens["good", 0] == rows[7][:5]
        assert news.reasons["bad", 0] in ("abort", NOT_FINITE)


def test_what_is_computed_past_the_end_harms_nobody(model, alone, prompts):
    """The stop token itself is the harmful one; it is fed before anybody knows that the request has ended."""
    full = alone("full")
    stop = full[2][3]
    others = [i for i in (0, 4, 5, 7) if stop not in full[i] and stop not in prompts[i]]
    assert len(others) >= 2
    engine = make(harmed(model, stop))
    assert stop not in prompts[2]
    engine.add("r", prompts[2], max_tokens=24, stop_tokens=[stop])
    for i in others:
        engine.add(f"r{i}", prompts[i], max_tokens=LENGTHS[i][1])
    news = finish(engine)
    assert news.reasons["r", 0] == "stop"
    assert news.tokens == {("r", 0): full[2][:4]} | {(f"r{i}", 0): full[i] for i in others}


def test_values_that_overflow_are_noticed(model, prompts):
    """What is stored in their place is finite; nobody may take it for the truth."""
    params = jax.tree.map(lambda x: x, model.params)
    weight = params["params"]["layer_0"]["attention"]["v"]["weight"]
    params["params"]["layer_0"]["attention"]["v"]["weight"] = weight * 3e38
    engine = make(Model(model.config, params, None))
    engine.add("r", prompts[2], max_tokens=3)
    assert finish(engine).reasons == {("r", 0): NOT_FINITE}
    assert all(bool(jnp.isfinite(part).all()) for layer in engine._layers for part in layer.pool.v)


# ------------------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("memory", ["512KiB", "1000000", "3MB"])
@pytest.mark.parametrize(("store", "page_size"), STORES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_memory_that_is_given_is_the_memory_that_is_taken(model, policy, store, page_size, memory):
    engine = make(model, policy, store, page_size, kv_memory=memory, max_num_seqs=8)
    assert nbytes((engine._layers, engine._staging)) == engine.budget.total
    assert engine.budget.total <= parse_memory(memory) < engine.budget.total + engine.budget.page
    assert engine.budget.num_pages >= engine.budget.rows


@pytest.mark.parametrize(("store", "page_size"), STORES)
@pytest.mark.parametrize("policy", POLICIES)
def test_too_little_memory_is_refused_with_the_least_that_works(model, policy, store, page_size):
    with pytest.raises(InputError, match=r"kv_memory of 1000 bytes is too small for .*max_model_len=224 takes") as error:
        make(model, policy, store, page_size, kv_memory=1000)
    least = int(re.search(r"takes (\d+) bytes", str(error.value))[1])
    with pytest.raises(InputError, match="too small"):
        make(model, policy, store, page_size, kv_memory=least - 1)
    engine = make(model, policy, store, page_size, kv_memory=least)
    assert nbytes((engine._layers, engine._staging)) == least
    engine.add("longest", [1] * 220, max_tokens=4)
    turn = engine.scheduler.turn()
    assert len(turn.chunks) > 0, "it is admitted"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (67108864, 67108864),
        ("67108864", 67108864),
        ("64MiB", 64 * 2**20),
        (" 64 MiB ", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2GiB", 2**31),
        ("7B", 7),
    ],
)
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "64mib", "64 M", "-1", "1e6", "64MiB please", "1.2.3GB"])
def test_memory_that_cannot_be_read(text):
    with pytest.raises(SpecError, match=r"cannot read .* as an amount of memory; write bytes, or a number and one of B, KB"):
        parse_memory(text)


@pytest.mark.parametrize("text", [0, -5, "0", "0.0GiB", "0.3B"])
def test_no_memory(text):
    with pytest.raises(SpecError, match="of memory holds nothing"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(spec="h2o(heavy=8,recent=8)", prefix_caching=True), "prefix caching needs pages that depend on the prefix alone; h2o(hea"),
        (dict(spec="oracle_topk(k=8)", prefix_caching=True), "oracle_topk(k=8) drops or skips tokens"),
        (dict(store="dense", page_size=None, prefix_caching=True), "prefix caching shares pages; choose the paged store (vllm, or"),
        (dict(max_model_len=257), "max_model_len=257: model bytes has 256 positions; give 2 to 256"),
        (dict(max_model_len=1), "max_model_len=1"),
        (dict(max_num_seqs=0), "max_num_seqs=0 and prefill_chunk=32 must both be at least 1"),
        (dict(prefill_chunk=0), "prefill_chunk=0"),
        (dict(extents=0), "extents=0: a pool has at least one"),
        (dict(max_num_batched_tokens=3), "max_num_batched_tokens=3 leaves no room for prompts beside max_num_seqs=3"),
        (dict(watermark=1.0), "watermark=1.0 must be a fraction"),
        (dict(kv_memory="lots"), "cannot read 'lots' as an amount of memory"),
    ],
)  # fmt: skip
def test_options_are_checked(model, options, message):
    with pytest.raises(KvjaxError, match=re.escape(message)):
        make(model, **options)


# -------------------------------------------------------------------------------------------------------------- compiled once, and watched


def compiled_sizes() -> dict[str, int]:
    """How many programs every function of an engine has compiled, with layers unrolled and by calls."""
    names = ("_unrolled_decode", "_unrolled_chunk", "_before_decode", "_chosen", "_before_chunk", "commit_layer", "copy")
    functions = {name: getattr(programs, name) for name in names} | {name: getattr(forward, name) for name in ("_embed", "_block", "_head")}
    return {name: function._cache_size() for name, function in functions.items()}


@pytest.mark.parametrize("stringing", ["unroll", "calls"])
@pytest.mark.parametrize(
    ("spec", "max_num_seqs", "chunk", "buckets", "sampling"),
    [("full", 2, 32, 2, Sampling()), ("h2o(heavy=8,recent=8,decode=False)", 2, 16, 2, HOT)],
)
def test_nothing_is_compiled_under_load(monkeypatch, model, prompts, spec, max_num_seqs, chunk, buckets, sampling, stringing):
    """Growing, preemption, forks of rows with more pages than are copied at once: all of it runs what `warm_up` has compiled."""
    monkeypatch.undo()
    compiled = []
    listen = lambda event, duration, **_: event.endswith("backend_compile_duration") and compiled.append(event)  # noqa: E731
    model = dataclasses.replace(model, stringing=stringing)
    engine = make(model, spec, extents=1, max_num_seqs=max_num_seqs, prefill_chunk=chunk, sampling=sampling, kv_memory="390KiB")
    decode, before = "_unrolled_decode" if stringing == "unroll" else "_before_decode", compiled_sizes()
    told: list[str] = []
    calls = engine.warm_up(progress=told.append)
    sizes = compiled_sizes()
    assert sizes[decode] - before[decode] == buckets == sum(what.startswith("decode") for what in told)
    assert calls == len(told) + 3 + 2 * (engine._staging is not None)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        requests = {
            f"r{i}": (prompt, dict(max_tokens=new, n=1 + i % 3)) for i, (prompt, (_, new)) in enumerate(zip(prompts, LENGTHS, strict=True))
        }
        for seed in range(3):
            serve(engine, requests, np.random.default_rng(seed), preempt=0.1)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert sizes == compiled_sizes()


def test_sample_tells_the_state(model, prompts):
    engine = make(model)
    idle = engine.sample(1.5)
    assert (idle.time, idle.running, idle.waiting, idle.kv_usage, idle.kv_live_tokens, idle.kv_fragmentation) == (1.5, 0, 0, 0, 0, 0)
    pages = engine.budget.num_pages
    engine.add("a", prompts[5], max_tokens=8, n=2)
    engine.add("b", prompts[7], max_tokens=8)
    until(engine, lambda: len(engine.scheduler.running) == 2)
    state = engine.sample(2.0)
    (second,) = engine.scheduler.prefilling
    assert (state.running, state.waiting) == (3, 0)
    assert state.kv_usage == (7 + 8) / pages
    assert state.kv_live_tokens == 100 + second.computed, "the page that two samples share counts once"
    assert state.kv_fragmentation == pytest.approx(1 - state.kv_live_tokens / (15 * 16))
    engine.step()
    later = engine.sample(3.0)
    assert later.kv_live_tokens == 96 + 2 * 5 + second.computed
    assert later.context_tokens == 2 * 101 + second.computed
    engine.preempt("b")
    assert engine.sample(4.0).preemptions == 1
    assert engine.sample(4.0).waiting == 1
    finish(engine)


def test_preempting_what_has_no_pages_does_nothing(model, alone, prompts):
    engine = make(model)
    engine.preempt("nobody")
    engine.add("r", prompts[2], max_tokens=2)
    engine.preempt("r")
    news = until(engine, lambda: engine._sequences["r"][0].row < 0 and engine._sequences["r"][0].dispatched == 2)
    engine.preempt("r")
    assert engine.scheduler.preemptions == 0
    assert finish(engine, news).tokens == {("r", 0): alone("full")[2][:2]}
