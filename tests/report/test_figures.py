"""Figures from records: which points, which looks, and what a reader is told about them."""

import math
import xml.etree.ElementTree as ElementTree

import made_study
import pytest

from kvjax.cache.spec import read_identity
from kvjax.report import figures
from kvjax.report.curves import Summary, by_strategy, curves, summary
from kvjax.report.figures import Panel, front, style

SVG = "{http://www.w3.org/2000/svg}"


def record(strategy: str, x, y, outcome: str = "done", **cell):
    found = {"strategy": strategy, "outcome": outcome, "cell": {"strategy": strategy.split("(")[0], "x": x, **cell}}
    return found | ({"y": y} if outcome == "done" else {"error": "too <big>"})


def titles(path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}title")]


def texts(path) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter(f"{SVG}text")]


def test_a_family_has_one_colour_and_marker_whatever_its_arguments_and_store():
    def look(label: str):
        identity = read_identity(label)
        return style(identity.family, identity.variant)

    assert look("h2o") == look("h2o(heavy=0.1,recent=0.1)")
    paged = look("h2o(heavy=0.1,recent=0.1)+paged(16)")
    assert (paged.color, paged.marker) == (look("h2o").color, look("h2o").marker)
    assert (paged.line, paged.filled) != (look("h2o").line, look("h2o").filled)
    known = [look(name) for name in ("full", "vllm", "h2o", "streaming", "infinigen", "offload", "oracle_topk")]
    assert len({one.color for one in known}) == len({one.marker for one in known}) == 7
    assert look("mine:Own(keep=3)") == look("mine:Own(keep=4)")
    assert look("mine:Own").color not in {one.color for one in known}


def test_repeats_are_joined_and_a_series_is_what_the_cell_declares():
    found = [record(f"h2o(heavy={x})", x, 10 * x + r, repeat=r) for x in (0.4, 0.1) for r in (0, 1, 2)]
    found += [record("full", None, 7.0, repeat=0)]
    h2o, full = curves(found, "x")
    assert (h2o.label, list(h2o.points), [len(rs) for rs in h2o.points.values()]) == ("h2o", [0.1, 0.4], [3, 3])
    assert (full.label, list(full.points)) == ("full", [None])
    assert summary(h2o.points[0.1], "y", 2.0) == Summary(4.0, 2.0, 6.0, 3)


def test_what_is_weighed_of_one_repeat_alone_does_not_part_it_from_the_others():
    found = [record("full", 1, 3.0, repeat=0, scratch=True), record("full", 1, 5.0, repeat=1)]
    (full,) = curves(found, "x")
    assert (full.label, summary(full.points[1.0], "y")) == ("full", Summary(4.0, 3.0, 5.0, 2))
    assert list(by_strategy(found)) == [("full", "")]


def test_cells_that_are_no_repeats_of_each_other_are_never_averaged():
    found = [record("full", x, x * b, batch=b, kv=x * 3) for x in (1, 2) for b in (4, 8)]
    assert [(c.label, [r["y"] for rs in c.points.values() for r in rs]) for c in curves(found, "x")] == [
        ("full, batch 4", [4, 8]),
        ("full, batch 8", [8, 16]),
    ]


def test_a_figure_names_its_points_its_whiskers_and_what_is_missing(tmp_path):
    found = [record("full", x, y + r, repeat=r) for x, y in (("2", 10.0), ("8", 30.0), ("inf", 90.0)) for r in (0, 1)]
    found += [record("h2o(heavy=$1$)", "2", 0.0), record("h2o(heavy=$1$)", "8", None, outcome="infeasible"), record("vllm", None, 3.0)]
    found += [record("_own", "2", math.nan)]
    figures.lines(found, "x", "rate (1/s)", [Panel("y", "time (ms)", "log", "less", 2.0)], "A <title> & $x$", tmp_path / "f")
    said = titles(tmp_path / "f.svg")
    assert "full, rate (1/s) 2: time (ms) 21 (20 to 22, 2 repeats)" in said
    assert "full, rate (1/s) ∞: time (ms) 181 (180 to 182, 2 repeats)" in said
    assert "h2o(heavy=$1$), rate (1/s) 2: time (ms) 0" in said
    assert "h2o(heavy=$1$), rate (1/s) 8: does not fit: too <big>" in said
    assert "vllm: time (ms) 6" in said
    assert len(said) == 6
    shown = texts(tmp_path / "f.svg")
    assert "∞" in shown
    assert "0" in shown  # the zero below the log scale has a tick
    assert any("log scale" in text for text in shown)
    assert "A <title> & $x$" in shown
    assert any("2 repeats" in text and "least and most" in text for text in shown) or any("1 to 2 repeats" in text for text in shown)
    assert any(text.strip() == "_own" for text in shown)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_figures_without_anything_to_show_are_drawn_and_say_so(tmp_path):
    figures.lines([record("full", 1, None, outcome="failed")], "x", "x", [Panel("y", "y")], "t", tmp_path / "a", formats=("svg",))
    assert "no finished cell has this" in texts(tmp_path / "a.svg")
    figures.pareto([], tmp_path / "b", formats=("svg",))
    figures.ledger([], tmp_path / "c", formats=("svg",))
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "b.svg", "c.svg"}


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_same_records_give_the_same_bytes(tmp_path, scale):
    found = [record("full", 1, 1.0), record("h2o", 2, 3.0), record("other:Thing", 2, 3.0)]
    for name in ("a", "b"):
        figures.lines(found, "x", "x", [Panel("y", "y", scale)], "t", tmp_path / name, x_scale=scale)
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 0.2), (2.0, 0.9), (2.0, 0.5), (3.0, 0.9), (4.0, 1.0), (1.0, 0.2)]
    assert front(points, more=True) == {0, 1, 4, 5}
    assert front(points, more=False) == {0, 5}


def test_the_ledger_draws_every_byte(tmp_path):
    found = [made_study.offline("full", None), made_study.offline("offload", None)]
    figures.ledger(found, tmp_path / "l", formats=("svg",))
    said = titles(tmp_path / "l.svg")
    assert "full, device: 18.0 MiB of keys and values" in said
    assert "full, device: 2.0 MiB of empty" in said
    assert "full, host: 4.0 KiB of metadata" in said
    assert "offload, host: 18.0 MiB of keys and values" in said
    assert len(said) == 6


def test_the_plot_of_quality_joins_budgets_and_says_bytes(tmp_path):
    found = [made_study.offline(name, b) for name, b in (("full", None), ("h2o", 0.1), ("h2o", 0.2), ("infinigen", 0.2))]
    figures.pareto(found, tmp_path / "p", formats=("svg",))
    said = titles(tmp_path / "p.svg")
    assert "full: mean time per output token (ms) 6; facts recalled (%) 100; 20 MiB" in said
    assert len(said) == 4
    assert {"full", "h2o", "infinigen", "front"} <= set(texts(tmp_path / "p.svg"))
