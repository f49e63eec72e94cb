"""One page that holds a whole study: figures beside the commands that made them, tables, the ledger, downloads. It loads nothing."""

import base64
import collections
import gzip
import hashlib
import importlib.resources
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from kvjax.errors import InputError
from kvjax.report import figures
from kvjax.report.fields import Record, finished, identity_of, number, under_load, value
from kvjax.report.html_data import Experiment, Figure, Results, as_csv, as_jsonl
from kvjax.report.html_markdown import render
from kvjax.report.html_svg import inline
from kvjax.report.html_table import outcome, swatch, table

PLAIN_LINK = 60_000
"""Characters; a longer download is compressed."""

LARGEST_PNG = 400_000
"""Bytes of an image that STUDY.md may bring along; figures that are SVG have no such limit."""

SETTING = (
    ("device_kind", "device"), ("cpu_count", "cores"), ("model_id", "models"), ("model_weights", "weights"),
    ("model_license", "licence"), ("dtype", "dtype"), ("python_version", "Python"),
    ("jax_version", "jax"), ("jaxlib_version", "jaxlib"), ("numpy_version", "numpy"), ("git_commit", "commit"),
)  # fmt: skip


def page(results: Results, stem: pathlib.Path | None = None) -> str:
    """The page. The same directory gives the same text.

    Args:
      stem: figures that no experiment has, drawn across them, are written to <stem>-pareto.svg, <stem>-ledger.png and so on, too.

    Raises OSError where they cannot be written.
    """
    notes = list(results.notes)
    sections = [_experiment(experiment, notes) for experiment in results.experiments]
    derived = _derived(results, stem)
    study, headings = _study(results, notes) if results.study else ("", [])
    contents: list[tuple[str, str, Sequence[tuple[str, str]]]] = [("overview", "Overview", [])]
    contents += [(name, title, []) for name, title, _ in derived]
    contents += [(_id(e), e.title, []) for e in results.experiments]
    contents += [("study", "STUDY.md", headings)] if study else []
    contents += [("downloads", "Downloads", [])]
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join([_overview(results, notes), *(html for _, _, html in derived), *sections, study, _downloads(results)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_title(results))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#overview">Skip to the overview</a>\n{_navigation(contents)}\n<main>\n{body}\n</main>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return importlib.resources.files("kvjax.report").joinpath(name).read_text("utf-8")


def _title(results: Results) -> str:
    models = _distinct(results.records, "model_id")
    return "KV-cache strategies compared" + (f" on {models[0]}" if len(models) == 1 else "")


def _navigation(contents: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    items = []
    for name, title, below in contents:
        inner = "".join(f'<li><a href="#{escape(n)}">{escape(t)}</a>' for n, t in below)
        items.append(f'<li><a href="#{escape(name)}">{escape(title)}</a>{f"<ul>{inner}</ul>" if inner else ""}')
    return (
        '<nav aria-label="Contents"><div class="bar"><a class="brand" href="#overview">kvjax<span>study</span></a>'
        '<button type="button" id="theme" aria-label="Switch between light and dark"><i></i><span>dark</span></button></div>'
        f'<details id="contents" open><summary>Contents</summary><ul>{"".join(items)}</ul></details></nav>'
    )


# ---------------------------------------------------------------------------------------------------------------------------- overview


def _overview(results: Results, notes: Sequence[str]) -> str:
    records = results.records
    outcomes = collections.Counter(outcome(r) for r in records)
    strategies = list(dict.fromkeys(map(_kind, records)))
    models = _distinct(records, "model_id")
    tiles = [("experiments", len(results.experiments), ""), ("strategies", len(strategies), ""), ("models", len(models), "")]
    tiles += [("cells measured", outcomes.pop("done", 0), ""), ("did not fit", outcomes.pop("infeasible", 0), "warn")]
    tiles += [("failed", sum(outcomes.values()), "bad")]
    shown = "".join(f'<li class="{kind if count else ""}"><b>{count:,}</b> {label}' for label, count, kind in tiles if count)
    findings = "".join(
        f'<li><a href="#{_id(e)}">{escape(e.title)}</a><p>{escape(e.findings[0])}</p>' for e in results.experiments if e.findings
    )
    quick = [e.title for e in results.experiments if e.quick]
    warning = ""
    if quick:
        which = "This is" if len(quick) == len(results.experiments) else f"“{escape('”, “'.join(quick))}”:"
        why = "a quick run, with few prompts and requests: it shows shapes, not figures to quote"
        warning = f'<p class="callout warn"><b>Quick.</b> {which} {why}.</p>'
    names = "".join(f"<li>{swatch(family + ('+' + variant if variant else ''), family)}" for family, variant in strategies)
    return (
        f'<section id="overview"><p class="eyebrow">kvjax study</p><h1>{escape(_title(results))}</h1>'
        '<p class="lead">Which KV-cache strategy to use for a model, a context, a request rate and a memory, and what it costs in latency, '
        "bytes and answers. Every figure stands beside the command that made it.</p>"
        f'<ul class="tiles">{shown}</ul>{warning}'
        + (f'<h2 class="minor">What came out</h2><ul class="findings">{findings}</ul>' if findings else "")
        + f'<h2 class="minor">Setting</h2>{_setting(results)}<ul class="strategies">{names}</ul>{_notes(notes)}</section>'
    )


def _setting(results: Results) -> str:
    records = results.records
    rows = []
    for key, label in SETTING:
        found = _distinct(records, key) or _distinct((e.setting for e in results.experiments), key)
        if found:
            rows.append((label, ", ".join(found)))
    dates = sorted(str(r["date"]) for r in records if r.get("date"))
    if dates:
        first, last = _date(dates[0]), _date(dates[-1])
        rows.append(("measured", first if first == last else f"{first} to {last}"))
    took = sum(number(r.get("seconds")) or 0 for r in records)
    if took:
        rows.append(("time of the cells", f"{took / 60:,.1f} minutes"))
    return '<dl class="setting">' + "".join(f"<div><dt>{escape(a)}<dd>{escape(b)}</div>" for a, b in rows) + "</dl>"


def _date(stamp: str) -> str:
    """`20261123-145928` as `2026-11-23 14:59 UTC`."""
    digits = stamp.replace("-", "")
    if len(digits) != 14 or not digits.isdigit():
        return stamp
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:8]} {digits[8:10]}:{digits[10:12]} UTC"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}" for note in notes)
    return f'<div class="callout"><b>Left out or missing</b><ul class="notes">{items}</ul></div>'


