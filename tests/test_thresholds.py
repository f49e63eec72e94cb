"""Curves of what is read and missed, against decoding; the alphas chosen on them, against known optima; and a loss from spec to answer."""

import dataclasses
import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kvjax.cache import parse_strategy
from kvjax.cache.policies import InfiniGen, InfiniGenPaper
from kvjax.calibrate import Calibration, calibrate, calibrated, curves_of, for_loss, load, sample_tokens, save, with_curves
from kvjax.errors import InputError, SpecError
from kvjax.models import Model, load_model, parameters
from kvjax.quality import recall
from kvjax.quality.speculation import audit
from kvjax.thresholds import ALPHAS, Curves, alpha_by_layer, alpha_for, late, measured_like

LENGTH = 40


def made_up(read, missed) -> Curves:
    read, missed = np.array(read, float), np.array(missed, float)
    return Curves(tuple(range(len(read))), tuple(np.arange(1.0, read.shape[1] + 1)), 100.0, read, missed)


def random_curves(seed: int, layers: int, points: int) -> Curves:
    """More is read and less missed along every row, in steps of any size, so not convex."""
    rng = np.random.default_rng(seed)
    read = rng.uniform(0.1, 10, (layers, points)).cumsum(-1)
    missed = rng.uniform(0, 1, (layers, points)).cumsum(-1)[:, ::-1]
    return made_up(read, missed / missed.max() / 2)


# ------------------------------------------------------------------------------------------------------------------------ the search


def test_where_missed_is_inverse_to_read_the_best_reads_are_as_the_roots():
    """Least sum of r_l with the mean of w_l / r_l given: r_l in proportion to the root of w_l."""
    weight, loss = np.array([0.2, 1.8, 5.0]), 0.08
    read = np.tile(np.arange(1, 3001) / 10, (3, 1))
    best = np.sqrt(weight) * np.sqrt(weight).sum() / (3 * loss)
    curves = made_up(read, weight[:, None] / read)
    found, missed = curves.at(alpha_by_layer(curves, loss))
    assert_allclose(found, best, atol=0.15)  # one and a half steps of the grid
    assert_allclose(missed.mean(), loss, rtol=1e-9)
    one = curves.at(alpha_for(curves, loss))[0]
    assert_allclose(one, weight.mean() / loss, rtol=1e-3)
    assert found.sum() < one.sum()


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_on_the_grid_reads_less(seed):
    curves = random_curves(seed, layers=3, points=7)
    loss = 0.5 * curves.missed[:, 0].mean() + 0.5 * curves.missed[:, -1].mean()
    alphas = alpha_by_layer(curves, loss)
    layers = np.arange(3)
    choices = [np.array(choice) for choice in itertools.product(range(7), repeat=3)]
    fitting = [curves.read[layers, c].sum() for c in choices if curves.missed[layers, c].mean() <= loss]
    mixed = 0.0  # what the hull promises: on a chord that spans points of the grid the curve itself may lie above it
    for layer, alpha in enumerate(alphas):
        hull = [a for a in range(7) if not _above_a_chord(curves, layer, a)]
        mixed += float(np.interp(alpha, np.array(hull) + 1.0, curves.read[layer, hull]))
    assert mixed <= min(fitting) + 1e-9


def _above_a_chord(curves: Curves, layer: int, point: int) -> bool:
    read, missed = curves.read[layer], curves.missed[layer]
    return any(
        missed[point] > np.interp(read[point], read[[a, b]], missed[[a, b]]) + 1e-12
        for a in range(point)
        for b in range(point + 1, len(read))
    )


def test_layers_that_are_alike_get_one_alpha():
    row = np.exp(-np.arange(20.0) / 4)
    curves = made_up([np.arange(20.0)] * 4, [row] * 4)
    loss = float(row[7])
    assert_allclose(alpha_by_layer(curves, loss), 8.0)
    assert alpha_for(curves, loss) == 8.0


@pytest.mark.parametrize("loss", [0.03, 0.1, 0.21])
@pytest.mark.parametrize("seed", range(3))
def test_one_alpha_misses_no_more_and_is_the_least(seed, loss):
    curves = random_curves(seed, layers=5, points=30)
    curves = dataclasses.replace(curves, missed=curves.missed - curves.missed.min())
    alpha = alpha_for(curves, loss + float(curves.missed[:, -1].mean()))
    allowed = loss + curves.missed[:, -1].mean()
    assert curves.at(alpha)[1].mean() <= allowed + 1e-9
    assert curves.at(alpha - 0.002)[1].mean() > allowed


