"""The paper's claims against records with planted answers: each is confirmed, refuted or left undecided as planted."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from made_results import FULL, H2O, INFINIGEN, OFFLOAD, ORACLE, STREAMING, VLLM, Record, load, offline, rates, written

from experiments import claims, paper
from experiments.claims import CLAIMS, Evidence
from kvjax.errors import InputError, SpecError

MIB = 2**20
PAGED = H2O + "+paged"
BY_NAME = {claim.name: claim for claim in CLAIMS}


def verdict(name: str, records: list[Record]) -> str:
    return BY_NAME[name].test(Evidence(records)).verdict


def sweep(of: dict[str, Callable[[float], dict[str, Any]]], **more: Any) -> list[Record]:
    """Two runs at two rates; under vllm the higher one preempts."""
    found = rates(of, at=(2, 8), repeats=2, noise=0.1, **more)
    for record in found:
        if record["strategy"] == VLLM and record["request_rate"] == 8:
            record["num_preemptions"] = 5
    return found


def steady(ttft: float, tpot: float, **more: Any) -> Callable[[float], dict[str, Any]]:
    return lambda rate: dict(ttft=ttft, tpot=tpot) | more


@pytest.mark.parametrize(
    ("h2o", "infinigen", "expected"),
    [(5.0, 6.0, "confirmed"), (3.0, 6.0, "refuted"), (4.01, 6.0, "undecided")],
)
def test_fastest_compares_where_vllm_fits(h2o, infinigen, expected):
    records = sweep({VLLM: steady(50, 4.0), PAGED: steady(50, h2o), INFINIGEN: steady(50, infinigen)})
    assert verdict("fastest", records) == expected
    pressed = [r for r in records if r["request_rate"] == 8]
    assert verdict("fastest", pressed) == "undecided", "there it does not fit"


def test_fastest_gives_the_interval_of_every_rival():
    finding = BY_NAME["fastest"].test(Evidence(sweep({VLLM: steady(0.001, 4.0), PAGED: steady(0.001, 5.0)})))
    value, low, high = (float(x) for x in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\) times under h2o", finding.text).groups())
    assert value == pytest.approx(1.25, abs=0.02)
    assert low < 1.25 < high
    assert finding.experiments == ("request_rate",)


@pytest.mark.parametrize(("size", "expected"), [(4, "confirmed"), (12, "refuted")])
def test_saved_memory_is_counted_scratch_included(size, expected):
    records = [offline(FULL, size=19 * MIB, kv_transient_bytes=MIB), offline(H2O, size=(size - 1) * MIB, kv_transient_bytes=MIB)]
    finding = BY_NAME["saves_memory"].test(Evidence(records))
    assert finding.verdict == expected
    assert f"({size}.0 MiB for 20.0 MiB)" in finding.text
    assert f"{1 - size / 20:.0%} less" in finding.text


def test_a_saving_not_reached_at_large_budgets_alone_is_no_refutation():
    assert verdict("saves_memory", [offline(FULL, size=20 * MIB), offline("h2o(heavy=0.3,recent=0.3)", size=12 * MIB)]) == "undecided"


@pytest.mark.parametrize(("recall", "expected"), [(0.4, "confirmed"), (0.95, "refuted"), (0.92, "undecided")])
def test_lost_answers_are_paired_by_prompt(recall, expected):
    records = [offline(FULL, recall=0.95, kld=0.0, seed=1), offline(H2O, recall=recall, kld=1.0, seed=2)]
    assert verdict("costs_answers", records) == expected


@pytest.mark.parametrize(
    ("ttft", "tpot", "expected"),
    [(140, 4.0, "confirmed"), (70, 3.0, "refuted"), (70, 4.0, "undecided")],
)
def test_lost_time_counts_the_first_token_and_the_others(ttft, tpot, expected):
    records = [offline(s, ttft=a, tpot=b, input_len=n, repeat=i) for s, a, b in ((FULL, 100, 4.0), (H2O, ttft, tpot))
               for n in (256, 512) for i in range(2)]  # fmt: skip
    assert verdict("costs_time", records) == expected


def early(infinigen: float, h2o: float) -> list[Record]:
    given = ((FULL, 0.97, 0.97), (INFINIGEN, infinigen, infinigen), (H2O, 0.5, h2o))
    return [offline(s, recall=r, early=e, count=96, seed=i) for i, (s, r, e) in enumerate(given)]


@pytest.mark.parametrize(
    ("infinigen", "h2o", "expected"),
    [(0.97, 0.1, "confirmed"), (0.97, 0.95, "undecided"), (0.3, 0.1, "refuted"), (0.1, 0.5, "refuted")],
)
def test_early_facts_are_kept_lost_or_neither(infinigen, h2o, expected):
    assert verdict("keeps_early", early(infinigen, h2o)) == expected


def test_early_facts_come_with_what_a_small_model_cannot_tell():
    assert "layers 0 and 1" in BY_NAME["keeps_early"].cannot


@pytest.mark.parametrize(
    ("delivered", "expected"),
    [((1500, 1520), "confirmed"), ((600, 610), "refuted"), ((700, 1400), "undecided")],
)
def test_pressure_is_where_vllm_preempts(delivered, expected):
    records = sweep({VLLM: steady(50, 4.0), PAGED: steady(50, 4.0)})
    for record in records:
        under = record["request_rate"] == 8
        record["output_throughput"] = delivered[record["cell"]["repeat"]] if record["strategy"] == PAGED and under else 1000.0
    assert verdict("wins_under_pressure", records) == expected
    assert verdict("wins_under_pressure", [r for r in records if r["request_rate"] == 2]) == "undecided"


@pytest.mark.parametrize(("tpot", "expected"), [(6.0, "confirmed"), (12.0, "refuted"), (10.0, "undecided")])
def test_guessing_is_measured_against_fetching_everything(tpot, expected):
    records = [offline(s, tpot=b, moved=m, repeat=i, batch_size=8, count=32, noise=0.1, seed=i + 2 * len(s))
               for i in range(2) for s, b, m in ((OFFLOAD, 10.0, 4e6), (INFINIGEN, tpot, 1e6))]  # fmt: skip
    finding = BY_NAME["prediction_pays"].test(Evidence(records))
    assert finding.verdict == expected
    assert "moves 25% of the bytes" in finding.text


def test_no_strategy_is_best_everywhere_where_needs_differ():
    quality = [offline(FULL, recall=0.98, kld=0.0, size=20 * MIB), offline(H2O, recall=0.4, kld=1.0, size=4 * MIB)]
    assert verdict("none_is_best", quality) == "confirmed"
    assert verdict("none_is_best", quality[:1]) == "refuted"


def test_claims_without_records_are_undecided_and_say_so():
    for claim in CLAIMS:
        finding = claim.test(Evidence([offline(STREAMING) | {"strategy": "mine:Policy(keep=3)"}]))
        if claim.name != "none_is_best":
            assert finding.verdict == "undecided"
            assert finding.text.startswith("No records test it")


def test_intervals_of_several_rivals_hold_together():
    assert claims.together(1) == 0.95
    assert claims.together(5) == pytest.approx(0.99)


# ---------------------------------------------------------------------------------------------------------------------------- STUDY.md


ABOUT = {
    "name": "sparsity", "title": "Over the budget", "question": "What does a budget buy?", "quick": True,
    "command": "python -m experiments.study.sparsity --quick", "findings": ["It buys bytes."],
    "figures": [{"file": "sparsity.svg", "png": "sparsity.png", "caption": "A caption."}, {"png": "missing.png", "caption": "No."}],
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> str:
    records = [
        offline(FULL, recall=0.98, kld=0.0, size=20 * MIB), offline(H2O, recall=0.4, kld=1.0, size=4 * MIB),
        offline(ORACLE, recall=0.98, kld=0.01, size=20 * MIB),
        *sweep({VLLM: steady(50, 4.0), PAGED: steady(50, 5.0)}), load(OFFLOAD, 2, ttft=1, tpot=1) | {"outcome": "infeasible"},
    ]  # fmt: skip
    directory = written(tmp_path_factory.mktemp("study"), records)
    (directory / "sparsity" / "about.json").write_text(json.dumps(ABOUT))
    (directory / "sparsity" / "sparsity.png").write_bytes(b"")
    return paper.write(directory).read_text()


def test_the_document_has_every_claim_with_its_verdict(study):
    for claim in CLAIMS:
        found = re.search(rf"### {re.escape(claim.title)}: (confirmed|refuted|undecided)", study)
        assert found is not None
        assert f"| {claim.title} | **{found[1]}** |" in study
        assert claim.says in study
        assert claim.cannot in study
    assert f"### {BY_NAME['fastest'].title}: confirmed" in study


def test_the_document_says_where_it_comes_from(study):
    assert "11 cells measured on cpu, 2 processors, with kvjax-4m; 1 more do not fit, 0 failed" in study
    assert "Made with --quick" in study
    assert "![A caption.](sparsity/sparsity.png)" in study
    assert "missing.png" not in study
    assert "python -m experiments.study.sparsity --quick" in study
    assert "It buys bytes." in study


def test_the_document_recommends_and_explains(study):
    assert "| need | use | margin | rests on |" in study
    assert "python -m kvjax.run --strategy=full" in study
    assert f"| `{H2O}` | 0.2 | facts recalled |" in study
    assert "speedup by bytes (computed)" in study
    assert "TPOT speedup (measured)" in study


def test_results_that_are_damaged_are_refused(tmp_path):
    with pytest.raises(InputError, match="no records under"):
        paper.write(tmp_path)
    written(tmp_path, [offline(FULL)])
    (tmp_path / "sparsity" / "about.json").write_text("{")
    with pytest.raises(SpecError, match=r"about\.json is not JSON"):
        paper.write(tmp_path)


def test_a_flag_without_effect_ends_the_program(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "experiments.paper", f"--results={tmp_path}", "--quick"], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2
    assert process.stderr == "kvjax: --quick and --full say how much to measure; add --run, or leave them out\n"