def _distinct(records: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(str(r[key]) for r in records if r.get(key) is not None))


# ------------------------------------------------------------------------------------------------------------------------- experiments


def _id(experiment: Experiment) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "-" for c in experiment.name)
    return f"x-{plain}"


def _experiment(experiment: Experiment, notes: list[str]) -> str:
    name = _id(experiment)
    parts = [f'<section id="{name}"><p class="eyebrow">Experiment</p><h2><a class="anchor" href="#{name}">{escape(experiment.title)}</a>']
    parts.append("<span class='badge warn'>quick</span></h2>" if experiment.quick else "</h2>")
    if experiment.question:
        parts.append(f'<p class="question">{escape(experiment.question)}</p>')
    if experiment.findings:
        parts.append('<ul class="prose">' + "".join(f"<li>{escape(sentence)}" for sentence in experiment.findings) + "</ul>")
    for index, figure in enumerate(experiment.figures):
        try:
            svg = _svg(experiment, figure)
        except InputError as error:
            notes.append(f"{experiment.name}: {figure.file}: {error}.")
            continue
        parts.append(_figure(svg, f"{name}-{index}", figure.caption or experiment.title, figure.command, bool(figure.caption)))
    if not experiment.figures and experiment.command:
        parts.append(_command(experiment.command))
    parts.append("<h3>Records</h3>")
    parts.append(table(experiment, name))
    if experiment.records:
        parts.append('<p class="links">' + _link(f"{experiment.name}.csv", "text/csv", "CSV", as_csv(experiment.records)) + "</p>")
    return "\n".join([*parts, "</section>"])


def _svg(experiment: Experiment, figure: Figure) -> str:
    """The figure's file; where it has none, drawn from the records."""
    if figure.file is not None:
        return (experiment.directory / figure.file).read_text("utf-8", errors="replace")
    x, scale = experiment.x, experiment.x_scale

    def draw(stem: pathlib.Path) -> None:
        figures.lines(
            experiment.records,
            x,
            experiment.x_label,
            experiment.panels,
            experiment.title,
            stem,
            series=experiment.series,
            x_scale=scale,
            formats=("svg",),
        )

    return _drawn(draw)


def _drawn(draw: Callable[[pathlib.Path], None]) -> str:
    """The SVG of what is drawn and not kept."""
    with tempfile.TemporaryDirectory() as directory:
        stem = pathlib.Path(directory) / "figure"
        draw(stem)
        return stem.with_suffix(".svg").read_text("utf-8")


