"""Tasks on the command line: what the table and the records say, and what is refused."""

import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from kvjax import run
from kvjax.command import parse_flags

SMALL = ["--model=kvjax-1m", "--num_prompts=2", "--input_len=200"]


@pytest.fixture
def ran():
    """A function that runs the command line in this process."""
    if "strategy" not in flags.FLAGS:
        run.define_flags()

    def invoke(*arguments):
        with flagsaver.flagsaver():
            run.main(parse_flags(["kvjax.run", *SMALL, *arguments]))

    return invoke


def test_scores_stand_beside_the_full_cache(ran, capsys, tmp_path):
    asked = ["--task=recall(facts=2),kv(turns=1,pairs=0)", "--query=both", "--nospeed", f"--output_dir={tmp_path}"]
    ran("--compare=streaming(sinks=4,window=24),full", *asked)
    shown = " ".join(capsys.readouterr().out.split())
    assert "recall(facts=2), 200 tokens, asked after (full cache 100 %)" in shown
    for query in ("before", "after"):
        assert f"kv(turns=1,pairs=0), 200 tokens, asked {query} (full cache 0 %: below the gate, not ranked)" in shown
    assert re.search(r"minus full cache │ -\d+ \[-\d+, [+-]?\d+\] │ - ", shown)
    assert "output throughput" not in shown
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["strategy"] for line in lines] == ["streaming(sinks=4,window=24)", "full"]
    for line in lines:
        assert line["workload"] == "tasks"
        assert [(one["task"], one["task_query"]) for one in line["tasks"]] == [
            ("recall(facts=2)", "after"),
            ("kv(turns=1,pairs=0)", "before"),
            ("kv(turns=1,pairs=0)", "after"),
        ]
        assert [one["task_ranked"] for one in line["tasks"]] == [True, False, False]
        assert {one["task_chat_template"] for one in line["tasks"]} == {False}
        assert {one["task_gate"] for one in line["tasks"]} == {0.5}
    assert lines[0]["tasks"][0]["task_loss"] == lines[1]["tasks"][0]["task_score"] - lines[0]["tasks"][0]["task_score"] > 0
    assert not (tmp_path / "requests.jsonl").exists(), "nothing was timed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query=before"], "--query needs a task"),
        (["--nospeed"], "--speed needs a task"),
        (["--task=nothing"], "unknown task 'nothing'"),
        (["--task=recall", "--query=before"], "task recall can only be asked after, not before"),
        (["--task=kv,niah_single(digits=0)"], "digits as a whole number from 1 to 18, not 0"),
        (["--task=recall,vt", "--input_len=100"], "task vt does not fit into 100 tokens; it takes at least"),
        (["--task=kv", "--input_len=4096"], "exceed the 2048 positions"),
        (["--task=recall", "--request_rate=4"], "--task has no meaning under load"),
        (["--task=recall", "--nospeed", "--profile_dir=runs/x"], "--nospeed leaves nothing to trace"),
        (["--task=recall", "--prefill_chunk=64", "--prefill_mode=bounded"], "--prefill_mode=bounded has no meaning for tasks"),
        (["--task=nowhere.jsonl"], "task file nowhere.jsonl: No such file or directory"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(ran, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        ran("--strategy=full", *arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
