"""Advice from records with planted answers."""

import dataclasses
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from made_results import FULL, H2O, INFINIGEN, OFFLOAD, ORACLE, STREAMING, VLLM, load, offline, rates, written
from rich.console import Console

from kvjax.advise import Needs, OutsideData, advise, recommendations
from kvjax.advise.__main__ import show
from kvjax.advise.decide import command
from kvjax.errors import InputError, SpecError
from kvjax.report.cells import read_results

MIB = 2**20
PAGED = H2O + "+paged"

QUALITY = [
    offline(FULL, recall=0.98, kld=0.0, size=20 * MIB), offline(H2O, recall=0.4, kld=1.5, size=4 * MIB, tpot=3.0),
    offline(INFINIGEN, recall=0.97, kld=0.01, size=2 * MIB, host=20 * MIB, tpot=5.0),
    offline(ORACLE, recall=0.98, kld=0.001, size=20 * MIB, tpot=9.0),
]  # fmt: skip
"""At 952 tokens of prompt, offline."""

LATENCIES = {
    FULL: lambda rate: dict(ttft=20 + 20 * rate, tpot=4.0, used=12 * MIB),
    VLLM: lambda rate: dict(ttft=20 + 25 * rate, tpot=5.0, used=8 * MIB),
    PAGED: lambda rate: dict(ttft=100.0, tpot=3.5, used=3 * MIB),
}
LOADS = rates(LATENCIES)
BOTH = QUALITY + LOADS


def needs(**given) -> Needs:
    wanted: dict[str, Any] = {"request_rate": 4, "objective": "latency"} | given
    return Needs(**wanted)


def figure(advice, key):
    return next(f for f in advice.figures if f.key == key)


def why(advice, strategy: str) -> str:
    return dict(advice.passed)[strategy]


def test_the_planted_winner_is_named_with_its_margin():
    found = advise(BOTH, needs(min_recall=0.9))
    assert found.strategy == FULL
    assert found.decided
    margin = found.margin
    assert margin is not None
    assert margin.over == VLLM
    assert margin.gain == pytest.approx((120 + 63 * 5) - (100 + 63 * 4), rel=0.01)
    assert margin.low is not None
    assert margin.low < margin.gain < margin.high
    assert "3 clusters" in margin.basis
    assert found.setting == {
        "strategy": FULL, "model": "kvjax-4m", "input_len": 256, "request_rate": "4", "kv_memory": "16MiB", "output_len": 64,
    }  # fmt: skip
    assert found.command == (
        "python -m kvjax.run --strategy=full --model=kvjax-4m --input_len=256 --request_rate=4 --kv_memory=16MiB --output_len=64"
    )


def test_a_bar_on_recall_and_bounds_decide_who_qualifies():
    assert advise(BOTH, needs()).strategy == PAGED, "without a bar the fastest wins"
    found = advise(BOTH, needs(min_recall=0.9))
    assert why(found, PAGED).startswith("recalls 39.8 % (")
    assert "at least 90 % wanted" in why(found, PAGED)
    bounded = advise(BOTH, needs(ttft=110.0))
    assert why(bounded, VLLM).startswith("P90 TTFT is 12")
    assert why(bounded, VLLM).endswith("ms, 110 allowed")
    assert "diverges by 1.5 nats" in why(advise(BOTH, needs(max_kld=0.1)), PAGED)


def test_memory_decides_who_qualifies_by_what_was_used():
    """The loads had 16 MiB; a run that never used more than 8 would have been the same with 8."""
    found = advise(BOTH, needs(kv_memory=8 * MIB, min_recall=0.9))
    assert found.strategy == VLLM
    assert figure(found, "mean_e2el_ms").source == "request_rate, 3 runs; run with 16.0 MiB"
    assert why(found, FULL).startswith("needs 12.0 MiB of device memory, 8.0 MiB allowed")
    assert "with less it was not measured" in why(found, FULL)
    assert advise(BOTH, needs(objective="memory")).strategy == PAGED


