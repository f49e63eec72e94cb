"""Spec strings: what they mean, what they refuse and with which words."""

import math

import pytest

from kvjax.cache import (
    H2O,
    POLICIES,
    STORES,
    DenseStore,
    Full,
    HostStore,
    InfiniGen,
    InfiniGenPaper,
    OracleTopK,
    PagedStore,
    Strategy,
    Streaming,
    parse_policy,
    parse_strategy,
    split_specs,
)
from kvjax.errors import KvjaxError, SpecError

MEANINGS = [
    ("full", Full()),
    ("h2o", H2O(0.1, 0.1)),
    ("h2o()", H2O()),
    ("h2o(heavy=8,recent=8)", H2O(8, 8)),
    (" h2o( heavy = 0.1 , recent=12 ) ", H2O(0.1, 12)),
    ("h2o(decode=False,group=max)", H2O(decode=False, group="max")),
    ("h2o(group='first')", H2O(group="first")),
    ("streaming", Streaming(4, 0.2)),
    ("streaming(sinks=4,window=252)", Streaming(4, 252)),
    ("oracle_topk(k=0.05)", OracleTopK(0.05)),
    ("kvjax.cache:H2O(heavy=8,recent=8)", H2O(8, 8)),
]


@pytest.mark.parametrize(("spec", "policy"), MEANINGS, ids=[spec for spec, _ in MEANINGS])
def test_meaning_and_round_trip(spec, policy):
    assert parse_policy(spec) == policy
    assert parse_policy(policy.describe()) == policy
    assert parse_strategy(spec) == Strategy(policy)
    assert parse_strategy(parse_strategy(spec).describe()) == Strategy(policy)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Full(), "full"),
        (H2O(), "h2o(heavy=0.1,recent=0.1)"),
        (H2O(8, 8, decode=False), "h2o(heavy=8,recent=8,decode=False)"),
        (H2O(8, 8, group="max"), "h2o(heavy=8,recent=8,group=max)"),
        (Streaming(), "streaming(sinks=4,window=0.2)"),
        (OracleTopK(16), "oracle_topk(k=16)"),
        (InfiniGen(), "infinigen(alpha=8.0,partial=0.5,budget=0.2,sinks=4,recent=16)"),
        (InfiniGenPaper(), "infinigen_paper(alpha=4.0,partial=0.3,budget=0.2,sinks=0,recent=0)"),
        (InfiniGenPaper(alpha=5.0, group="mass"), "infinigen_paper(alpha=5.0,partial=0.3,budget=0.2,sinks=0,recent=0,group=mass)"),
        (InfiniGen(5, 0.2, 400, victim="lru"), "infinigen(alpha=5,partial=0.2,budget=400,sinks=4,recent=16,victim=lru)"),
        (
            InfiniGen(alpha=math.inf, sinks=0, recent=0, skew=False, full_layers=0),
            "infinigen(alpha=inf,partial=0.5,budget=0.2,sinks=0,recent=0,skew=False,full_layers=0)",
        ),
        (InfiniGen(pool=0.8, count="batch"), "infinigen(alpha=8.0,partial=0.5,budget=0.2,sinks=4,recent=16,count=batch,pool=0.8)"),
    ],
)
def test_description_shows_numbers_always_and_switches_when_changed(policy, text):
    assert policy.describe() == text
    assert parse_policy(text) == policy


