"""Latency figures of timelines made by hand."""

import json

import pytest

from kvjax.engine.metrics import Goodput, Sample, Timeline, parse_goodput, summarise, summarise_series
from kvjax.errors import SpecError

STEADY = Timeline(start=10.0, token_times=(10.5, 10.6, 10.7, 10.8), input_tokens=100)
UNEVEN = Timeline(start=10.0, token_times=(10.2, 10.3, 10.8), input_tokens=50)
SINGLE = Timeline(start=11.0, token_times=(11.4,), input_tokens=10)

VLLM_KEYS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests",
    "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms",
    "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms", "mean_e2el_ms", "median_e2el_ms", "std_e2el_ms", "p99_e2el_ms",
}  # fmt: skip


def test_one_request():
    assert STEADY.ttft == pytest.approx(0.5)
    assert STEADY.tpot == pytest.approx(0.1)
    assert STEADY.itls == pytest.approx([0.1, 0.1, 0.1])
    assert STEADY.e2el == pytest.approx(0.8)


def test_time_per_output_token_is_a_mean_and_inter_token_latency_is_not():
    assert UNEVEN.tpot == pytest.approx(0.3)
    assert UNEVEN.itls == pytest.approx([0.1, 0.5])


def test_single_token_has_no_time_per_output_token():
    assert SINGLE.tpot is None
    assert SINGLE.itls == []
    assert SINGLE.ttft == SINGLE.e2el == pytest.approx(0.4)


def test_summary():
    found = summarise([STEADY, UNEVEN, SINGLE])
    assert found["completed"] == 3
    assert found["duration"] == pytest.approx(1.4)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (160, 8)
    assert found["request_throughput"] == pytest.approx(3 / 1.4)
    assert found["output_throughput"] == pytest.approx(8 / 1.4)
    assert found["total_token_throughput"] == pytest.approx(168 / 1.4)
    assert found["mean_ttft_ms"] == pytest.approx((500 + 200 + 400) / 3)
    assert found["median_ttft_ms"] == pytest.approx(400)
    assert found["mean_tpot_ms"] == pytest.approx((100 + 300) / 2), "the single-token request is left out"
    assert found["mean_itl_ms"] == pytest.approx((3 * 100 + 100 + 500) / 5), "every gap counts once, whoever's it is"
    assert found["median_itl_ms"] == pytest.approx(100)
    assert found["p99_e2el_ms"] == pytest.approx(800)
    assert found["std_tpot_ms"] == pytest.approx(100)


def test_keys_are_those_of_vllm_bench_serve():
    assert set(summarise([STEADY])) == VLLM_KEYS


def test_given_duration_and_percentiles():
    found = summarise([STEADY, UNEVEN], duration=2.0, percentiles=(50, 99.9))
    assert found["output_throughput"] == 3.5
    assert found["p50_ttft_ms"] == found["median_ttft_ms"]
    assert "p99.9_itl_ms" in found
    assert "p99_itl_ms" not in found


def test_requests_of_one_token_each():
    found = summarise([SINGLE])
    assert found["mean_tpot_ms"] == found["mean_itl_ms"] == 0.0


def test_nothing_completed():
    assert summarise([]) == {"completed": 0}


def test_failures_count_without_latencies():
    found = summarise([], duration=4.0, failed=3)
    assert (found["completed"], found["failed"], found["request_throughput"], found["duration"]) == (0, 3, 0.0, 4.0)
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (0, 0)
    assert not [key for key in found if key.endswith("_ms")], "nothing finished, so nothing was fast"
    assert summarise([STEADY], failed=2)["failed"] == 2


def test_duration_zero_stays_finite():
    found = summarise([Timeline(start=5.0, token_times=(5.0,), input_tokens=7)])
    assert found["duration"] == found["request_throughput"] == found["output_throughput"] == found["total_token_throughput"] == 0.0
    assert found["max_output_tokens_per_s"] == 1.0
    assert found["max_concurrent_requests"] == 0, "[5, 5) is empty"
    assert summarise([SINGLE], duration=0.0, goodput=Goodput(ttft=1000.0))["request_goodput"] == 0.0
    json.dumps(found, allow_nan=False)


def test_fullest_second_starts_counting_at_the_first_start():
    early = Timeline(start=0.5, token_times=(1.0, 1.25, 1.5, 2.0), input_tokens=1)  # after 0.5, 0.75, 1.0 and 1.5 s
    late = Timeline(start=1.0, token_times=(2.25, 2.75), input_tokens=1)  # after 1.75 and 2.25 s
    assert summarise([early, late])["max_output_tokens_per_s"] == 3.0


def test_peak_concurrency_is_over_half_open_intervals():
    def span(start, end):
        return Timeline(start=start, token_times=(end,), input_tokens=1)

    assert summarise([span(0.0, 2.0), span(2.0, 3.0)])["max_concurrent_requests"] == 1
    assert summarise([span(0.0, 2.5), span(2.0, 3.0)])["max_concurrent_requests"] == 2
    assert summarise([span(0.0, 4.0), span(1.0, 2.0), span(1.5, 3.0), span(2.0, 5.0)])["max_concurrent_requests"] == 3