def test_the_yardstick_is_never_named():
    found = advise(QUALITY, Needs(objective="latency", min_recall=0.9))
    assert found.strategy == FULL
    assert "yardstick" in why(found, ORACLE)


def test_figures_say_how_they_came_about():
    found = advise(BOTH, needs(min_recall=0.9))
    assert figure(found, "mean_e2el_ms").mark == "measured"
    recall = figure(found, "task_recall")
    assert (recall.mark, recall.value) == ("modelled", pytest.approx(0.98, abs=0.01))
    assert "as measured at 952 tokens" in recall.source
    assert figure(found, "fidelity_kld_mean").mark == "by definition"
    between = advise(BOTH, needs(request_rate=5, min_recall=0.9))
    latency = figure(between, "mean_e2el_ms")
    assert (latency.mark, latency.source) == ("interpolated", "between request_rate=4 and 8")
    assert latency.value == pytest.approx(120 + 63 * 4, rel=1e-6)
    assert figure(between, "ttft_ms").value == pytest.approx(120, rel=0.03), "a quarter of the way from 100 to 180"
    assert between.margin is not None
    assert between.margin.basis == "108 requests each, paired in 3 clusters, interpolated: +83 at request_rate=4 and +103 at request_rate=8"
    assert between.margin.low is not None
    assert between.margin.low < between.margin.gain < between.margin.high
    assert between.margin.gain == pytest.approx(88, rel=0.01)


def test_quality_between_two_lengths_is_interpolated():
    records = [offline(H2O, recall=recall, input_len=n) for n, recall in ((100, 0.2), (300, 0.6))]
    found = advise([*records, *rates({PAGED: LATENCIES[PAGED]}, input_len=250)], needs(input_len=250))
    recall = figure(found, "task_recall")
    assert (recall.mark, recall.source) == ("interpolated", "between input_len=100 and 300")
    assert recall.value == pytest.approx(0.5, abs=0.01)


def test_a_budget_in_tokens_is_not_carried_to_another_length():
    tokens = "h2o(heavy=48,recent=48)"
    records = [offline(tokens, recall=0.95, kld=0.1), *rates({tokens + "+paged": LATENCIES[PAGED]})]
    found = advise(records, needs(min_recall=0.5))
    assert found.strategy is None
    assert "a budget in tokens means something else at 256" in why(found, tokens + "+paged")
    at_that_length = [offline(tokens, recall=0.95, kld=0.1, input_len=256), *records]
    assert advise(at_that_length, needs(min_recall=0.5)).strategy == tokens + "+paged"


def test_quality_of_another_model_or_policy_is_not_joined():
    other = [record | {"model_id": "kvjax-1m"} for record in QUALITY]
    found = advise(other + LOADS, needs(min_recall=0.5, model="kvjax-4m"))
    assert found.strategy is None
    assert why(found, PAGED) == f"facts recalled of {H2O} is not measured with kvjax-4m"


def test_the_planted_crossover_is_found():
    """Ends to end, full takes 20 + 20 r + 252 ms and h2o 100 + 220.5: they are equal at r = 2.425."""
    found = advise(BOTH, needs())
    (change,) = [c for c in found.crossovers if c.axis == "request_rate"]
    assert (change.before, change.after) == (FULL, PAGED)
    assert change.at == pytest.approx(2.425, rel=2e-3)
    assert (change.low, change.high, change.mark) == (2, 4, "interpolated")


def test_where_a_tie_begins_is_a_crossover_of_its_own():
    """h2o is as fast as full at 2 requests/s within the noise, and much faster at 4."""
    tied = {FULL: lambda rate: dict(ttft=50 * rate, tpot=4.0), PAGED: lambda rate: dict(ttft=98, tpot=4.0)}
    found = advise(QUALITY + rates(tied, at=(2, 4), noise=0.2, repeats=2), needs())
    (change,) = [c for c in found.crossovers if c.axis == "request_rate"]
    assert (change.before, change.after, change.tie) == (FULL, PAGED, True)
    assert 2 < change.at < 4
    assert "be told apart" in change.sentence()


