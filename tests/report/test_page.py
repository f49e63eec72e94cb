"""The page of a study without a browser: what stands in it, what is refused, and what data cannot do to it."""

import base64
import csv
import gzip
import html.parser
import io
import json
import re
import types
import urllib.parse
from collections import Counter

import made_study
import pytest

from kvjax.errors import InputError
from kvjax.report.__main__ import main, run
from kvjax.report.html_data import as_csv, read
from kvjax.report.html_markdown import render
from kvjax.report.html_svg import inline


class Outline(html.parser.HTMLParser):
    """Elements, ids, links and text by element of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: dict[str, str] = {}
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements[tag] += 1
        self.ids += [found["id"]] if "id" in found else []
        if tag == "a" and "download" in found:
            self.links[found["download"]] = found["href"]
        self._in_script = tag == "script"
        assert not any(name.startswith("on") for name in found)

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)
            self._in_script = False


@pytest.fixture(scope="module")
def text(made) -> str:
    return (made / "report.html").read_text()


@pytest.fixture(scope="module")
def outline(text) -> Outline:
    return Outline(text)


def test_the_page_has_each_experiment_with_question_findings_figure_and_command(text, outline):
    for name in ("request_rate", "sparsity", "model_size", "retention"):
        assert f"x-{name}" in outline.ids
        assert f'href="#x-{name}"' in text
    for said in (
        "How do latency and goodput change with the offered load",
        "vllm saturates at 8 requests/s.",
        "python -m experiments.study.request_rate --output_dir=runs/study",
        "Latency and throughput over the request rate, as it was measured.",
    ):
        assert said in text
    assert outline.elements["figure"] == 5  # three experiments with panels, the front, the ledger
    assert len(outline.ids) == len(set(outline.ids))
    assert text.index("x-request_rate") < text.index('id="x-model_size"') < text.index('id="x-sparsity"') < text.index('id="x-retention"')


def test_what_failed_and_what_did_not_fit_is_shown_as_such(text):
    assert "<b>72</b> cells measured" in text
    assert '<li class="warn"><b>1</b> did not fit' in text
    assert '<li class="bad"><b>1</b> failed' in text
    assert "needs 40 MiB of 16 MiB" in text
    row = next(line for line in text.splitlines() if line.startswith('<tr data-s="full" class=lost>'))
    assert "bench-32m" in row
    assert '<span class="badge warn">does not fit</span>' in row
    assert row.endswith("<span class=none>–</span>")  # a cell without figures has none in the table


def test_tables_have_the_columns_in_which_records_differ_and_no_others(text):
    table = text[text.index('id="x-request_rate-records"') : text.index('id="x-model_size"')]
    heads = re.findall(r"<button type=\"button\">([^<]*)", table[table.index("<thead>") : table.index("</thead>")])
    assert heads == ["strategy", "offered", "repeat", "mean TTFT", "P99 TTFT", "mean TPOT", "output", "goodput", "preemptions"]
    assert "model <b>kvjax-4m</b>, prompt <b>256</b> tokens" in table
    assert table.count("<tr data-s=") == 45


def test_data_is_shown_and_not_run(text, outline):
    assert len(outline.scripts) == 1
    assert "window.owned" not in outline.scripts[0]
    assert outline.elements["img"] == 0
    assert "evil:&lt;script&gt;window.owned=1&lt;/script&gt;(keep=3)" in text
    assert "&lt;img src=x onerror=" in text
    assert "ValueError: &lt;b&gt;shape&lt;/b&gt; &amp; size" in text
    assert "<script>window" not in text
    assert 'href="javascript:' not in text
    assert re.search(r"script-src 'sha256-[\w+/=]+'", text)


def test_nothing_outside_the_page_is_needed(text, outline):
    outside = re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?((?:https?:)?//[^\"')\s]+)", text)
    assert outside == ["https://arxiv.org/abs/2604.05012"]  # a link of STUDY.md to follow
    assert outline.elements["link"] == 0
    assert "@import" not in text
    assert len(text.encode()) < 3_000_000


def test_study_is_rendered_and_leads_to_the_experiments(text, outline):
    study = text[text.index('<section id="study">') : text.index('<section id="downloads">')]
    assert "study-claims" in outline.ids
    assert "gains nothing</em>" in study
    assert '<a href="#x-request_rate">the rates</a>' in study
    assert "&lt;script&gt;window.owned=3&lt;/script&gt;" in study
    assert "the image https://example.com/x.png is not among the results" in text


def test_what_is_missing_or_torn_is_said(text):
    assert "retention/records.jsonl, line 3, is torn" in text
    assert "retention: no about.json" in text


def test_downloads_hold_every_record_without_samples(made, outline):
    rows = list(csv.DictReader(io.StringIO(_content(outline, "sparsity.csv"))))
    records = [json.loads(line) for line in (made / "sparsity" / "records.jsonl").read_text().splitlines()]
    assert len(rows) == len(records) == 18
    for row, record in zip(rows, records, strict=True):
        assert row["strategy"] == record["strategy"]
        assert float(row["mean_tpot_ms"]) == record["mean_tpot_ms"]
        assert row["cell.budget"] == ("" if record["cell"]["budget"] is None else str(record["cell"]["budget"]))
        assert "samples" not in row
    lines = [json.loads(line) for line in _content(outline, "study.jsonl").splitlines()]
    assert len(lines) == 74
    assert lines[0]["cell"] == json.loads((made / "request_rate" / "records.jsonl").read_text().splitlines()[0])["cell"]
    assert not any("samples" in line for line in lines)


def _content(outline: Outline, name: str) -> str:
    if name in outline.links:
        return urllib.parse.unquote(outline.links[name].partition(",")[2])
    return gzip.decompress(base64.b64decode(outline.links[f"{name}.gz"].partition(",")[2])).decode()


def test_csv_keeps_values_as_they_are():
    record = {
        "strategy": 'a,"b"\n=c',
        "x": 0.1 + 0.2,
        "flag": True,
        "none": None,
        "list": [1, "é"],
        "cell": {"x": "inf"},
        "samples": {"s": [1]},
    }
    (row,) = csv.DictReader(io.StringIO(as_csv([record])))
    assert row == {
        "strategy": 'a,"b"\n=c',
        "x": "0.30000000000000004",
        "flag": "true",
        "none": "",
        "list": json.dumps([1, "é"]),
        "cell.x": "inf",
    }


def test_the_same_directory_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        made_study.model_size(tmp_path / name)
    once, again = run(tmp_path / "one", tmp_path / "a.html"), run(tmp_path / "one", tmp_path / "b.html")
    assert once.read_bytes() == again.read_bytes()
    other = run(tmp_path / "two", tmp_path / "c.html").read_text()
    assert other == once.read_text().replace("kvjax.report one", "kvjax.report two")
    assert str(tmp_path) not in other


def test_the_figures_of_the_page_lie_beside_it(made):
    for name in ("pareto", "ledger"):
        assert (made / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (made / f"report-{name}.svg").read_text()


def test_a_figure_of_the_study_is_drawn_once(tmp_path):
    made_study.model_size(tmp_path)
    folder = tmp_path / "model_size"
    (folder / "own.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><circle r="7.25"/></svg>')
    (tmp_path / "STUDY.md").write_text("# Here\n\n![Sizes](model_size/own.svg)\n\nand again\n\n![Sizes](model_size/own.svg)\n")
    text = run(tmp_path).read_text()
    assert text.count("7.25") == 1
    assert text.count('id="study-figure-1"') == text.count('<a href="#study-figure-1">The figure of model_size, above</a>') == 1


def test_a_cell_measured_again_counts_once(tmp_path):
    first, last = made_study.offline("full", None), made_study.offline("full", None) | {"mean_tpot_ms": 9.5}
    made_study.records(tmp_path / "sparsity", "sparsity", [first, made_study.offline("h2o", 0.2), last])
    (experiment,) = read(tmp_path).experiments
    assert [r["mean_tpot_ms"] for r in experiment.records] == [9.5, 2.8]


def test_a_page_of_records_alone(tmp_path):
    """Without about.json, figures, STUDY.md, or two strategies to compare."""
    made_study.records(tmp_path / "own", "own", [made_study.lost("own", "full", {"strategy": "full"}, "failed", "no")])
    page = run(tmp_path).read_text()
    outline = Outline(page)
    assert "x-own" in outline.ids
    assert outline.elements["figure"] == 0
    assert "study" not in outline.ids


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: None, "no such directory: {d}; give the one that"),
        (lambda d: d.mkdir(), "nothing to report in {d}; it should hold <experiment>/records.jsonl"),
        (lambda d: d.write_text(""), "{d} is no directory"),
        (lambda d: _lines(d, '{"strategy": "fu\n\n'), "no whole record in {d}"),
        (lambda d: _lines(d, "[1, 2]\n"), "line 1, is no record of a study: a list, not an object"),
        (lambda d: _lines(d, '{"name": "kvjax", "version": 1}\n'), 'line 1, is no record of a study: no "strategy"'),
        (lambda d: _lines(d, '{"strategy": "full", "cell": 3}\n'), '"cell" is no object'),
        (lambda d: _lines(d, '{"strategy": "full"}\n', "{"), "x/about.json is no JSON"),
        (lambda d: _lines(d, '{"strategy": "full"}\n', "[]"), "x/about.json is a list, not an object"),
        (lambda d: _lines(d, '{"strategy": "full"}\n', '{"findings": "one"}'), '"findings" should be a list of sentences'),
        (lambda d: _lines(d, '{"strategy": "full"}\n', '{"panels": [{"key": "a"}]}'), '"panels" should be a list of objects with "key"'),
        (lambda d: _lines(d, '{"strategy": "full"}\n', '{"title": 3}'), '"title" should be text'),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, capsys, monkeypatch, make, says):
    directory = tmp_path / "results"
    make(directory)
    with pytest.raises(InputError, match=re.escape(says.format(d=directory))):
        read(directory)
    monkeypatch.setattr("kvjax.report.__main__.FLAGS", types.SimpleNamespace(output=None))
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(directory)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("kvjax: ")
    assert said.count("\n") == 1
    assert not directory.is_dir() or not list(directory.glob("report.html*"))


def _lines(directory, records: str, about: str | None = None) -> None:
    (directory / "x").mkdir(parents=True)
    (directory / "x" / "records.jsonl").write_text(records)
    if about is not None:
        (directory / "x" / "about.json").write_text(about)


def test_a_figure_outside_its_experiment_is_not_read(tmp_path):
    made_study.records(tmp_path / "x", "x", [made_study.offline("full", None)])
    (tmp_path / "secret.svg").write_text("<svg viewBox='0 0 1 1'><text>secret</text></svg>")
    (tmp_path / "x" / "about.json").write_text(json.dumps({"figures": [{"file": "../secret.svg"}]}))
    page = run(tmp_path).read_text()
    assert "<text>secret" not in page
    assert "x: its figure ../secret.svg is not there" in page


SVG = """<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10pt" height="5pt"
 viewBox="0 0 10 5" onload="a()"><style>*{fill:red}</style><script>a()</script><defs><path id="m" d="M 1.23456 2"/></defs>