def test_queueing_is_in_its_own_figures_alone():
    held = Timeline(start=10.0, token_times=(10.5, 11.0), input_tokens=4, queue=3.0)
    free = Timeline(start=10.0, token_times=(11.0,), input_tokens=4)
    found = summarise([held, free])
    assert found["mean_ttft_ms"] == pytest.approx((500 + 1000) / 2)
    assert found["mean_e2el_ms"] == pytest.approx(1000)
    assert found["mean_client_queue_time_ms"] == pytest.approx(1500)
    assert found["std_client_queue_time_ms"] == pytest.approx(1500)
    assert found["mean_e2el_including_client_queue_ms"] == pytest.approx((4000 + 1000) / 2)
    assert found["p99_e2el_including_client_queue_ms"] == pytest.approx(1000 + 0.99 * 3000)
    assert "mean_client_queue_time_ms" not in summarise([free])
    assert summarise([free], closed_loop=True)["mean_client_queue_time_ms"] == 0.0


def test_goodput_wants_all_objectives():
    fast = Timeline(start=0.0, token_times=(0.25, 0.375, 0.5), input_tokens=1)  # ttft 250, tpot 125, e2el 500 ms
    slow = Timeline(start=0.0, token_times=(0.25, 1.0), input_tokens=1)  # tpot 750 ms
    single = Timeline(start=0.0, token_times=(0.25,), input_tokens=1)
    runs = [fast, slow, single]
    assert summarise(runs, duration=2.0)["request_goodput"] is None
    assert summarise(runs, duration=2.0, goodput=Goodput(ttft=250.0))["request_goodput"] == 1.5, "a limit that is met exactly is met"
    assert summarise(runs, duration=2.0, goodput=Goodput(ttft=249.0))["request_goodput"] == 0.0
    assert summarise(runs, duration=2.0, goodput=Goodput(tpot=124.0))["request_goodput"] == 0.5, "one token has a tpot of 0"
    assert summarise(runs, duration=2.0, goodput=Goodput(ttft=250.0, tpot=125.0, e2el=400.0))["request_goodput"] == 0.5
    assert summarise(runs, duration=2.0, goodput=Goodput(tpot=0.0))["request_goodput"] == 0.5


def test_parse_goodput():
    assert parse_goodput("ttft:200,tpot:50") == Goodput(ttft=200.0, tpot=50.0)
    assert parse_goodput(" e2el : 1.5e3 ") == Goodput(e2el=1500.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown objective ''; choose from ttft, tpot, e2el"),
        ("itl:3", "unknown objective 'itl'"),
        ("ttft", "'' is not a number of milliseconds"),
        ("ttft:fast", "'fast' is not a number"),
        ("ttft:1,ttft:2", "gives ttft twice"),
        ("tpot:-1", "tpot:-1 is not a number of milliseconds >= 0"),
        ("tpot:nan", "tpot:nan"),
        ("e2el:inf", "e2el:inf"),
    ],
)
def test_parse_goodput_refuses(spec, message):
    with pytest.raises(SpecError, match=message):
        parse_goodput(spec)


def test_goodput_needs_an_objective():
    with pytest.raises(SpecError, match="give ttft, tpot or e2el in milliseconds"):
        Goodput()


def sample(time: float, **fields) -> Sample:
    nothing = dict(running=0, waiting=0, kv_usage=0.0, kv_live_tokens=0, kv_fragmentation=0.0, preemptions=0)
    return Sample(time=time, **{**nothing, "prefix_hit_tokens": 0, "prefix_query_tokens": 0, **fields})


def test_series_weighs_by_time():
    found = summarise_series(
        [
            sample(10.0, running=1, waiting=4, kv_usage=0.5, kv_fragmentation=0.25, prefix_query_tokens=40),
            sample(11.0, running=3, waiting=1, kv_usage=1.0, kv_fragmentation=0.05, preemptions=2, prefix_query_tokens=80),
            sample(14.0, preemptions=2, prefix_hit_tokens=20, prefix_query_tokens=120),
            sample(20.0, running=9, kv_usage=0.9, preemptions=3, prefix_hit_tokens=30, prefix_query_tokens=120),
        ]
    )
    assert found["kv_usage_peak"] == 1.0
    assert found["kv_usage_mean"] == pytest.approx((1 * 0.5 + 3 * 1.0 + 6 * 0.0) / 10), "the last sample holds for no time"
    assert found["kv_fragmentation_mean"] == pytest.approx((1 * 0.25 + 3 * 0.05) / 4), "the idle 6 s do not count"
    assert (found["peak_running"], found["peak_waiting"], found["num_preemptions"]) == (9, 4, 3)
    assert found["prefix_cache_hit_rate"] == 0.25


def test_series_without_length():
    alone = summarise_series([sample(3.0, running=2, kv_usage=0.5, kv_fragmentation=0.5)])
    assert (alone["kv_usage_mean"], alone["kv_fragmentation_mean"], alone["peak_running"]) == (0.5, 0.5, 2)
    assert alone["prefix_cache_hit_rate"] is None
    nothing = summarise_series([])
    assert nothing.pop("prefix_cache_hit_rate") is None
    assert not any(nothing.values())