REFUSED = [
    ("h20", r"unknown strategy 'h20'; choose from full, streaming, h2o, infinigen, infinigen_paper, oracle_topk"),
    ("", r"cannot read strategy ''; write a name, or a name with arguments like h2o\(heavy=0.1,recent=0.1\)"),
    ("h2o(", "cannot read strategy"),
    ("h2o)", "cannot read strategy"),
    ("h2o.full", "cannot read strategy"),
    ("1 + 1", "cannot read strategy"),
    ("h2o(heavy=1)(recent=1)", "cannot read strategy"),
    ("h2o\0", "cannot read strategy"),
    ("h2o(0.1)", "arguments need names"),
    ("h2o(**x)", "arguments need names"),
    ("h2o(hevy=0.1)", "strategy h2o has no argument 'hevy'; it takes heavy, recent, decode, group"),
    ("full(k=1)", "strategy full has no argument 'k'; it takes no arguments"),
    ("h2o(heavy=print(1))", "an argument is a number, a word, True or False"),
    ("h2o(heavy=lots)", r"h2o: heavy='lots' is not a number; give an int \(tokens\) or a float \(fraction of the prompt\)"),
    ("h2o(heavy=True)", "h2o: heavy=True is not a number"),
    ("h2o(heavy=-1)", "h2o: heavy=-1 is negative"),
    ("h2o(heavy=1.5)", r"h2o: heavy=1.5 is not a fraction between 0 and 1; write an int for tokens"),
    ("h2o(heavy=-0.5)", "h2o: heavy=-0.5 is not a fraction between 0 and 1"),
    ("h2o(heavy=1e400)", "h2o: heavy=inf is not a fraction between 0 and 1"),
    ("h2o(heavy=0,recent=0)", "h2o: heavy=0 and recent=0 keep nothing"),
    ("h2o(group=mean)", "h2o: group='mean' does not exist; choose from sum, first, max"),
    ("h2o(decode=maybe)", "h2o: decode='maybe' is not True or False"),
    ("h2o(heavy=1,heavy=2)", "gives heavy twice"),
    ("no_such_module:Mine", "cannot import module 'no_such_module' for strategy no_such_module:Mine"),
    ("pathlib:Path", "pathlib:Path is not a kvjax.Policy dataclass"),
    ("kvjax.cache:Nothing", "kvjax.cache:Nothing is not a kvjax.Policy dataclass"),
    ("streaming(window=0)", "streaming: window=0 would drop every new token"),
    ("oracle_topk(k=0)", "oracle_topk: k=0 reads nothing"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[repr(spec) for spec, _ in REFUSED])
def test_refused_in_one_line(spec, message):
    with pytest.raises(SpecError, match=message) as error:
        parse_policy(spec)
    assert isinstance(error.value, KvjaxError)
    assert "\n" not in str(error.value)


def test_unknown_store():
    with pytest.raises(SpecError, match=r"unknown store 'cloud'; choose from dense, paged, host$"):
        parse_strategy("full", "cloud")


@pytest.mark.parametrize(
    ("spec", "store", "strategy"),
    [
        ("full", None, Strategy(Full(), DenseStore())),
        ("full", "paged", Strategy(Full(), PagedStore())),
        ("full+dense", None, Strategy(Full(), DenseStore())),
        ("full+dense", "paged", Strategy(Full(), DenseStore())),
        ("full+paged", "dense", Strategy(Full(), PagedStore())),
        (" h2o(heavy=8, recent=8)+paged ", None, Strategy(H2O(8, 8), PagedStore())),
        ("kvjax.cache:H2O(heavy=8,recent=8)+paged", None, Strategy(H2O(8, 8), PagedStore())),
        ("vllm", None, Strategy(Full(), PagedStore())),
        ("vllm", "paged", Strategy(Full(), PagedStore())),
        ("vllm+paged", None, Strategy(Full(), PagedStore())),
        ("full+host", None, Strategy(Full(), HostStore())),
        ("full", "host", Strategy(Full(), HostStore())),
        ("offload", "host", Strategy(Full(), HostStore())),
        ("h2o(heavy=8,recent=8)+host", "paged", Strategy(H2O(8, 8), HostStore())),
        ("infinigen", None, Strategy(InfiniGen(), HostStore())),
        ("infinigen", "paged", Strategy(InfiniGen(), HostStore())),
        ("infinigen(budget=64)+host", "dense", Strategy(InfiniGen(budget=64), HostStore())),
    ],
)
def test_store_of_a_spec(spec, store, strategy):
    assert parse_strategy(spec, store) == strategy


@pytest.mark.parametrize(("spec", "store"), [("vllm", "dense"), ("vllm+dense", None), (" vllm+dense", "paged")])
def test_alias_contradicted_by_a_store(spec, store):
    with pytest.raises(SpecError, match=r"means full in the paged store; for full in another store write full\+dense$"):
        parse_strategy(spec, store)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("full+cloud", r"cannot read strategy 'full\+cloud'"),
        ("full+", r"cannot read strategy 'full\+'"),
        ("+paged", "cannot read strategy ''"),
        ("full+paged+paged", r"cannot read strategy 'full\+paged'"),
        ("h3o+paged", "unknown strategy 'h3o'; choose from full, streaming, h2o, infinigen, infinigen_paper, oracle_topk, vllm"),
    ],
)
def test_store_that_does_not_exist_after_a_plus(spec, message):
    with pytest.raises(SpecError, match=message):
        parse_strategy(spec)