def test_a_bound_that_is_met_up_to_a_rate_is_a_crossover():
    """P90 of TTFT under full reaches 150 ms at a rate a little under 6.5; vllm is out before."""
    found = advise([r for r in BOTH if r["strategy"] != PAGED], needs(ttft=150.0))
    change = [c for c in found.crossovers if c.axis == "request_rate"][-1]
    assert (change.before, change.after) == (FULL, None)
    assert 6.2 < change.at < 6.5
    assert "nothing qualifies above" in change.sentence()


def test_memory_and_bars_have_thresholds():
    found = advise(BOTH, needs(min_recall=0.9))
    memory = [(c.at, c.before, c.after) for c in found.crossovers if c.axis == "kv_memory"]
    assert memory == [(8 * MIB, None, VLLM), (12 * MIB, VLLM, FULL)]
    bars = [(round(c.at, 2), c.before, c.after) for c in found.crossovers if c.axis == "min_recall"]
    assert bars == [(0.4, PAGED, FULL), (0.98, FULL, None)]
    assert "kv_memory 8.0 MiB: nothing qualifies below, vllm from it on (measured)" in [c.sentence() for c in found.crossovers]


def test_crossovers_over_the_length_of_the_prompt():
    records = [
        offline(s, tpot=tpot(n), ttft=1.0, input_len=n, noise=0.001, repeat=i)
        for n in (100, 500, 900) for i in range(3) for s, tpot in ((FULL, lambda n: n / 100), (H2O, lambda n: 4.0))
    ]  # fmt: skip
    found = advise(records, Needs(objective="latency", input_len=500))
    (change,) = [c for c in found.crossovers if c.axis == "input_len"]
    assert (change.before, change.after) == (FULL, H2O)
    assert change.at == pytest.approx(400, rel=2e-3)


def test_where_noise_is_planted_it_is_undecided_and_goes_to_what_loses_least():
    noisy = {FULL: lambda rate: dict(ttft=100, tpot=4.0, used=12 * MIB), PAGED: lambda rate: dict(ttft=100, tpot=3.98, used=3 * MIB)}
    found = advise(QUALITY + rates(noisy, noise=0.3, repeats=2), needs())
    assert found.strategy == FULL, "not distinguishable from the faster one, and loses nothing"
    assert found.decided is False
    assert found.equals == (PAGED,)
    assert "not distinguishable" in found.headline()
    assert "as good, but full diverges less" in why(found, PAGED)
    runs = [load(s, 4, repeat=i, ttft=9, tpot=1, throughput=x) for s, xs in ((FULL, (900, 1100, 1000)), (VLLM, (1100, 950, 1010)))
            for i, x in enumerate(xs)]  # fmt: skip
    assert advise(runs, needs(objective="throughput")).decided is False


def test_one_run_of_each_gives_point_estimates():
    records = [load(FULL, 4, ttft=100, tpot=4, throughput=1000), load(VLLM, 4, ttft=100, tpot=4, throughput=900)]
    found = advise(records, needs(objective="throughput"))
    assert found.strategy == FULL
    assert found.decided is None
    assert found.margin is not None
    assert "point estimates, no interval" in found.margin.text


def test_goodput_is_counted_by_the_users_own_bounds():
    slow = dict(tpot=2.0, noise=0.2, used=MIB)
    records = rates({FULL: lambda rate: dict(ttft=100, **slow), VLLM: lambda rate: dict(ttft=70, **slow)})
    found = advise(records, needs(objective="throughput", ttft=120.0, attainment=0.5))
    good = [[x <= 120 for x in r["samples"]["ttft_ms"]] for r in records if r["strategy"] == VLLM and r["request_rate"] == 4]
    assert figure(found, "goodput").value == pytest.approx(4 * sum(map(sum, good)) / sum(map(len, good)))
    assert found.strategy == VLLM


