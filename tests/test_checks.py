"""What numbers, text and token ids have to be, at the one door they all come through."""

import numpy as np
import pytest

from kvjax import Engine, PrefillPlan, Sampling, checks, generate, host, paged, parse_strategy, score, stream
from kvjax.cache import tokens
from kvjax.engine.load import Fixed, make_load, parse_lengths, read_prompts
from kvjax.engine.memory import parse_memory
from kvjax.errors import InputError, KvjaxError, SpecError

NO_WHOLE_NUMBERS = [None, True, np.bool_(True), 3.0, 3.5, float("nan"), float("inf"), "3", b"3", [3], np.float64(3), np.array([3, 4])]


@pytest.mark.parametrize("value", [*NO_WHOLE_NUMBERS, -1, 2**31, 10**30])
def test_anything_else_is_refused_in_one_short_line(value):
    with pytest.raises(InputError, match=r"^x=") as refused:
        checks.whole("x", value, error=InputError)
    assert len(str(refused.value)) < 160
    assert "\n" not in str(refused.value)


def test_a_number_too_long_to_write_is_refused():
    with pytest.raises(SpecError, match="x=an enormous number is out of range"):
        checks.whole("x", 10**5000)


def test_numbers_are_finite_unless_their_range_is_not():
    assert checks.number("x", np.float32(0.5), 0, 1) == 0.5
    assert checks.number("x", 10**400, 0) == float("inf")
    for value in (float("nan"), True, "1", None, -0.1, 1.1, float("inf")):
        with pytest.raises(SpecError, match="x="):
            checks.number("x", value, 0, 1)


def test_seeds_of_rows():
    assert checks.seeds(5, 3).tolist() == checks.seeds([5, 6, 7], 3).tolist() == checks.seeds(np.array([5, 6, 7]), 3).tolist() == [5, 6, 7]
    assert checks.seeds(2**31 - 3, 3).dtype == np.int32
    for seeds, message in ((2**31 - 2, "out of range"), ([1, 2], "2 seeds for 3 prompts"), ([1, 2, -1], "out of range"), (None, "whole")):
        with pytest.raises(InputError, match=message):
            checks.seeds(seeds, 3)


@pytest.mark.parametrize("ids", [[], [[1, 2], [3]], [[1, 2]], [1.0], ["a"], [10**30], [-1], 3, None, {1: 2}], ids=repr)
def test_a_prompt_is_a_flat_list_of_ids(ids):
    with pytest.raises(InputError, match="prompt"):
        checks.token_ids("prompt", ids)


def test_text_has_a_utf_8_form():
    assert checks.text("x", "naïve 😀") == "naïve 😀"
    with pytest.raises(InputError, match=r"x holds U\+D83D at character 2, half of a surrogate pair"):
        checks.text("x", "ab\ud83d")


# --------------------------------------------------------------------------------------------------------------- the library's doors

BAD_GENERATION = [
    dict(seed=-1), dict(seed=2**31), dict(seed=2**40), dict(seed=None), dict(seed=1.5), dict(seed=True), dict(seed=[1, 2]),
    dict(max_new_tokens=3.5), dict(max_new_tokens=None), dict(max_new_tokens=10**30), dict(max_new_tokens=True),
    dict(stop_tokens=2), dict(stop_tokens="ab"), dict(stop_tokens=[1.5]), dict(stop_tokens=[[1]]), dict(steps_per_call=2.0),
    dict(prompts="text"), dict(prompts=5), dict(prompts=[]), dict(prompts=[[[1, 2]]]), dict(prompts=[[1, [2]]]), dict(prompts=[5]),
    dict(prompts=["half \udc00"]), dict(prompts=[[10**30]]), dict(prompts=[None]), dict(prompts=np.array(3)),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_GENERATION, ids=repr)
def test_generation_refuses_before_it_computes(byte_model, options, monkeypatch):
    monkeypatch.setattr("kvjax.generation.run_prefill", lambda *arguments: pytest.fail("computed"))
    prompts = options.pop("prompts", [[1, 2, 3]])
    with pytest.raises(InputError):
        stream(byte_model, prompts, **options)
    if "reserve" not in options:
        with pytest.raises(InputError):
            generate(byte_model, prompts, **options)


@pytest.mark.parametrize(
    ("ids", "prompt_len"), [([[1, 2], [3]], 1), ([[1.5, 2]], 1), ([1, 2], 1), ([[1, 2]], 1.0), ([[1, 2]], None), (np.zeros((0, 2), int), 1)]
)
def test_scoring_refuses(byte_model, ids, prompt_len):
    with pytest.raises(InputError):
        score(byte_model, ids, prompt_len=prompt_len)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1e-45),
        dict(temperature=float("inf")),
        dict(temperature="hot"),
        dict(temperature=None),
        dict(top_k=2.5),
        dict(top_k=10**12),
        dict(top_p=float("nan")),
        dict(top_p=True),
    ],
    ids=repr,
)
def test_sampling_refuses(options):
    with pytest.raises(SpecError):
        Sampling(**options)


def test_numpys_numbers_are_pythons():
    assert Sampling(np.float64(0.5), np.int64(3), np.float32(1)) == Sampling(0.5, 3, 1.0)
    assert type(Sampling(np.float64(0.5)).temperature) is float
    with pytest.raises(SpecError):
        PrefillPlan(2.5)  # type: ignore[arg-type]


