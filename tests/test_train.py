"""Training: it learns, it resumes, and its data come in order."""

import dataclasses
import json
import threading

import jax
import numpy as np
import pytest

from kvjax import train
from kvjax.models.config import BUNDLED
from kvjax.train import Recipe, Stage

RECIPE = Recipe((Stage(64, 4, 22), Stage(96, 2, 6)), learning_rate=2e-2, adam_learning_rate=1e-2, warmup=2, max_position=256)


class Killed(Exception):
    """The end of a process, for a test."""


@pytest.fixture(scope="module")
def small():
    """kvjax-1m, much smaller."""
    with pytest.MonkeyPatch.context() as patch:
        config = dataclasses.replace(BUNDLED["kvjax-1m"], num_layers=1, hidden_size=32, head_dim=8, intermediate_size=32)
        patch.setitem(BUNDLED, "kvjax-1m", config)
        yield config


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """Parameters and loss curve of a whole run."""
    directory = tmp_path_factory.mktemp("whole")
    params = train.train("kvjax-1m", RECIPE, directory, seed=0, checkpoint_every=10)
    return params, curve(directory)


def curve(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "loss.jsonl").read_text().splitlines()]


def without_speed(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name != "bytes_per_s"} for entry in entries]


def test_loss_falls(uninterrupted):
    _, entries = uninterrupted
    assert [entry["step"] for entry in entries] == [0, 20, 27]
    assert [entry["context"] for entry in entries] == [64, 64, 96]
    assert entries[0]["loss"] == pytest.approx(np.log(256), rel=0.1)
    assert entries[-1]["loss"] < 0.8 * entries[0]["loss"]


def test_killed_run_resumes_where_it_was(small, uninterrupted, tmp_path, monkeypatch):
    right, calls = train.train_step, 0

    def dies(*arguments):
        nonlocal calls
        calls += 1
        if calls > 25:
            raise Killed
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dies)
        with pytest.raises(Killed):
            train.train("kvjax-1m", RECIPE, tmp_path, seed=0, checkpoint_every=10)
    assert [entry["step"] for entry in curve(tmp_path)] == [0, 20]
    params = train.train("kvjax-1m", RECIPE, tmp_path, seed=0, checkpoint_every=10)
    expected, entries = uninterrupted
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert without_speed(curve(tmp_path)) == without_speed(entries)


def test_finished_run_does_nothing_more(small, uninterrupted, tmp_path):
    short = dataclasses.replace(RECIPE, stages=(Stage(64, 4, 3),), warmup=1)
    first = train.train("kvjax-1m", short, tmp_path, seed=0, checkpoint_every=10)
    again = train.train("kvjax-1m", short, tmp_path, seed=0, checkpoint_every=10)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_held_out_scores_of_a_model_that_knows_nothing(small, uninterrupted):
    params = jax.tree.map(lambda x: 0 * x, uninterrupted[0])
    found = train.held_out_scores(train.Decoder(small), params, context=128, rows=4, num_facts=2)
    assert found["bits_per_byte"] == pytest.approx(8.0, abs=1e-3)
    assert found["recall"] == 0.0
    assert list(found["recall_by_depth"]) == ["0.00", "0.50"]


def test_batch_depends_on_seed_and_step_alone():
    one, two, later, other = (train.batch_at(RECIPE, seed, step) for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert (one["tokens"] != later["tokens"]).any()
    assert (one["tokens"] != other["tokens"]).any()
    assert one["tokens"].shape == (4, 64)
    assert train.batch_at(RECIPE, 0, 22)["tokens"].shape == (2, 96)
    assert one["answers"].any(axis=1).tolist() == [True, True, False, False], "recall documents, then text"


def test_scaled_recipe_keeps_every_stage():
    scaled = RECIPE.scaled(0.1)
    assert [stage.steps for stage in scaled.stages] == [2, 1]
    assert scaled.warmup == 0
    assert RECIPE.scaled(1.0) == RECIPE
    assert [RECIPE.stage_at(step).context for step in (0, 21, 22, 27, 99)] == [64, 64, 96, 96, 96]


def test_schedule_warms_up_holds_and_decays():
    schedule = Recipe((Stage(64, 1, 100),), warmup=10, decay_share=0.4).schedule(2.0)
    assert [float(schedule(step)) for step in (0, 5, 10, 40, 60, 80, 100)] == pytest.approx([0, 1, 2, 2, 2, 1, 0])


def test_ahead_keeps_the_order_and_stays_close():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    results = train.ahead(make, range(20))
    assert next(results) == 0
    assert len(made) <= 3
    assert list(results) == [step * step for step in range(1, 20)]
    assert made == list(range(20))


def test_ahead_stops_with_its_reader():
    before = threading.active_count()
    results = train.ahead(lambda step: step, range(1000))
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


def test_ahead_hands_errors_on():
    def make(step: int) -> int:
        if step == 2:
            raise Killed
        return step

    results = train.ahead(make, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(Killed):
        next(results)
