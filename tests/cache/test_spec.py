"""Spec strings: what they mean, what they refuse and with which words."""

import dataclasses
import json
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    H2O,
    POLICIES,
    STORES,
    TOVA,
    TRANSFERS,
    Full,
    InfiniGen,
    InfiniGenPaper,
    OracleTopK,
    Random,
    Strategy,
    Streaming,
    dense,
    host,
    paged,
    parse_policy,
    parse_strategy,
    split_specs,
)
from kvjax.cache.identity import of_record
from kvjax.cache.policies.base import Amount, Policy
from kvjax.cache.policies.h2o import GroupReduction
from kvjax.cache.policies.infinigen import Count, GroupJoin, Victim
from kvjax.cache.spec import read_identity
from kvjax.errors import KvjaxError, SpecError
from kvjax.files import dumps


@dataclasses.dataclass(frozen=True)
class Worded(Policy):
    """A user's own."""

    keep: Amount
    word: str = "plain"
    switch: bool = False
    extra: str | float | None = None


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
    ("h20", r"unknown strategy 'h20'; choose from full, streaming, h2o, tova, random, infinigen, infinigen_paper, oracle_topk"),
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
        ("full", None, Strategy(Full(), dense())),
        ("full", "paged", Strategy(Full(), paged())),
        ("full+dense", None, Strategy(Full(), dense())),
        ("full+dense", "paged", Strategy(Full(), dense())),
        ("full+paged", "dense", Strategy(Full(), paged())),
        (" h2o(heavy=8, recent=8)+paged ", None, Strategy(H2O(8, 8), paged())),
        ("kvjax.cache:H2O(heavy=8,recent=8)+paged", None, Strategy(H2O(8, 8), paged())),
        ("vllm", None, Strategy(Full(), paged())),
        ("vllm", "paged", Strategy(Full(), paged())),
        ("vllm+paged", None, Strategy(Full(), paged())),
        ("full+host", None, Strategy(Full(), host())),
        ("full", "host", Strategy(Full(), host())),
        ("offload", "host", Strategy(Full(), host())),
        ("h2o(heavy=8,recent=8)+host", "paged", Strategy(H2O(8, 8), host())),
        ("infinigen", None, Strategy(InfiniGen(), host())),
        ("infinigen", "paged", Strategy(InfiniGen(), host())),
        ("infinigen(budget=64)+host", "dense", Strategy(InfiniGen(budget=64), host())),
    ],
)
def test_store_of_a_spec(spec, store, strategy):
    assert parse_strategy(spec, store) == strategy


@pytest.mark.parametrize(("spec", "store"), [("vllm", "dense"), ("vllm+dense", None), (" vllm+dense", "paged")])
def test_alias_contradicted_by_a_store(spec, store):
    with pytest.raises(SpecError, match=r"means full in the paged store; for full in another store write full\+dense$"):
        parse_strategy(spec, store)


