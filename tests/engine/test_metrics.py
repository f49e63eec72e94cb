"""Latency figures of timelines made by hand."""

import pytest

from kvjax.engine.metrics import Timeline, summarise

STEADY = Timeline(start=10.0, token_times=(10.5, 10.6, 10.7, 10.8), input_tokens=100)
UNEVEN = Timeline(start=10.0, token_times=(10.2, 10.3, 10.8), input_tokens=50)
SINGLE = Timeline(start=11.0, token_times=(11.4,), input_tokens=10)

VLLM_KEYS = {
    "duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput",
    "total_token_throughput", "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms",
    "std_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms", "mean_e2el_ms", "median_e2el_ms",
    "std_e2el_ms", "p99_e2el_ms",
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