def test_offline_each_strategy_stands_at_the_batch_that_suits_it():
    records = [
        offline(s, batch_size=n, size=n * size, tpot=tpot + n / 10)
        for n in (2, 8, 32) for s, size, tpot in ((FULL, 2 * MIB, 4.0), (H2O, MIB // 2, 4.5))
    ]  # fmt: skip
    unlimited = advise(records, Needs())
    assert (unlimited.strategy, unlimited.setting["batch_size"]) == (FULL, 32)
    limited = advise(records, Needs(kv_memory=16 * MIB))
    assert (limited.strategy, limited.setting["batch_size"]) == (H2O, 32)
    assert advise(records, Needs(kv_memory=16 * MIB, batch_size=8)).strategy == FULL
    assert advise(records, Needs(objective="latency")).setting["batch_size"] == 2


def test_experiments_are_not_mixed():
    elsewhere = rates({"streaming(sinks=4,window=0.2)": lambda rate: dict(ttft=1, tpot=1)}, sweep="other")
    found = advise(LOADS + elsewhere, needs())
    assert STREAMING not in dict(found.passed)
    assert found.experiment == "request_rate"


def test_what_did_not_fit_is_passed_over_with_the_reason():
    refused = load(OFFLOAD, 4, ttft=1, tpot=1) | {"outcome": "infeasible", "error": "16 MiB hold no request", "samples": {}}
    found = advise([*LOADS, refused], needs())
    assert why(found, OFFLOAD) == "infeasible: 16 MiB hold no request"


def test_nothing_may_qualify():
    found = advise(BOTH, needs(ttft=1.0))
    assert found.strategy is None
    assert found.headline() == "None of the strategies measured meets these needs."
    assert set(dict(found.passed)) == {FULL, VLLM, PAGED}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(request_rate=40), "request_rate=40 is outside the results, which have 2 to 8 (2, 4, 8) requests/s"),
        (dict(request_rate=1.5), "request_rate=1.5 is outside"),
        (dict(request_rate=float("inf")), "request_rate=inf is outside"),
        (dict(input_len=4096), "input_len=4096 is outside the results, which have 256 tokens"),
        (dict(model="opt-13b"), "model=opt-13b is not in the results; they have kvjax-4m"),
        (dict(kv_memory=2**30), "is more than any load was given (16.0 MiB)"),
        (dict(kv_memory=MIB), "kv_memory=1.0 MiB is less than anything measured there needed, 3.0 MiB"),
    ],
)
def test_outside_its_data_it_declines_with_the_range(given, says):
    with pytest.raises(OutsideData) as declined:
        advise(BOTH, needs(**given))
    assert says in str(declined.value)
    assert "\n" not in str(declined.value)


def test_it_declines_without_measurements_of_that_kind():
    with pytest.raises(OutsideData, match="no timed measurement under load; leave request_rate out"):
        advise(QUALITY, needs())
    with pytest.raises(OutsideData, match="no timed measurement offline; give request_rate"):
        advise(LOADS, Needs())
    with pytest.raises(OutsideData, match="batch_size=4 is not in the results, which have 8"):
        advise(QUALITY, Needs(batch_size=4))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(objective="speed"), "choose from throughput, latency, memory"),
        (dict(ttft=-1.0), "ttft=-1"),
        (dict(request_rate=0.0), "request_rate=0 is not above 0"),
        (dict(min_recall=90.0), "min_recall=90 is not a share"),
        (dict(max_kld=float("nan")), "max_kld=nan"),
        (dict(attainment=1.0), "attainment=1"),
        (dict(batch_size=4), "batch_size has no meaning under load"),
    ],
)
def test_needs_that_make_no_sense_are_refused(given, says):
    with pytest.raises(SpecError, match=says.replace("(", r"\(")):
        needs(**given)


def test_what_was_left_open_is_said():
    records = LOADS + rates({FULL: LATENCIES[FULL]}, input_len=512)
    assumed = advise(records, needs()).assumed
    assert assumed == ("input_len=256, where most strategies were measured", "kv_memory=16.0 MiB, the largest limit measured")