@pytest.mark.parametrize(
    ("spec", "store"),
    [
        ("full+paged(16)", paged(16)),
        ("full+paged(page_size=16)", paged(16)),
        ("vllm+paged(16)", paged(16)),
        (" full + paged( 16 , extents = 2 ) ", paged(16, 2)),
        ("full+paged(extents=2)", paged(64, 2)),
        ("full+host(device)", host("device")),
        ("full+host(transfer='device',levels=8)", host("device", 8)),
        ("offload+host(levels=8)", host("jit", 8)),
        ("infinigen+host(driven)", host("driven")),
        ("full+dense()", dense()),
    ],
)
def test_options_of_a_store(spec, store):
    assert parse_strategy(spec).store == store


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("full+cloud", r"unknown store or codec 'cloud' in strategy 'full\+cloud'; stores: dense, paged, host; there is no codec yet$"),
        ("full+paged+int8", r"unknown codec 'int8' in strategy 'full\+paged\+int8'; there is no codec yet$"),
        ("full+int8+paged", r"unknown store or codec 'int8'"),
        ("full+paged+paged", r"strategy 'full\+paged\+paged' names two stores; write one, like h2o\+paged\(16\)$"),
        ("full+", r"strategy 'full\+' has a \+ with nothing behind it; write a store there \(dense, paged, host\), or no \+$"),
        ("+paged", "cannot read strategy ''"),
        ("full+paged(", r"cannot read store 'paged\('; write a name, or a name with arguments like paged\(16\)$"),
        ("full+paged(16,2)", r"cannot read store 'paged\(16,2\)': it takes page_size, extents; only the first, page_size, may go without"),
        ("full+paged(16,page_size=8)", "only the first, page_size, may go without its name"),
        ("full+paged(size=16)", "the paged store has no option 'size'; it takes page_size, extents$"),
        ("full+dense(16)", r"cannot read store 'dense\(16\)': it takes no options$"),
        ("full+dense(page_size=16)", "the dense store has no option 'page_size'; it takes no options$"),
        ("full+paged(0)", "page_size=0: a page holds at least one slot"),
        ("full+paged(page_size=lots)", "page_size='lots' is not a whole number"),
        ("full+host(pigeon)", "unknown transfer 'pigeon'; choose from device, jit, driven$"),
        ("vllm(16)", r"vllm takes no arguments; it means full\+paged, so write full\+paged\(...\)$"),
        (
            "h3o+paged",
            "unknown strategy 'h3o'; choose from full, streaming, h2o, tova, random, infinigen, infinigen_paper, oracle_topk, vllm",
        ),
    ],
)
def test_what_stands_behind_a_plus_is_refused_in_one_line(spec, message):
    with pytest.raises(SpecError, match=message) as error:
        parse_strategy(spec)
    assert "\n" not in str(error.value)


def test_page_size():
    assert parse_strategy("vllm", page_size=16).store == paged(16)
    assert parse_strategy("h2o+paged", page_size=128).store == paged(128)
    assert parse_strategy("full", "paged", page_size=16).store == paged(16)
    assert parse_strategy("full", page_size=16).store == dense()
    assert parse_strategy("full+paged(32)", page_size=16).store == paged(32)
    assert parse_strategy("full+paged(extents=2)", page_size=16).store == paged(16, 2)
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
    assert parse_strategy("offload", transfer="device").store == host("device")
    assert parse_strategy("infinigen", "dense", transfer="device").store == host("device")
    assert parse_strategy("infinigen").store == host()
    assert parse_strategy("full", transfer="device").store == dense()
    assert parse_strategy("full+host(driven)", transfer="device").store == host("driven")
    assert parse_strategy("full+host(levels=8)", transfer="device").store == host("device", 8)
    with pytest.raises(SpecError, match="unknown transfer 'pigeon'; choose from device, jit, driven"):
        parse_strategy("offload", transfer="pigeon")


FRACTIONS = st.floats(0.001, 1.0)
AMOUNTS = st.integers(1, 10_000) | FRACTIONS
SHARED = dict(alpha=st.floats(0, math.inf), budget=AMOUNTS, sinks=st.integers(0, 9), recent=st.integers(0, 99), skew=st.booleans(),
              correction=st.booleans(), count=st.sampled_from(get_args(Count)), group=st.sampled_from(get_args(GroupJoin)),
              pool=st.none() | AMOUNTS, victim=st.sampled_from(get_args(Victim)), full_layers=st.integers(0, 4))  # fmt: skip
POLICIES_MADE = {
    "full": st.builds(Full),
    "streaming": st.builds(Streaming, AMOUNTS, AMOUNTS),
    "h2o": st.builds(H2O, AMOUNTS, AMOUNTS, st.booleans(), st.sampled_from(get_args(GroupReduction))),
    "infinigen": st.builds(InfiniGen, **SHARED),
    "infinigen_paper": st.builds(InfiniGenPaper, **SHARED),
    "oracle_topk": st.builds(OracleTopK, AMOUNTS),
    "tova": st.builds(TOVA, AMOUNTS),
    "random": st.builds(Random, AMOUNTS, st.integers(0, 9)),
    "a user's": st.builds(Worded, AMOUNTS, st.text(), st.booleans(), st.none() | st.text() | st.floats(allow_nan=False)),
}
STORES_MADE = {
    "dense": st.builds(dense),
    "paged": st.builds(paged, st.integers(1, 256), st.integers(1, 9)),
    "host": st.builds(host, st.sampled_from(TRANSFERS), st.integers(1, 20)),
}
PAIRS = [
    (policy, store)
    for policy in POLICIES_MADE
    for store in STORES
    if store == "host" or not getattr(POLICIES.get(policy), "fetches", False)
]