def test_a_loss_beyond_both_ends_of_the_curves():
    curves = made_up([[10, 20, 30], [5, 6, 7]], [[0.3, 0.2, 0.1], [0.5, 0.3, 0.2]])
    assert alpha_for(curves, 0.9) == 1.0
    assert alpha_by_layer(curves, 0.9).tolist() == [1.0, 1.0]
    for search in (alpha_for, alpha_by_layer):
        search(curves, 0.15)
        with pytest.raises(SpecError, match=r"^loss=0.1 is out of reach: 0.15 is missed even with all read that the budget allows"):
            search(curves, 0.1)


def test_points_that_save_nothing_are_passed_over():
    curves = made_up([[10, 10, 20, 30]], [[0.4, 0.3, 0.3, 0.1]])
    assert_allclose(alpha_by_layer(curves, 0.3), 2.0)
    assert_allclose(alpha_by_layer(curves, 0.1), 4.0)


# ------------------------------------------------------------------------------------------------------------------------ the curves


@pytest.fixture(scope="module")
def deep(byte_model, opt_model) -> dict[str, Model]:
    """Small random models with four layers and attention that is not flat: rotary with grouped queries, and one that folds its skew."""

    def sharper(path, leaf):
        return 4 * leaf if path[-2:-1] in (("q",), ("k",)) else leaf

    found = {}
    for name, model in (("bytes", byte_model), ("opt", opt_model)):
        config = dataclasses.replace(model.config, num_layers=4)
        found[name] = Model(config, parameters.map_with_path(sharper, parameters.random(config)), None)
    return found