def test_times_of_offloading_on_a_cpu_carry_a_note():
    assert any("copy in memory" in note for note in advise(QUALITY, Needs()).notes)
    assert advise(LOADS, needs()).notes == ()


def test_recommendations_are_a_table_of_the_answers():
    delivered = {(PAGED, 8): 500.0, (FULL, 2): 130.0}  # the others: what is offered, at best
    records = [r | {"output_throughput": delivered.get((r["strategy"], r["request_rate"]), 120.0) + r["cell"]["repeat"]} for r in LOADS]
    lines = recommendations(QUALITY + records).splitlines()
    assert lines[0] == "| need | use | margin | rests on |"
    rows = dict(line.strip("| ").split(" | ")[:2] for line in lines[2:])
    assert rows["8 requests/s, any quality"] == f"`{PAGED}`"
    assert rows["8 requests/s, 90 % of the facts recalled"] == f"`{VLLM}`", "no better than full, and needs less memory"
    assert rows["2 requests/s, 90 % of the facts recalled"] == f"`{FULL}`"
    assert rows["offline, best memory, 90 % of the facts recalled"] == f"`{INFINIGEN}`, batch 8"
    assert len({line.count("|") for line in lines}) == 1


def test_the_command_quotes_what_a_shell_would_read():
    setting = advise(BOTH, needs()).setting
    assert f"--strategy='{PAGED}'" in command(setting, needs(ttft=200.0, tpot=50.0))
    assert "--goodput=ttft:200,tpot:50" in command(setting, needs(ttft=200.0, tpot=50.0))


# ------------------------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return written(tmp_path_factory.mktemp("results"), BOTH)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kvjax.advise", *flags], capture_output=True, text=True, timeout=120)


def test_the_program_answers_as_the_library_does(results):
    place = ["--request_rate=4", "--objective=latency", "--min_recall=0.9", "--kv_memory=16MiB", "--input_len=256"]
    process = run(f"--results={results}", *place, "--json")
    assert (process.returncode, process.stderr) == (0, "")
    found = json.loads(process.stdout)
    expected = advise(BOTH, needs(min_recall=0.9, kv_memory=16 * MIB, input_len=256))
    assert found == json.loads(json.dumps(expected.record()))
    assert found["needs"] == dataclasses.asdict(expected.needs)


def test_the_answer_the_evidence_and_the_rest_are_shown():
    shown = io.StringIO()
    show(advise(BOTH, needs(min_recall=0.9)), Console(file=shown, width=150))
    for words in ("Use full:", "python -m kvjax.run --strategy=full", "assumed: kv_memory=16.0 MiB", "measured", "passed over",
                  "at least 90 % wanted", "what would change the answer", "kv_memory 8.0 MiB"):  # fmt: skip
        assert words in shown.getvalue()


@pytest.mark.parametrize(
    ("flag", "code", "says"),
    [("--request_rate=40", 3, "request_rate=40 is outside the results"), ("--min_recall=90", 2, "min_recall")],
)
def test_the_program_ends_in_one_line(results, flag, code, says):
    process = run(f"--results={results}", flag)
    assert process.returncode == code
    assert process.stderr.startswith("kvjax: ")
    assert says in process.stderr
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_results_that_are_none_or_damaged_are_refused(tmp_path):
    with pytest.raises(InputError, match="no records under"):
        read_results(tmp_path)
    written(tmp_path, QUALITY[:1])
    file = tmp_path / "sparsity" / "records.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:50])
    assert len(read_results(tmp_path)) == 1, "a last line that was cut short is left out"
    file.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(InputError, match=r"line 1, is not JSON"):
        read_results(tmp_path)


def test_of_a_cell_that_was_run_again_the_last_record_counts(tmp_path):
    again = [QUALITY[0] | {"outcome": "failed"}, QUALITY[0]]
    assert [r["outcome"] for r in read_results(written(tmp_path, again))] == ["done"]