def test_every_policy_and_every_store_takes_part():
    assert POLICIES.keys() <= POLICIES_MADE.keys()
    assert STORES.keys() == STORES_MADE.keys()


@pytest.mark.parametrize("word", ["'\"", "\\", "\\'", "a\\\\", "',\"(", "\n"])
def test_quotes_and_backslashes_in_a_word_end_nothing(word):
    strategy = Strategy(Worded(1, word, extra=word), paged(16))
    text = strategy.describe()
    assert split_specs(f"{text},full,{text}") == [text, "full", text]
    assert parse_strategy(text) == strategy


@pytest.mark.parametrize(("policy", "store"), PAIRS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_description_says_all_there_is_to_say(policy, store, data):
    strategy = Strategy(data.draw(POLICIES_MADE[policy]), data.draw(STORES_MADE[store]))
    text, identity = strategy.describe(), strategy.identity()
    assert parse_strategy(text) == parse_strategy(f" {text} ") == strategy
    assert split_specs(f"{text},{text}") == [text, text], "it can stand in a list"
    assert parse_strategy(text).describe() == identity.label == text
    written = of_record(json.loads(dumps(identity.record())))
    assert written is not None
    assert dataclasses.replace(written, arguments=identity.arguments) == identity, "infinity is text in JSON"


@pytest.mark.parametrize(("policy", "store"), PAIRS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_strategies_are_equal_where_their_labels_are(policy, store, data):
    first, second = (Strategy(data.draw(POLICIES_MADE[policy]), data.draw(STORES_MADE[store])) for _ in range(2))
    assert (repr(first) == repr(second)) == (first.describe() == second.describe()), "a token is not the whole prompt, though 1 == 1.0"


def test_description_leaves_out_the_default_store_and_prefers_an_alias():
    assert Strategy(H2O(8, 8), dense()).describe() == "h2o(heavy=8,recent=8)"
    assert Strategy(H2O(8, 8), paged()).describe() == "h2o(heavy=8,recent=8)+paged"
    assert Strategy(Full(), paged()).describe() == "vllm"
    assert Strategy(Full(), host()).describe() == "offload"
    assert Strategy(H2O(8, 8), host()).describe() == "h2o(heavy=8,recent=8)+host"
    assert Strategy(InfiniGen(), host()).describe() == InfiniGen().describe()


@pytest.mark.parametrize(
    ("store", "text"),
    [
        (paged(16), "full+paged(16)"),
        (paged(64, 2), "full+paged(extents=2)"),
        (paged(16, 2), "full+paged(page_size=16,extents=2)"),
        (host("device"), "full+host(device)"),
        (host(levels=8), "full+host(levels=8)"),
        (host("device", 8), "full+host(transfer=device,levels=8)"),
        (paged(16).on("tpu"), "full+paged(16)"),
        (host("device").on("tpu"), "full+host(device)"),
        (dense().on("tpu"), "full"),
    ],
)
def test_description_has_the_options_that_are_not_the_default(store, text):
    assert Strategy(Full(), store).describe() == text
    assert Strategy(Full(), store).identity().options == store.options


@dataclasses.dataclass(frozen=True)
class Relative(H2O):
    """A user's own that is drawn and compared as h2o."""

    family = "h2o"


@pytest.mark.parametrize(
    ("strategy", "family", "variant", "budget", "unlimited"),
    [
        (Strategy(Full()), "full", None, None, True),
        (Strategy(Full(), paged(16)), "vllm", None, None, True),
        (Strategy(Full(), host("device")), "offload", None, None, True),
        (Strategy(H2O(0.1, 0.2)), "h2o", None, 0.3, False),
        (Strategy(H2O(3, 5), paged(16)), "h2o", "paged", 8, False),
        (Strategy(H2O(3, 0.5), host()), "h2o", "host", None, False),
        (Strategy(Streaming(4, 60)), "streaming", None, 64, False),
        (Strategy(Streaming(4, 0.2)), "streaming", None, 0.2, False),
        (Strategy(Streaming(0.1, 0.2)), "streaming", None, 0.3, False),
        (Strategy(InfiniGen(budget=64), host("device")), "infinigen", None, 64, False),
        (Strategy(InfiniGenPaper(), host()), "infinigen_paper", None, 0.2, False),
        (Strategy(OracleTopK(1.0)), "oracle_topk", None, 1.0, False),
        (Strategy(Worded(8)), f"{__name__}:Worded", None, None, False),
        (Strategy(Relative(3, 5), paged()), "h2o", "paged", 8, False),
    ],
    ids=lambda x: x.describe() if isinstance(x, Strategy) else "",
)
def test_what_a_policy_class_says_of_itself(strategy, family, variant, budget, unlimited):
    found = strategy.identity()
    assert (found.family, found.variant, found.budget, found.unlimited) == (family, variant, budget, unlimited)
    assert type(found.budget) is type(budget)
    assert found.keep == strategy.policy.describe()
    assert parse_policy(found.keep) == strategy.policy


BUDGETED = [kind() for name, kind in POLICIES.items() if name != "full"]


@pytest.mark.parametrize("policy", BUDGETED, ids=lambda policy: policy.describe())
@given(amount=st.integers(10, 10_000) | st.integers(1, 100).map(lambda percent: percent / 100))
def test_a_policy_states_the_budget_it_was_given(policy, amount):
    stated = policy.with_budget(amount).total_budget()
    assert stated == amount
    assert type(stated) is type(amount)


def test_the_identity_of_a_record_that_has_a_spec_string_alone():
    for strategy in (Strategy(H2O(8, 8), paged()), Strategy(Full(), host("driven")), Strategy(InfiniGen(), host())):
        assert read_identity(strategy.describe()) == strategy.identity()
    assert read_identity("vllm", page_size=16) == Strategy(Full(), paged(16)).identity()
    assert read_identity("offload", transfer="driven").label == "full+host(driven)"
    assert read_identity("offload", transfer="jit").label == "offload"
    old = read_identity("infinigen(alpha=4.0,partial=0.3,budget=0.2)")
    assert old.label == old.keep == "infinigen(alpha=4.0,partial=0.3,budget=0.2)", "what a default was then is not known now"
    assert (old.family, old.budget) == ("infinigen", 0.2)


def test_reading_a_record_imports_no_module_and_takes_any_text(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imports {name}"))
    mine = read_identity("mine:Own(keep=3,extra=40)+paged(16)")
    assert (mine.family, mine.variant, mine.options["page_size"], mine.budget) == ("mine:Own", "paged", 16, None)
    assert mine.keep == "mine:Own(keep=3,extra=40)"
    gone = read_identity("keynorm(keep=3)")
    assert (gone.family, gone.arguments) == ("keynorm", {"keep": 3})
    for text in ("", "h2o(", "full+cloud", "h2o(heavy=lots)", "a b"):
        assert (found := read_identity(text)).label == text
        assert not found.unlimited


@pytest.mark.parametrize("broken", [None, "h2o", {}, {"label": "h2o"}, "budget", "arguments", "label", "unlimited"])
def test_an_object_that_is_no_identity_is_not_read(broken):
    whole = Strategy(H2O(8, 8)).identity().record()
    assert of_record(whole) == Strategy(H2O(8, 8)).identity()
    assert of_record(whole | {broken: [1]} if isinstance(broken, str) and broken in whole else broken) is None


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