def rows_of(model: Model) -> np.ndarray:
    return np.random.default_rng(3).integers(0, model.config.vocab_size, (3, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def calibrations(deep) -> dict[str, Calibration]:
    return {name: calibrate(model, rows_of(model)) for name, model in deep.items()}


def test_late_positions():
    assert late(2).tolist() == [1]
    assert late(40).tolist() == list(range(20, 40))
    assert (late(1024)[[0, -1]].tolist(), len(set(late(1024)))) == ([512, 1023], 64)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param("bytes", InfiniGen(budget=0.8, full_layers=1, sinks=1, recent=2), marks=pytest.mark.slow),
        ("opt", InfiniGen(budget=0.8, full_layers=1, sinks=1, recent=2)),
        pytest.param("bytes", InfiniGen(budget=9, full_layers=2, group="max", sinks=2, recent=2), marks=pytest.mark.slow),
        pytest.param(
            "opt",
            InfiniGen(budget=0.6, full_layers=0, group="mean", columns="union", partial=0.3, correction=False),
            marks=pytest.mark.slow,
        ),
        pytest.param("bytes", InfiniGenPaper(budget=0.5, full_layers=1), marks=pytest.mark.slow),
    ],
)
def test_the_lowest_layer_that_guesses_is_as_when_decoding(deep, calibrations, name, policy):
    """Below it nothing is lost, so both see the same."""
    model, rows = deep[name], rows_of(deep[name])
    calibration = with_curves(model, calibrations[name], policy, rows)
    curves = curves_of(calibration, policy)
    assert curves.layers == tuple(range(max(policy.full_layers, 1), 4))
    assert curves.read.shape == curves.missed.shape == (len(curves.layers), len(ALPHAS))
    assert (np.diff(curves.read) >= 0).all()
    assert (np.diff(curves.missed) <= 1e-6).all()
    assert curves.held == np.arange(LENGTH // 2, LENGTH).mean()
    counted = set()
    for alpha in (1.0, 3.0):
        strategy = parse_strategy(dataclasses.replace(policy, alpha=alpha, full_layers=max(policy.full_layers, 1)).describe())
        found = audit(calibrated(model, strategy, calibration), strategy, rows, prompt_len=LENGTH // 2)
        at = ALPHAS.index(alpha)
        assert found.layers[0] == curves.layers[0]
        assert_allclose(curves.read[0, at], found.values["fetched"][0].mean(), atol=1e-6)
        assert_allclose(curves.missed[0, at], 1 - found.values["mass_covered"][0].mean(), atol=1e-5)
        counted.add(curves.read[0, at])
    assert len(counted) > 1


def test_what_reading_does_not_depend_on_has_no_curves_of_its_own():
    names = {measured_like(p) for p in (InfiniGen(), InfiniGen(alpha=3.0), InfiniGen(loss=0.1), InfiniGen(pool=0.5, victim="lru"))}
    assert names == {"infinigen(alpha=inf,partial=0.5,budget=0.2,sinks=4,recent=16)"}
    others = [InfiniGen(budget=0.3), InfiniGen(group="max"), InfiniGen(full_layers=3), InfiniGenPaper()]
    assert len(names | {measured_like(p) for p in others}) == 5


def test_what_cannot_be_measured(deep, calibrations):
    model, calibration = deep["bytes"], calibrations["bytes"]
    with pytest.raises(SpecError, match=r"all 4 layers of .* read everything"):
        with_curves(model, calibration, InfiniGen(full_layers=4), rows_of(model))
    with pytest.raises(InputError, match="calibration rows of 1 token have nothing to read"):
        with_curves(model, calibration, InfiniGen(), np.zeros((64, 1), int))
    with pytest.raises(SpecError, match="the calibration belongs to"):
        with_curves(deep["opt"], calibration, InfiniGen(), rows_of(deep["opt"]))


# ---------------------------------------------------------------------------------------------------------------------- from a spec


def test_spec_of_a_loss():
    strategy = parse_strategy("infinigen(loss=0.02,budget=0.5)")
    assert strategy.describe() == "infinigen(partial=0.5,budget=0.5,sinks=4,recent=16,loss=0.02)"
    assert parse_strategy(strategy.describe()) == strategy
    assert strategy.policy.with_budget(0.3) == InfiniGen(loss=0.02, budget=0.3)
    assert strategy.policy.ample(50).alpha == np.inf
    assert parse_strategy("infinigen_paper(loss=0.02)").policy == InfiniGenPaper(loss=0.02)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("infinigen(loss=0)", "infinigen: loss=0 is not a share of attention between 0 and 1"),
        ("infinigen(loss=1.0)", "infinigen: loss=1.0 is not a share"),
        ("infinigen(loss=-0.1)", "infinigen: loss=-0.1 is not a share"),
        ("infinigen(loss=inf)", "infinigen: loss=inf is not a share"),
        ("infinigen(loss=little)", "infinigen: loss='little' is not a share"),
        ("infinigen(loss=True)", "infinigen: loss=True is not a share"),
        ("infinigen(alpha=8.0,loss=0.1)", "infinigen: alpha=8.0 and loss=0.1 both set the threshold; give one of them"),
        ("infinigen(loss=0.1,pool=0.5)", "infinigen: loss=0.1 says nothing of what leaves a pool (pool=0.5)"),
    ],
)
def test_bad_losses(spec, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        parse_strategy(spec)


def test_nothing_runs_before_alpha_is_found(deep, calibrations):
    strategy, model = parse_strategy("infinigen(loss=0.1)"), deep["bytes"]
    with pytest.raises(
        SpecError, match=r"infinigen\(.*loss=0.1\): alpha is still to be found for this loss; kvjax.calibrate.for_loss does it"
    ):
        calibrated(model, strategy, calibrations["bytes"])
    with pytest.raises(SpecError, match="alpha is still to be found for this loss"):
        audit(calibrated(model, parse_strategy("infinigen"), calibrations["bytes"]), strategy, rows_of(model), prompt_len=20)


def test_alpha_takes_the_place_of_a_loss(deep, calibrations):
    model, policy = deep["bytes"], InfiniGen(budget=0.9, loss=0.2, full_layers=1, sinks=1, recent=1)
    calibration = with_curves(model, calibrations["bytes"], policy, rows_of(model))
    strategy = parse_strategy(policy.describe())
    found = for_loss(strategy, calibration)
    curves = curves_of(calibration, policy)
    assert found == dataclasses.replace(strategy, policy=dataclasses.replace(policy, alpha=alpha_for(curves, 0.2), loss=None))
    assert for_loss(found, calibration) is found
    assert for_loss(parse_strategy("h2o"), calibrations["bytes"]) == parse_strategy("h2o")
    other = parse_strategy("infinigen(loss=0.2)")
    for has, what in ((calibration, "only of infinigen"), (calibrations["bytes"], "none")):
        with pytest.raises(SpecError, match=re.escape("this calibration lacks its curves (has " + what)):
            for_loss(other, has)


@pytest.mark.slow
def test_a_stated_loss_holds_on_other_text():
    model = load_model("kvjax-1m")
    policy = InfiniGen(loss=0.2, budget=0.5)
    calibration = with_curves(model, calibrate(model), policy)
    strategy = for_loss(parse_strategy(policy.describe()), calibration)
    source = recall.standard_library(held_out=True)
    fresh = np.stack([source[i * 9_000 : i * 9_000 + 1024] for i in range(4)]).astype(np.int32)
    assert not (set(map(bytes, fresh.astype(np.uint8))) & set(map(bytes, sample_tokens(model).astype(np.uint8))))
    found = audit(calibrated(model, strategy, calibration), strategy, fresh, prompt_len=512)
    missed, read = 1 - found.overall("mass_covered").value, found.overall("fetched").value
    assert 0.17 < missed < 0.23
    assert read < 0.5 * 768


# -------------------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[pathlib.Path, Calibration]:
    """Of kvjax-1m with random weights, with curves."""
    model = load_model("kvjax-1m", random_weights=True)
    tokens = sample_tokens(model, 256)
    calibration = calibrate(model, tokens)
    for policy in (InfiniGen(budget=0.5), InfiniGenPaper()):
        calibration = with_curves(model, calibration, policy, tokens)
    path = tmp_path_factory.mktemp("saved") / "calibration"
    save(calibration, path)
    return path, calibration


def test_curves_are_saved(saved):
    restored = load(saved[0])
    assert list(restored.curves) == list(saved[1].curves)
    for name, want in saved[1].curves.items():
        got = restored.curves[name]
        assert (got.layers, got.alphas, got.held) == (want.layers, want.alphas, want.held)
        assert_array_equal(got.read, want.read, strict=True)
        assert_array_equal(got.missed, want.missed, strict=True)


def without_curves(path: pathlib.Path) -> None:
    """As calibrations were saved before there were any."""
    file = next(file for file in (path / "calibration").iterdir() if file.name == "metadata")
    described = json.loads(file.read_text())
    del described["curves"]
    file.write_text(json.dumps(described))


def command(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"kvjax.{program}", *arguments], capture_output=True, text=True, timeout=300)