def _figure(svg: str, name: str, caption: str, command: str, shown: bool = True) -> str:
    image = inline(svg, f"{name}-", caption)
    said = f"<figcaption>{escape(caption)}</figcaption>" if shown else ""
    return f'<figure id="fig-{name}"><div class="plot" tabindex="0">{image}</div>{said}{_command(command) if command else ""}</figure>'


def _command(command: str) -> str:
    return f'<div class="command"><code>{escape(command)}</code><button type="button" class="copy">copy</button></div>'


# --------------------------------------------------------------------------------------------- what is drawn from all the experiments


def _derived(results: Results, stem: pathlib.Path | None) -> list[tuple[str, str, str]]:
    """Quality against latency, and the ledger: each from the experiment and setting that has most strategies. (id, title, section)."""
    found = []
    for quality in ("task_recall", "fidelity_kld_mean"):
        if (chosen := _widest(results, ("mean_tpot_ms", quality), many=True)) is not None:
            question = "What does the quality of answers cost in time per token, and who gives most for it?"
            caption = (
                "A point is a strategy at a budget; its area is the memory of the cache on the device. Ringed points lie on the front, "
                "where no other is both faster and better. Point at one to see its name and figures."
            )
            found.append(_across("pareto", "Quality against latency", question, caption, chosen, figures.pareto, results, stem))
            break
    if (chosen := _widest(results, ("kv_device_live_bytes",), many=False)) is not None:
        question = "What does each strategy allocate, in which memory, and for what?"
        caption = "Every byte of the cache, counted from its arrays, on one scale for both tiers."
        experiment, setting, records = chosen
        shown = _one_budget(records)
        if len(shown) < len(records):
            caption += " Of a strategy that was measured at several budgets, one is shown."
        chosen = experiment, setting, shown
        found.append(_across("ledger", "Where the bytes are", question, caption, chosen, figures.ledger, results, stem))
    return found


def _across(
    name: str, title: str, question: str, caption: str, chosen, draw, results: Results, stem: pathlib.Path | None
) -> tuple[str, str, str]:
    experiment, setting, records = chosen
    command = f"python -m kvjax.report {_where(results.directory)}"
    if stem is None:
        svg = _drawn(lambda where: draw(records, where, formats=("svg",)))
    else:
        kept = stem.with_name(f"{stem.name}-{name}")
        draw(records, kept)
        svg = kept.with_name(kept.name + ".svg").read_text("utf-8")
    image = _figure(svg, name, f"From “{experiment.title}”: {setting}. {caption}", command)
    head = f'<p class="eyebrow">Across strategies</p><h2><a class="anchor" href="#{name}">{title}</a></h2>'
    return name, title, f'<section id="{name}">{head}<p class="question">{question}</p>{image}</section>'


def _widest(results: Results, keys: Sequence[str], many: bool) -> tuple[Experiment, str, list[Record]] | None:
    """The experiment and setting whose finished records have these keys for most kinds of strategies; None where fewer than two have.

    Args:
      many: prefer more budgets per kind to fewer.
    """
    groups: dict[tuple[str, str], tuple[Experiment, list[Record]]] = {}
    for experiment in results.experiments:
        for record in experiment.records:
            if finished(record) and all(number(record.get(key)) is not None for key in keys):
                groups.setdefault((experiment.name, _describe(record)), (experiment, []))[1].append(record)

    def rank(group: tuple[Experiment, list[Record]]) -> tuple[int, int]:
        names = {identity_of(r).label for r in group[1]}
        return len(set(map(_kind, group[1]))), len(names) if many else -len(names)

    if not groups:
        return None
    name = max(groups, key=lambda key: rank(groups[key]))
    experiment, records = groups[name]
    return (experiment, name[1], records) if rank((experiment, records))[0] > 1 else None