def test_page_size():
    assert parse_strategy("vllm", page_size=16).store == PagedStore(16)
    assert parse_strategy("h2o+paged", page_size=128).store == PagedStore(128)
    assert parse_strategy("full", "paged", page_size=16).store == PagedStore(16)
    assert parse_strategy("full", page_size=16).store == DenseStore()
    with pytest.raises(SpecError, match="page_size=0: a page holds at least one slot"):
        parse_strategy("vllm", page_size=0)


@pytest.mark.parametrize("store", ["dense", "paged"])
def test_policy_that_fetches_is_refused_where_there_is_nothing_to_fetch_from(store):
    with pytest.raises(SpecError, match=r"from a host store; the \w+ store has nothing to fetch from \(--store=host; ") as error:
        parse_strategy(f"infinigen+{store}")
    assert "\n" not in str(error.value)


def test_offload_in_another_store_is_a_contradiction():
    with pytest.raises(SpecError, match=r"offload means full in the host store; for full in another store write full\+paged$"):
        parse_strategy("offload", "paged")


def test_transfer():
    assert parse_strategy("offload", transfer="device").store == HostStore("device")
    assert parse_strategy("infinigen", "dense", transfer="device").store == HostStore("device")
    assert parse_strategy("infinigen").store == HostStore()
    assert parse_strategy("full", transfer="device").store == DenseStore()
    with pytest.raises(SpecError, match="unknown transfer 'pigeon'; choose from device, jit, driven"):
        parse_strategy("offload", transfer="pigeon")


PAIRS = [(policy, store) for policy in POLICIES for store in STORES if POLICIES[policy].home in (None, store)]


@pytest.mark.parametrize(("policy", "store"), PAIRS)
def test_description_names_policy_and_store(policy, store):
    strategy = Strategy(POLICIES[policy](), STORES[store]())
    assert parse_strategy(strategy.describe()) == strategy


def test_description_leaves_out_the_default_store_and_prefers_an_alias():
    assert Strategy(H2O(8, 8), DenseStore()).describe() == "h2o(heavy=8,recent=8)"
    assert Strategy(H2O(8, 8), PagedStore()).describe() == "h2o(heavy=8,recent=8)+paged"
    assert Strategy(Full(), PagedStore()).describe() == "vllm"
    assert Strategy(Full(), HostStore()).describe() == "offload"
    assert Strategy(H2O(8, 8), HostStore()).describe() == "h2o(heavy=8,recent=8)+host"
    assert Strategy(InfiniGen(), HostStore("device")).describe() == InfiniGen().describe()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("full", ["full"]),
        ("full, h2o(heavy=8,recent=8) ,streaming", ["full", "h2o(heavy=8,recent=8)", "streaming"]),
        ("vllm,h2o(heavy=8,recent=8)+paged,full+dense", ["vllm", "h2o(heavy=8,recent=8)+paged", "full+dense"]),
        (",full,,", ["full"]),
        ("", []),
    ],
)
def test_split_at_commas_outside_parentheses(text, parts):
    assert split_specs(text) == parts


@pytest.mark.parametrize(
    ("policy", "amount", "expected"),
    [
        (Full(), 64, Full()),
        (H2O(), 9, H2O(4, 5)),
        (H2O(), 0.2, H2O(0.1, 0.1)),
        (Streaming(), 64, Streaming(4, 60)),
        (Streaming(), 0.3, Streaming(4, 0.3)),
        (Streaming(0.05), 0.2, Streaming(0.05, 0.15)),
        (OracleTopK(), 64, OracleTopK(64)),
        (InfiniGen(pool=100), 64, InfiniGen(budget=64, pool=100)),
    ],
)
def test_overall_budget(policy, amount, expected):
    assert policy.with_budget(amount) == expected


def test_budget_in_tokens_beside_sinks_as_a_fraction():
    with pytest.raises(SpecError, match=r"a budget of 64 tokens does not go with sinks=0.1; give the sinks in tokens"):
        Streaming(sinks=0.1).with_budget(64)


def test_budget_that_leaves_no_window():
    with pytest.raises(SpecError, match="a budget of 4 leaves no window beside sinks=4"):
        Streaming().with_budget(4)
