"""Ids of cells, and the order in which a grid is measured."""

import itertools

import pytest

from kvjax.errors import SpecError
from kvjax.sweep import cell_id, in_turns
from kvjax.sweep.cells import canonical, checked
from kvjax.sweep.measures import Load, Offline, Quality, parse


def test_an_id_depends_on_what_a_cell_says_and_on_no_order():
    cell = {"strategy": "h2o", "budget": 0.2, "input_len": 512, "quality": True, "limit": None}
    ids = {cell_id(dict(order)) for order in itertools.permutations(cell.items())}
    assert len(ids) == 1
    others = [cell | {"budget": 0.1}, cell | {"quality": 1}, cell | {"repeat": 0}, cell | {"strategy": "h2o "}, {}]
    assert len(ids | {cell_id(other) for other in others}) == 1 + len(others)


def test_ids_stay_what_they_are():
    """Results that were recorded must be found again by a later version."""
    assert canonical({"b": 1.0, "a": "é", "c": 0.25, "d": None, "e": True}) == '{"a":"é","b":1,"c":0.25,"d":null,"e":true}'
    assert cell_id({"b": 1.0, "a": "é", "c": 0.25, "d": None, "e": True}) == "79bd40fc79dc0b44"
    assert cell_id({"x": 1}) == cell_id({"x": 1.0})


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ({"x": [1]}, "x=\\[1\\] is a list"), ({"x": float("inf")}, 'write "inf"'), ({"x": float("nan")}, 'write "inf"'),
        ({1: 2}, "cell key 1"), ({"x": {"y": 1}}, "is a dict"),
    ],
)  # fmt: skip
def test_what_is_no_flat_json_is_refused(cell, why):
    with pytest.raises(SpecError, match=why):
        cell_id(cell)


def test_a_cell_is_declared_once():
    with pytest.raises(SpecError, match="declared twice"):
        checked([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}])


def test_repeats_are_interleaved_across_strategies_and_a_model_is_loaded_once():
    grid = [
        {"model": model, "rate": rate, "strategy": strategy, "repeat": repeat}
        for model, rate, strategy, repeat in itertools.product(("m1", "m2"), (1, 2), ("full", "h2o"), (0, 1))
    ]
    order = in_turns(grid)
    assert sorted(map(canonical, order)) == sorted(map(canonical, grid))
    assert [c["model"] for c in order] == ["m1"] * 8 + ["m2"] * 8
    assert [c["repeat"] for c in order] == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    points = [(c["rate"], c["strategy"]) for c in order]
    assert points[:4] == points[4:8] == [(1, "full"), (1, "h2o"), (2, "full"), (2, "h2o")]
    assert in_turns([{"strategy": "a"}, {"strategy": "b"}]) == [{"strategy": "a"}, {"strategy": "b"}]


@pytest.mark.parametrize("declared", [Offline("h2o", budget=0.1), Load("vllm", request_rate="inf"), Quality("full", repeat=2)])
def test_what_is_declared_comes_back_from_its_cell(declared):
    cell = declared.cell()
    assert parse(cell) == declared
    assert None not in cell.values()
    assert len(cell_id(cell)) == 16


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ({"measure": "timing"}, "unknown measure 'timing'; choose from offline, load, quality"), ({"strategy": "full"}, "unknown measure"),
        ({"measure": "load", "strategy": "full", "batch_size": 4}, "has no 'batch_size'; it has strategy"),
        ({"measure": "quality"}, "names its strategy"),
    ],
)  # fmt: skip
def test_a_cell_that_says_what_its_measure_does_not_know_is_refused(cell, why):
    with pytest.raises(SpecError, match=why):
        parse(cell)
