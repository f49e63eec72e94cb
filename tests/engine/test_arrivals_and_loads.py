"""Arrivals, lengths and contents of a load."""

import json
import math

import numpy as np
import pytest

from kvjax.engine.load import (
    Fixed,
    LogNormal,
    Ramp,
    Uniform,
    arrivals,
    documents,
    make_load,
    parse_lengths,
    read_prompts,
    read_trace,
)
from kvjax.errors import InputError, SpecError
from kvjax.models import Model
from kvjax.quality import recall

MANY = 40_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Words:
    """A tokenizer of words with an id for the beginning of a text, as Hugging Face ones have."""

    def encode(self, text: str) -> list[int]:
        return [1, *(2 + sum(word.encode()) % 95 for word in text.split())]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


class Silent(Words):
    def encode(self, text: str) -> list[int]:
        return [1]


# Arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_last_arrival_is_exactly_count_over_rate(count, burstiness):
    times = arrivals(rng(), count, 3.7, burstiness)
    assert times.shape == (count,)
    assert times[-1] == count / 3.7
    assert times[0] > 0, "the first request comes after its first gap"
    assert (np.diff(times) >= 0).all()


def test_infinite_rate_is_all_at_once():
    assert arrivals(rng(), 5, math.inf).tolist() == [0.0] * 5


def test_infinite_burstiness_is_a_constant_gap():
    np.testing.assert_allclose(arrivals(rng(), 8, 4.0, math.inf), 0.25 * np.arange(1, 9), rtol=1e-12)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma(burstiness):
    """Mean 1 / rate, coefficient of variation 1 / sqrt(burstiness), and that before and after the stretch (a level ramp has none)."""
    rate, cv = 5.0, burstiness**-0.5
    stretched = np.diff(arrivals(rng(1), MANY, rate, burstiness), prepend=0.0)
    raw = np.diff(arrivals(rng(1), MANY, math.inf, burstiness, Ramp("linear", rate, rate)), prepend=0.0)
    assert stretched.mean() == pytest.approx(1 / rate, rel=1e-9)
    assert raw.mean() == pytest.approx(1 / rate, rel=5 * cv / MANY**0.5)
    for gaps in (stretched, raw):
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    np.testing.assert_allclose(stretched, raw * (stretched.sum() / raw.sum()), atol=1e-9, err_msg="the stretch is one factor")


def test_gaps_of_burstiness_one_are_exponential():
    gaps = np.diff(arrivals(rng(2), MANY, 1.0), prepend=0.0)
    for level in (0.5, 0.9, 0.99):
        assert (gaps < -math.log(1 - level)).mean() == pytest.approx(level, abs=5 * math.sqrt(level * (1 - level) / MANY))


@pytest.mark.parametrize(
    ("kind", "rates"), [("linear", [1.0, 2.75, 4.5, 6.25, 8.0]), ("exponential", [1.0, 2**0.75, 2**1.5, 2**2.25, 8.0])]
)
def test_ramp_goes_from_start_to_end(kind, rates):
    ramp = Ramp(kind, 1.0, 8.0)
    np.testing.assert_allclose(ramp.rates(5), rates)
    np.testing.assert_allclose(arrivals(rng(), 5, math.inf, math.inf, ramp), np.cumsum(1 / np.array(rates)), err_msg="no stretch")
    assert ramp.rates(1).tolist() == [1.0]


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_ramped_arrivals_speed_up(kind):
    times = arrivals(rng(3), 4000, math.inf, 1.0, Ramp(kind, 2.0, 20.0))
    quarters = np.diff(times[[0, 999, 1999, 2999, 3999]])
    assert (np.diff(quarters) < 0).all()


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan)])
def test_arrivals_refuse(rate, burstiness):
    with pytest.raises(SpecError, match="request_rate" if burstiness == 1.0 else "burstiness"):
        arrivals(rng(), 3, rate, burstiness)


@pytest.mark.parametrize("arguments", [("steep", 1.0, 2.0), ("linear", 0.0, 2.0), ("linear", 1.0, math.inf), ("exponential", 1.0, -2.0)])
def test_ramp_refuses(arguments):
    with pytest.raises(SpecError, match="ramp"):
        Ramp(*arguments)


# Lengths