<g id="g" style="fill: #0072b2; background: url(http://x/y.png); font-family: x; clip-path: url(#c)"><title>a &lt; b</title>
<use xlink:href="#m" onclick="a()"/><use xlink:href="http://x/y.svg#m"/><image href="http://x"/></g>
<a href="javascript:a()"><text>t</text></a><foreignObject><b/></foreignObject><text style="font: bold 8px Arial; fill: #000000"> a b </text>
</svg>"""


def test_an_svg_keeps_its_shapes_and_loses_what_runs_or_loads():
    found = inline(SVG, "p-", 'a "figure"')
    assert '<use href="#p-m" />' in found
    assert "<use />" in found
    for gone in ("script", "onload", "onclick", "http", "foreignObject", "javascript", "<image", "fill:red", "font-family"):
        assert gone not in found
    assert 'id="p-g" style="fill:var(--c-vllm);clip-path:url(#p-c)"' in found
    assert "font-weight:700;font-size:8px;fill:var(--ink)" in found
    assert 'd="M 1.23 2"' in found
    assert "<title>a &lt; b</title>" in found
    assert 'aria-label="a &quot;figure&quot;"' in found


@pytest.mark.parametrize("text", ["", "no xml <", "<html/>", '<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>'])
def test_what_is_no_svg_is_refused(text):
    with pytest.raises(InputError):
        inline(text, "p-", "")


def test_markdown_takes_over_no_html_and_no_script_link():
    html_text, headings = render(
        "# A\n\n## B `c`\n\n## B `c`\n\n<b>x</b> [l](javascript:a) [m](x/y.md) [n](http://e.org) ![i](p.png)\n\n| a |\n|---|\n| 1 |\n",
        image=lambda source, text: f"[{source} {text}]",
        anchor=lambda target: "#x" if target.startswith("x/") else None,
    )
    assert headings == [("study-b-c", "B c"), ("study-b-c-2", "B c")]
    assert '<h2 id="study-a">A</h2>' in html_text
    assert "&lt;b&gt;x&lt;/b&gt;" in html_text
    assert "javascript" not in re.findall(r"href=\"([^\"]*)", html_text)
    assert re.findall(r"href=\"([^\"]*)", html_text) == ["#x", "http://e.org"]
    assert "[p.png i]" in html_text
    assert '<div class="scroll"><table>' in html_text