def _one_budget(records: Sequence[Record]) -> list[Record]:
    """Of each kind of strategy the records at one budget: the one most kinds were measured at, of equals the middle one."""
    kinds: dict[Any, dict[Any, list[Record]]] = {}
    for record in records:
        budget = number(value(record, "budget"))
        kinds.setdefault(_kind(record), {}).setdefault(budget, []).append(record)
    shared = collections.Counter(budget for budgets in kinds.values() for budget in budgets if budget is not None)
    most = sorted(budget for budget, count in shared.items() if count == max(shared.values()))
    common = most[len(most) // 2] if most else None
    chosen = [budgets.get(common) or list(budgets.values())[len(budgets) // 2] for budgets in kinds.values()]
    return [record for group in chosen for record in group]


def _kind(record: Record) -> tuple[str, str | None]:
    """A strategy, whatever its arguments."""
    identity = identity_of(record)
    return identity.family, identity.variant


def _describe(record: Record) -> str:
    """A record's setting in words: what two strategies have to share to be compared."""
    said = [str(value(record, "model_id") or value(record, "model") or "a model")]
    for key, pattern in (("input_len", "{} tokens of prompt"), ("output_len", "{} generated"), ("batch_size", "batch {}")):
        found = value(record, key)
        if found is not None:
            said.append(pattern.format(json.dumps(found) if isinstance(found, dict | list) else found))
    rate = value(record, "request_rate")
    said.append(f"{rate} requests/s" if under_load(record) or value(record, "measure") == "load" else "whole batches")
    for key in ("kv_memory", "mix", "case", "workload", "dtype"):
        found = value(record, key)
        if found is not None:
            said.append(f"{key.replace('_', ' ')} {found}")
    return ", ".join(said)


def _where(directory: pathlib.Path) -> str:
    """The directory as a command names it: relative to where the page is made or, from elsewhere, by its name."""
    whole = directory.resolve()
    try:
        return whole.relative_to(pathlib.Path.cwd()).as_posix()
    except ValueError:
        return whole.name


# ----------------------------------------------------------------------------------------------------------------------------- STUDY.md


def _study(results: Results, notes: list[str]) -> tuple[str, list[tuple[str, str]]]:
    shown: dict[str, str] = {}

    def image(source: str, text: str) -> str:
        """A figure the first time, then a link to it."""
        path = pathlib.PurePath(source)
        if source in shown:
            return f'<a href="#{shown[source]}">The figure of {escape(path.parts[0])}, above</a>'
        file = results.directory / path
        inside = not path.is_absolute() and ".." not in path.parts and "://" not in source
        vector = file.with_suffix(".svg")
        try:
            if inside and vector.is_file():
                name = f"study-figure-{len(shown) + 1}"
                drawn = inline(vector.read_text("utf-8"), f"{name}-", text)
                shown[source] = name
                return f'<span class="plot" id="{name}">{drawn}</span>'
        except InputError as error:
            notes.append(f"STUDY.md: {source}: {error}.")
        if inside and file.is_file() and file.suffix == ".png" and file.stat().st_size <= LARGEST_PNG:
            return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
        notes.append(f"STUDY.md: the image {source} is not among the results, or is too large for a page.")
        return f"<em>{escape(text or source)}</em>"

    def anchor(target: str) -> str | None:
        first = pathlib.PurePath(target).parts[:1]
        return next((f"#{_id(e)}" for e in results.experiments if first == (e.name,)), None)

    assert results.study is not None
    html, headings = render(results.study, image, anchor)
    return f'<section id="study"><p class="eyebrow">STUDY.md</p><div class="prose">{html}</div></section>', headings


# ---------------------------------------------------------------------------------------------------------------------------- downloads


def _downloads(results: Results) -> str:
    """Each record once as CSV, by experiment, whose columns differ, and once as JSONL."""
    every = [{"sweep": e.name, **r} for e in results.experiments for r in e.records]
    tables = " ".join(_csv(experiment) for experiment in results.experiments if experiment.records)
    whole = _link("study.jsonl", "application/x-ndjson", f"study.jsonl, {len(every)} cells", as_jsonl(every))
    return (
        '<section id="downloads"><h2><a class="anchor" href="#downloads">Downloads</a></h2>'
        f'<p class="links">Every record: {whole}</p><p class="links">As tables, an experiment each: see {tables}</p>'
        '<p class="same">The files lie in this page. They are without samples (a figure for each prompt or request), which are in each '
        "experiment's records.jsonl.</p></section>"
    )


def _csv(experiment: Experiment) -> str:
    """Where an experiment's table is to be had."""
    return f'<a class="jump" href="#{_id(experiment)}-records">{escape(experiment.name)}.csv</a>'


def _link(name: str, kind: str, label: str, text: str) -> str:
    """A link that holds the file: plain where it is short, else compressed."""
    if len(text) <= PLAIN_LINK:
        target = f"data:{kind};charset=utf-8,{quote(text, safe='(),=:.+-_/ ')}"
    else:
        name, label = f"{name}.gz", f"{label}, gzip"
        packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
        target = f"data:application/gzip;base64,{base64.b64encode(packed).decode()}"
    return f'<a class="download" download="{escape(name)}" href="{escape(target)}">{escape(label)}</a>'