@pytest.mark.parametrize(
    ("spec", "lengths"),
    [
        ("512", Fixed(512)),
        (" 7 ", Fixed(7)),
        ("uniform(256,768)", Uniform(256, 768)),
        ("uniform( 4 , 4 )", Uniform(4, 4)),
        ("lognormal(512,0.5)", LogNormal(512, 0.5)),
        ("lognormal(64, 1e-1)", LogNormal(64, 0.1)),
    ],
)
def test_parse_lengths(spec, lengths):
    assert parse_lengths(spec) == lengths
    assert parse_lengths(str(lengths)) == lengths


@pytest.mark.parametrize(
    "spec",
    ["", "many", "1.5", "0", "-3", "uniform(1)", "uniform(9,3)", "uniform(0,3)", "uniform(1,2.5)", "uniform(1,2", "normal(5,1)",
     "lognormal(0,1)", "lognormal(5,-1)", "lognormal(5,1,2)", "lognormal(5,.e)", "uniform(1,2)3"],
)  # fmt: skip
def test_parse_lengths_refuses(spec):
    with pytest.raises(SpecError, match=r"length|lognormal"):
        parse_lengths(spec)


def test_lengths_have_their_distribution():
    assert set(Fixed(9).sample(rng(), 50)) == {9}
    uniform = Uniform(3, 6).sample(rng(), MANY)
    values, counts = np.unique(uniform, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    np.testing.assert_allclose(counts / MANY, 0.25, atol=5 * math.sqrt(0.1875 / MANY))
    logs = np.log(LogNormal(512, 0.5).sample(rng(), MANY, 10**9))
    assert np.median(logs) == pytest.approx(math.log(512), abs=0.02)
    assert logs.std() == pytest.approx(0.5, rel=0.02)
    assert (Fixed(9).maximum, Uniform(3, 6).maximum, LogNormal(5, 1.0).maximum) == (9, 6, None)


def test_lognormal_is_clipped():
    drawn = LogNormal(50, 3.0).sample(rng(), 1000, 200, minimum=10)
    assert (drawn.min(), drawn.max()) == (10, 200)
    each = np.arange(1, 1001)
    assert (LogNormal(5000, 0.1).sample(rng(), 1000, each) == each).all()
    assert set(LogNormal(1, 1e6).sample(rng(), 1000, 7)) == {1, 7}, "no overflow"


# Contents


def test_recall_documents_state_what_they_are_asked(byte_model):
    lengths = [200, 72, 64, 20, 9, 8, 3]
    found = documents(byte_model, lengths, seed=3)
    assert [len(d.prompt) for d in found] == lengths
    assert {d.prompt.dtype for d in found} == {np.dtype(np.int32)}
    assert [len(d.test.depths) if d.test else 0 for d in found] == [7, 8, 7, 2, 1, 0, 0], "256 positions leave 7 questions after 200 tokens"
    for document in found[:5]:
        text, asked = bytes(document.prompt.tolist()), bytes(document.test.continuation)
        np.testing.assert_array_equal(document.test.prompt, document.prompt)
        for question, depth in zip(asked.split(b";")[:-1], document.test.depths, strict=True):
            assert text.index(b"@" + question[1:] + b";") / len(text) == pytest.approx(depth)
        assert len(document.prompt) + len(document.test.continuation) <= byte_model.config.max_position


def test_no_facts_is_plain_source(byte_model):
    (document,) = documents(byte_model, [100], seed=1, num_facts=0)
    assert document.test is None
    assert bytes(document.prompt.tolist()) in recall.standard_library(True).tobytes()


def test_shared_prefix(byte_model, opt_model):
    for model in (byte_model, opt_model, Model(opt_model.config, opt_model.params, Words())):
        found = documents(model, [60, 41, 90], seed=5, shared_prefix=40)
        assert [len(d.prompt) for d in found] == [60, 41, 90]
        assert len({tuple(d.prompt[:40]) for d in found}) == 1
        assert len({tuple(d.prompt[:41]) for d in found}) > 1
    test = documents(byte_model, [140], seed=5, shared_prefix=40, num_facts=2)[0].test
    assert sorted(test.depths) == pytest.approx([40 / 140, 90 / 140])
    with pytest.raises(InputError, match="request 1: a prompt of 40 tokens has none of its own after a shared prefix of 40"):
        documents(byte_model, [60, 40], seed=5, shared_prefix=40)
    with pytest.raises(SpecError, match="shared_prefix=-1"):
        documents(byte_model, [60], seed=5, shared_prefix=-1)


def test_prompts_differ(byte_model, opt_model):
    for model in (byte_model, opt_model, Model(opt_model.config, opt_model.params, Words())):
        found = documents(model, [3] * 60, seed=0)
        assert len({tuple(d.prompt) for d in found}) == 60
    assert len(documents(byte_model, [1] * 300, seed=0)) == 300, "there are not 300 bytes; that is no endless search"


def test_text_of_a_tokenizer(opt_model):
    model = Model(opt_model.config, opt_model.params, Words())
    found = documents(model, [100, 5], seed=2)
    assert [len(d.prompt) for d in found] == [100, 5]
    assert found[0].prompt[0] == 1
    assert not (found[0].prompt[1:] == 1).any()
    assert make_load(model, num_requests=2, input_len=Fixed(9), output_len=Fixed(2)).kind == "text"
    with pytest.raises(InputError, match="fewer than 8 tokens of 4096 bytes"):
        documents(Model(opt_model.config, opt_model.params, Silent()), [8], seed=2)


# Whole loads


def same(left, right) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(np.array_equal(a.prompt, b.prompt) and (a.max_tokens, a.seed) == (b.max_tokens, b.seed) for a, b in pairs)


def test_same_seed_same_load(byte_model):
    def load(seed, **changed):
        settings = dict(num_requests=12, request_rate=4.0, input_len=Uniform(20, 120), output_len=LogNormal(20, 1.0), seed=seed)
        return make_load(byte_model, **{**settings, **changed})

    first, again = load(7), load(7)
    assert same(first.requests, again.requests)
    assert [r.arrival for r in first.requests] == [r.arrival for r in again.requests]
    assert [r.seed for r in first.requests] == list(range(7, 19))
    assert [r.index for r in first.requests] == list(range(12))
    for other in (load(7, request_rate=1.0), load(7, request_rate=math.inf), load(7, burstiness=0.5), load(7, num_requests=30)):
        assert same(first.requests, other.requests[:12]), "a different rate or count has the same prompts"
        assert [r.arrival for r in first.requests] != [r.arrival for r in other.requests[:12]]
    longer = load(7, output_len=Fixed(3))
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(first.requests, longer.requests, strict=True))
    different = load(8)
    assert not same(first.requests, different.requests)
    assert not any(np.array_equal(a.prompt[:8], b.prompt[:8]) for a in first.requests for b in different.requests)


