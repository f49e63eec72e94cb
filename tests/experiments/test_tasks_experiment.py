"""The tasks' experiment: blocks that are not asked twice, the gate, and tables that say what the records say."""

import json
import types

import numpy as np
import pytest

from experiments import tasks as experiment
from kvjax.command import Printer
from kvjax.quality.tasks import parse_tasks

FULL, POOR = "full", "streaming"


@pytest.fixture
def flagged(monkeypatch):
    """Sets flags of the experiment, for as long as a test runs."""
    values = types.SimpleNamespace(chat_template=True, gate=True, infinigen=None, query="after")
    monkeypatch.setattr(experiment, "FLAGS", values)
    return lambda **more: values.__dict__.update(more)


def record(task, strategy, scores, block=0, length=1024, query="after", **more):
    return {
        "cell_id": f"{task} {length} {query} {strategy} {block}", "task": task, "task_length": length, "task_query": query,
        "task_fingerprint": f"{task}{length}{query}{block}", "strategy": strategy, "task_examples": len(scores), "task_scores": scores,
        "task_chat_template": True, "model_id": "a-model", "model_weights": "Q4_1", "dtype": "float32", **more,
    }  # fmt: skip


def test_blocks_are_pooled_and_paired():
    rng = np.random.default_rng(0)
    scores = {(name, block): (rng.random(5) < 0.6).astype(float).tolist() for name in (FULL, POOR) for block in range(3)}
    records = [record("kv", name, values, block) for (name, block), values in scores.items()]
    pooled = experiment.pools([*records[::-1], record("kv", POOR, [1.0], block=9)])  # the last one has no partner
    full, poor = (np.concatenate([scores[name, block] for block in range(3)]) for name in (FULL, POOR))
    pool = pooled["kv", 1024, "after", POOR]
    assert pool.examples == 15
    assert pool.score.mean == pytest.approx(poor.mean())
    assert pool.loss.mean == pytest.approx((full - poor).mean())
    assert pool.loss.low < pool.loss.mean < pool.loss.high


def test_report_ranks_where_the_gate_is_passed(tmp_path):
    records = [
        record("kv", FULL, [1.0, 1.0, 0.0, 1.0]), record("kv", POOR, [0.0, 1.0, 0.0, 0.0]),
        record("vt", FULL, [0.0, 0.4, 0.0, 0.2]), record("vt", POOR, [0.0, 0.2, 0.0, 0.2]),
        record("kv", FULL, [0.0, 0.0], length=4096),
    ]  # fmt: skip
    fed = {"task_nlls": [2.0, 3.0], "fidelity_kld_mean": 0.25, "fidelity_same_top1": 0.9}
    for name in (FULL, POOR):
        made = record("prose", name, [0.0, 0.0], **fed)
        del made["task_scores"]
        records.append(made)
    assert experiment.report(records, tmp_path) == ["TASKS.md", "tasks.png"]
    text = (tmp_path / "TASKS.md").read_text()
    assert "weights Q4_1" in text
    assert "| kv | **75** [25, 100] (n=4) | 0 [0, 78] (n=2) |" in text
    assert f"| prose | {np.exp(2.5):.1f} (n=2) |  |" in text
    assert "| kv | after | 4 | 75 | 25 (-50 [-100, 0]) |" in text
    assert "| vt (below the gate, not ranked) | after | 4 | 15 | 10 |" in text
    assert "| prose | after | 2 | NLL 2.500 | KLD 0.2500, NLL +0.000 |" in text


def test_gate_lets_through_what_the_full_cache_can_do():
    tasks = parse_tasks("kv,vt,cwe,prose")
    records = [
        record("kv", FULL, [1.0, 0.0]),
        record("vt", FULL, [0.4]),
        record("kv", POOR, [0.0]),
        record("cwe", FULL, [1.0], length=2048),
    ]
    assert [task.describe() for task in experiment.passing(records, tasks, 1024)] == ["kv", "prose"]


def test_goes_on_where_it_stopped(flagged, byte_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiment, "load_model", lambda name: byte_model)
    flagged(part="gate", model="bytes", tasks="prose(tokens=3),kv(turns=1,pairs=0)", lengths=["180"], examples=2, block=2)
    path = tmp_path / "records.jsonl"
    experiment.measure(path, Printer())
    lines = path.read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["prose(tokens=3)", "kv(turns=1,pairs=0)"]
    path.write_text(lines[0] + "\n" + lines[1][:40])  # killed while it wrote the second
    capsys.readouterr()
    experiment.measure(path, Printer())
    again = path.read_text().splitlines()
    assert again[0] == lines[0]
    assert json.loads(again[1])["task_fingerprint"] == json.loads(lines[1])["task_fingerprint"]
    assert "[1/1] kv" in capsys.readouterr().out
    flagged(part="strategies", strategies="streaming(sinks=2,window=20)", query="after")
    experiment.measure(path, Printer())
    out = capsys.readouterr().out
    assert "left out: kv" in out
    last = [json.loads(line) for line in path.read_text().splitlines()][2:]
    assert [(one["task"], one["strategy"]) for one in last] == [("prose(tokens=3)", "streaming(sinks=2,window=20)")]
    experiment.measure(path, Printer())
    assert "has all of it" in capsys.readouterr().out