BAD_REQUESTS = [
    dict(max_tokens=3.5), dict(max_tokens=0), dict(max_tokens=None), dict(max_tokens=np.float64(3)), dict(n=1.0), dict(n=0), dict(n=True),
    dict(seed=None), dict(seed=-1), dict(seed=2**31), dict(seed=2**31 - 1, n=2), dict(stop_tokens=2), dict(stop_tokens=[None]),
    dict(prompt=[[1, 2], [3, 4]]), dict(prompt=[]), dict(prompt=7), dict(prompt="\ud800"), dict(prompt=[1.5]), dict(prompt=[256]),
    dict(request=3),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(byte_model) -> Engine:
    return Engine(byte_model, "full", kv_memory=np.int64(2**20), max_num_seqs=np.int32(2), max_model_len=64, prefill_chunk=32)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", BAD_REQUESTS, ids=repr)
def test_an_engine_refuses_requests_and_stays_idle(engine, options):
    arguments = dict(request="a", prompt=[1, 2, 3]) | options
    with pytest.raises(InputError):
        engine.add(arguments.pop("request"), arguments.pop("prompt"), **arguments)
    assert not engine.busy


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_memory=1.5),
        dict(kv_memory=True),
        dict(kv_memory=-1),
        dict(kv_memory=None),
        dict(kv_memory="9e9GiB"),
        dict(kv_memory=10**30),
        dict(max_num_seqs=2.5),
        dict(max_num_seqs=0),
        dict(max_num_seqs=10**10),
        dict(max_model_len=1.5),
        dict(prefill_chunk=None),
        dict(watermark=float("nan")),
        dict(extents=0.5),
        dict(max_num_batched_tokens=100.5),
    ],
    ids=repr,
)
def test_an_engine_refuses_settings(byte_model, options):
    with pytest.raises(KvjaxError):
        Engine(byte_model, "full", **({"kv_memory": 2**20} | options))


def test_rows_for_a_billion_sequences_are_found_at_once(byte_model):
    assert Engine(byte_model, "vllm", kv_memory=2**20, max_model_len=64, max_num_seqs=10**9).limits.max_num_seqs < 2**20


def test_more_memory_than_the_machine_has(byte_model):
    with pytest.raises(InputError, match=r"the cache of the engine takes \d+ bytes, and this machine has"):
        Engine(byte_model, "vllm", kv_memory=2**50, max_model_len=64, max_num_seqs=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: paged(2.5),  # type: ignore[arg-type]
        lambda: paged(10**12),
        lambda: paged(True),
        lambda: host(levels=1.5),  # type: ignore[arg-type]
    ],
)
def test_stores_refuse(make):
    with pytest.raises(SpecError, match=r"page_size=|levels="):
        make()


@pytest.mark.parametrize("spec", ["h2o(heavy=1e-9,recent=0.1)", "streaming(sinks=0,window=1e-12)", "oracle_topk(k=1e-300)"])
def test_a_fraction_is_a_token_at_least(spec):
    policy = parse_strategy(spec).policy
    assert (policy.kept_tokens(50) or 1) >= 1
    assert tokens(1e-300, 50) == 1
    assert tokens(0.0, 50) == 0


def test_memory_is_exact():
    assert parse_memory(str(2**50 - 1)) == parse_memory(np.int64(2**50 - 1)) == 2**50 - 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec", ["1" + "0" * 30, "uniform(1,1" + "0" * 30 + ")", "lognormal(1" + "0" * 30 + ",1)", "9" * 5000, "lognormal(9,1e999)"]
)
def test_lengths_beyond_reason(spec):
    with pytest.raises(SpecError):
        parse_lengths(spec)


@pytest.mark.parametrize(
    "options",
    [
        dict(request_rate=1e-300),
        dict(burstiness=1e-320, request_rate=1.0),
        dict(request_rate=1e-7),
        dict(seed=2**31 - 2),
        dict(seed=None),
        dict(seed=0.5),
        dict(num_requests=2.5),
        dict(num_requests=True),
    ],
    ids=repr,
)
def test_loads_that_would_never_end(byte_model, options):
    with pytest.raises(KvjaxError):
        make_load(byte_model, **(dict(num_requests=3, input_len=Fixed(8), output_len=Fixed(2)) | options))


# --------------------------------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"prompt": "half \ud83d of it"}', r"prompts.jsonl:2: prompt holds U\+D83D at character 5, half of a surrogate pair"),
        ('{"prompt": ""}', "prompts.jsonl:2: a prompt is at least one token"),
        ('{"prompt": "a", "max_tokens": NaN}', "prompts.jsonl:2: max_tokens=nan is not a number of tokens"),
        ('{"prompt": "a", "output_tokens": 1e999}', "prompts.jsonl:2: output_tokens=inf is not a number of tokens"),
        ('{"prompt": "a", "output_tokens": -1}', "prompts.jsonl:2: output_tokens=-1 is not a number of tokens"),
        ('{"prompt": "a", "max_tokens": 3, "output_tokens": 4}', "prompts.jsonl:2: max_tokens=3 and output_tokens=4 disagree"),
        ('{"prompt_token_ids": [1, 1e3]}', "prompts.jsonl:2: a prompt is at least one token"),
        ('{"prompt_token_ids": [[1, 2]]}', "prompts.jsonl:2: a prompt is at least one token"),
        ("[" * 100_000, "prompts.jsonl:2: not a JSON object"),
        ("9" * 5000, "prompts.jsonl:2: not a JSON object"),
    ],
)  # fmt: skip
def test_what_a_line_can_hold_gets_one_line(byte_model, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_prompts(path, byte_model)


@pytest.mark.parametrize("field", ["max_tokens", "output_tokens", "output_len", "max_completion_tokens"])
def test_peers_names_for_the_tokens_to_generate(byte_model, tmp_path, field):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a b c", "{field}": 5}}\n{{"prompt": "d", "{field}": null}}\n')
    assert [prompt.max_tokens for prompt in read_prompts(path, byte_model)] == [5, None]