def test_totals(byte_model):
    load = make_load(byte_model, num_requests=5, input_len=Fixed(30), output_len=Fixed(10), request_rate=2.0, burstiness=math.inf)
    assert (load.total_input_tokens, load.total_output_tokens, load.max_length) == (150, 50, 40)
    assert (load.kind, load.request_rate, load.burstiness, load.ramp) == ("recall", 2.0, math.inf, None)
    assert [r.arrival for r in load.requests] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])
    assert all(r.test is not None and r.prompt.dtype == np.int32 for r in load.requests)


def test_kinds(byte_model, opt_model):
    settings = dict(num_requests=2, output_len=Fixed(2))
    assert make_load(byte_model, input_len=Fixed(5), **settings).kind == "text", "too short for a fact"
    load = make_load(opt_model, input_len=Fixed(50), **settings)
    assert load.kind == "random"
    assert max(r.prompt.max() for r in load.requests) < opt_model.config.vocab_size


def test_unbounded_lengths_fit_the_model(byte_model):
    load = make_load(byte_model, num_requests=300, input_len=LogNormal(100, 1.5), output_len=LogNormal(40, 1.5), shared_prefix=16)
    assert load.max_length == byte_model.config.max_position
    assert min(len(r.prompt) for r in load.requests) == 17
    assert max(len(r.prompt) for r in load.requests) == 256 - 40
    assert min(r.max_tokens for r in load.requests) >= 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(input_len=Fixed(250)), InputError, "request 0: 250 prompt tokens and 8 new ones exceed the 256 positions of model bytes"),
        (dict(output_len=Fixed(300), input_len=LogNormal(5, 1.0)), InputError, "300 new ones exceed the 256 positions"),
        (dict(num_requests=0), SpecError, "num_requests=0"),
        (dict(num_requests=None), SpecError, "num_requests is missing"),
        (dict(request_rate=0.0), SpecError, "request_rate=0"),
        (dict(burstiness=0.0), SpecError, "burstiness=0"),
        (dict(seed=-1), SpecError, "seed=-1"),
        (dict(request_rate=1.0, ramp=Ramp("linear", 1.0, 2.0)), SpecError, "request_rate=1 and a ramp"),
        (dict(prompts="a", trace="b"), SpecError, "both given"),
        (dict(trace="b", request_rate=2.0), SpecError, "its own arrival times"),
        (dict(speed=2.0), SpecError, "speed=2 replays a trace"),
        (dict(prompts="a", shared_prefix=2), SpecError, "shared_prefix"),
        (dict(prompts="no such file"), InputError, "cannot read no such file: No such file"),
    ],
)
def test_make_load_refuses(byte_model, changed, error, message):
    settings = dict(num_requests=2, input_len=Fixed(20), output_len=Fixed(8))
    with pytest.raises(error, match=message):
        make_load(byte_model, **{**settings, **changed})