def test_a_calibration_without_curves(tmp_path):
    model = load_model("kvjax-1m", random_weights=True)
    calibration = calibrate(model, sample_tokens(model, 64))
    save(calibration, tmp_path / "old")
    without_curves(tmp_path / "old")
    assert load(tmp_path / "old", model).curves == {}
    process = command("run", "--model=kvjax-1m", "--random_weights", "--strategy=infinigen(loss=0.1)", f"--calibration={tmp_path / 'old'}")
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1
    assert "loss=0.1): this calibration lacks its curves (has none); calibrate with --loss and --strategy for this one" in process.stderr


# ----------------------------------------------------------------------------------------------------------------- the command line


def test_calibrate_prints_a_strategy_that_run_takes(tmp_path):
    path = tmp_path / "calibration"
    process = command("calibrate", "--model=kvjax-1m", "--loss=0.25", "--strategy=infinigen(budget=0.5)", f"--output_dir={path}")
    assert (process.returncode, process.stderr) == (0, "")
    lines = re.findall(r"^(\d) +(\d+\.\d\d +\d+\.\d +\d+\.\d\d% *){2}$", process.stdout, re.MULTILINE)
    assert [layer for layer, _ in lines] == ["2", "3", "4"]
    assert "an alpha for each layer would read" in process.stdout
    (spec,) = re.findall('--strategy="(.*)"', process.stdout)
    stated = parse_strategy("infinigen(loss=0.25,budget=0.5)")
    assert for_loss(stated, load(path)) == parse_strategy(spec)
    short = ("--model=kvjax-1m", "--num_prompts=1", "--num_facts=1", "--input_len=128", "--output_len=4", "--noquality")
    ran = command("run", *short, f"--calibration={path}", f"--strategy={stated.describe()}")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert spec in " ".join(ran.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "kvjax: nothing to do; give --output_dir"),
        (["--loss=2"], "kvjax: infinigen: loss=2.0 is not a share of attention between 0 and 1"),
        (["--loss=nan"], "kvjax: flag --loss=nan is not a number"),
        (["--loss=0.1", "--strategy=h2o"], "kvjax: --loss has no meaning for h2o("),
        (
            ["--loss=0.1", "--strategy=infinigen(loss=0.2)"],
            "kvjax: --strategy=infinigen(loss=0.2) states a loss of its own beside --loss=0.1",
        ),
        (["--loss=0.1", "--strategy=infinigen(pool=0.5)"], "kvjax: infinigen: loss=0.1 says nothing of what leaves a pool (pool=0.5)"),
        (["--strategy=infinigen", "--output_dir=x"], "kvjax: --strategy=infinigen has no meaning without a loss"),
        (["--loss=0.001", "--strategy=infinigen(budget=0.05)", "--model=kvjax-1m"], "kvjax: loss=0.001 is out of reach: "),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    process = command("calibrate", *arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(message)
    assert len(process.stderr.splitlines()) == 1