# Files


def write(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_prompt_file(tmp_path, byte_model):
    path = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "héllo", "max_tokens": 3},
        "",
        {"prompt_token_ids": [0, 255, 7], "output_len": 5, "id": "x"},
        {"prompt": "last"},
    )
    load = make_load(byte_model, num_requests=None, input_len=Fixed(99), output_len=Fixed(11), prompts=path, request_rate=1.0, seed=4)
    assert load.kind == "prompts"
    assert [r.prompt.tolist() for r in load.requests] == [list("héllo".encode()), [0, 255, 7], list(b"last")]
    assert [r.max_tokens for r in load.requests] == [3, 5, 11]
    assert [r.seed for r in load.requests] == [4, 5, 6]
    assert load.requests[-1].arrival == 3.0
    assert len(make_load(byte_model, num_requests=2, input_len=Fixed(9), output_len=Fixed(1), prompts=path).requests) == 2
    with pytest.raises(InputError, match=r"holds 3 requests and num_requests=4 asks for more"):
        make_load(byte_model, num_requests=4, input_len=Fixed(9), output_len=Fixed(1), prompts=path)
    with pytest.raises(InputError, match=r"request 2 \(.*prompts.jsonl:4\): 4 prompt tokens and 255 new ones exceed the 256"):
        make_load(byte_model, num_requests=None, input_len=Fixed(9), output_len=Fixed(255), prompts=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ({}, "either prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either prompt"),
        ({"prompt": 7}, "prompt is not text"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt_token_ids": []}, "at least one token"),
        ({"prompt_token_ids": [1, 2.5]}, "list of whole numbers"),
        ({"prompt_token_ids": [True]}, "list of whole numbers"),
        ({"prompt_token_ids": "12"}, "list of whole numbers"),
        ({"prompt_token_ids": [256]}, "token ids from 256 to 256; model bytes has ids 0 to 255"),
        ({"prompt_token_ids": [-1, 3]}, "token ids from -1 to 3"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0 is not a number of tokens"),
        ({"prompt": "a", "output_len": "some"}, "output_len='some' is not"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens=True is not"),
    ],
)
def test_bad_prompt_line(tmp_path, byte_model, line, message):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "good"}, line)
    with pytest.raises(InputError, match="prompts.jsonl:2: .*" + message):
        read_prompts(path, byte_model)


def test_prompt_files_that_say_nothing(tmp_path, byte_model, opt_model):
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", ""), byte_model)
    with pytest.raises(InputError, match=":1: model tiny-opt has no tokenizer"):
        read_prompts(write(tmp_path / "text.jsonl", {"prompt": "a"}), opt_model)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "binary", byte_model)


JSONL = (
    {"timestamp": 14.0, "input_length": 30, "output_length": 4, "hash_ids": [1]},
    {"arrival": 10.0, "input_len": 20, "output_len": 3},
    {"timestamp": 11, "prompt_tokens": 9.0, "completion_tokens": 2},
)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_trace(tmp_path, byte_model, form):
    if form == "jsonl":
        path = write(tmp_path / "trace.jsonl", *JSONL)
    else:
        path = write(tmp_path / "trace.csv", "timestamp, input_length, output_length, kind", "14.0,30,4,a", "10,20,3,b", "11.0,9,2,c")
    assert [(e.arrival, e.input_length, e.output_length) for e in read_trace(path)] == [(0, 20, 3), (1, 9, 2), (4, 30, 4)]
    assert [e.arrival for e in read_trace(path, speed=4.0)] == [0.0, 0.25, 1.0]
    load = make_load(byte_model, num_requests=None, input_len=Fixed(1), output_len=Fixed(1), trace=path, speed=2.0, seed=9)
    assert [(r.arrival, len(r.prompt), r.max_tokens, r.seed) for r in load.requests] == [(0, 20, 3, 9), (0.5, 9, 2, 10), (2, 30, 4, 11)]
    assert load.kind == "trace"
    assert load.request_rate == pytest.approx(1.0)
    assert load.burstiness == pytest.approx(4.0), "gaps of 0.5 and 1.5 s: mean 1, standard deviation 0.5"
    assert all(r.test is not None for r in load.requests)
    first = make_load(byte_model, num_requests=2, input_len=Fixed(1), output_len=Fixed(1), trace=path)
    assert [r.arrival for r in first.requests] == [0.0, 1.0]


def test_trace_of_one_moment(tmp_path, byte_model):
    path = write(tmp_path / "trace.jsonl", *[{"arrival": 3.0, "input_len": 5, "output_len": 1}] * 2)
    load = make_load(byte_model, num_requests=None, input_len=Fixed(1), output_len=Fixed(1), trace=path)
    assert (load.request_rate, load.burstiness) == (math.inf, 1.0)
    assert not np.array_equal(load.requests[0].prompt, load.requests[1].prompt)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("oops", "not a JSON object"),
        ({"input_len": 5, "output_len": 1}, "arrival is missing"),
        ({"arrival": 1.0, "output_len": 1}, "input_length is missing"),
        ({"arrival": 1.0, "input_len": 5, "output_len": None}, "output_length is missing"),
        ({"arrival": "soon", "input_len": 5, "output_len": 1}, "arrival='soon' is not a number of seconds"),
        ('{"arrival": NaN, "input_len": 5, "output_len": 1}', "arrival=nan"),
        ({"arrival": 1.0, "input_len": 0, "output_len": 1}, "input_len=0 is not a number of tokens"),
        ({"arrival": 1.0, "input_len": 5, "output_len": 1.5}, "output_len=1.5"),
        ({"arrival": 1.0, "input_len": [5], "output_len": 1}, "input_len="),
    ],
)
def test_bad_trace_line(tmp_path, line, message):
    path = write(tmp_path / "trace.jsonl", {"arrival": 0.0, "input_len": 5, "output_len": 1}, line)
    with pytest.raises(InputError, match="trace.jsonl:2: .*" + message):
        read_trace(path)


def test_bad_csv_rows(tmp_path):
    header = "arrival,input_len,output_len"
    with pytest.raises(InputError, match=r"short.csv:3: the row does not have the 3 values"):
        read_trace(write(tmp_path / "short.csv", header, "1,2,3", "1,2"))
    with pytest.raises(InputError, match=r"long.csv:2: the row does not have the 3 values"):
        read_trace(write(tmp_path / "long.csv", header, "1,2,3,4"))
    with pytest.raises(InputError, match=r"word.csv:2: input_len='2.5' is not a number of tokens"):
        read_trace(write(tmp_path / "word.csv", header, "1,2.5,3"))
    with pytest.raises(InputError, match="holds no requests"):
        read_trace(write(tmp_path / "empty.csv", header))
    with pytest.raises(SpecError, match="speed=0"):
        read_trace(write(tmp_path / "good.csv", header, "1,2,3"), speed=0.0)


def test_trace_that_does_not_fit(tmp_path, byte_model):
    path = write(tmp_path / "trace.csv", "arrival,input_len,output_len", "5,250,10", "1,10,10")
    with pytest.raises(InputError, match=r"request 1 \(.*trace.csv:2\): 250 prompt tokens and 10 new ones exceed the 256"):
        make_load(byte_model, num_requests=None, input_len=Fixed(1), output_len=Fixed(1), trace=path)
