"""Figures of a study, from its records: curves over a number, quality against latency, bytes by tier and purpose.

Every figure is written as PNG and as SVG. In the SVG text stays text, each point names itself in a <title>, and colours come from the fixed
set below, so that a page can put colours of its own in their place (kvjax.report.html_svg). The same records give the same bytes.
"""

import dataclasses
import io
import math
import pathlib
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvjax.cache.identity import Identity
from kvjax.files import replace
from kvjax.report.curves import Curve, Summary, by_strategy, curves, summary
from kvjax.report.fields import Record, finished, identity_of, number

Scale = Literal["linear", "log"]

INK, MUTED, GRID, PAPER = "#1f2328", "#69707a", "#e1e4e8", "#ffffff"
"""Text and axes, what stands back, grid lines, background."""

WIDTH = 7.2
"""Inches: two columns of a paper."""

DODGE = 0.09
"""Between series that stand at one name on x, which is 1 from the next."""

MIB = 2**20
FORMATS = ("svg", "png")
"""What a figure is written as."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      key: of the record; what is shown is `factor` times its value.
      better: which way is good, said in the panel.
    """

    key: str
    label: str
    scale: Scale = "linear"
    better: Literal["less", "more"] | None = None
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Style:
    """How a strategy looks in every figure: colour and marker say the family, line and filling the store."""

    color: str
    marker: str
    line: str = "-"
    filled: bool = True


FAMILIES = {
    "full": Style(INK, "o"),
    "vllm": Style("#0072B2", "s"),
    "h2o": Style("#D55E00", "^"),
    "streaming": Style("#E69F00", "v"),
    "infinigen": Style("#009E73", "D"),
    "infinigen_paper": Style("#117733", "d"),
    "offload": Style("#56B4E9", "P"),
    "oracle_topk": Style("#CC79A7", "X"),
}
"""Looks by family, in Okabe and Ito's colours, which the colour-blind can tell apart."""

OTHERS = Style("#8c6d31", "h")
OTHER_MARKERS = "h<>p8d"
"""Of strategies kvjax does not know; which marker, the name decides."""

STORES = {"paged": Style("", "", "--", False), "host": Style("", "", "-.", False)}

PURPOSES = (
    ("live", "keys and values", "#4c6478"),
    ("metadata", "metadata", "#b8862d"),
    ("fragmentation", "fragmentation", "#a3324a"),
    ("empty", "empty", "#c9ced6"),
)
"""Of bytes, in the order they are stacked."""

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvjax",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.constrained_layout.h_pad": 0.06,
}


def style(family: str, variant: str | None = None) -> Style:
    """The fixed look of a strategy, by its family and variant (kvjax.cache.Identity): h2o in pages has h2o's colour, dashed."""
    markers = OTHER_MARKERS[zlib.crc32(family.encode()) % len(OTHER_MARKERS)]
    look = FAMILIES.get(family, dataclasses.replace(OTHERS, marker=markers))
    if variant in STORES:
        return dataclasses.replace(look, line=STORES[variant].line, filled=False)
    return look


# ------------------------------------------------------------------------------------------------------------------------------- curves


def lines(
    records: Iterable[Record],
    x: str,
    x_label: str,
    panels: Sequence[Panel],
    title: str,
    stem: pathlib.Path,
    *,
    series: str = "strategy",
    x_scale: Scale = "linear",
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draws a panel a metric, a line a series, over `x`; writes stem.svg and stem.png.

    A point is the mean of its repeats, its whiskers their least and most. Infinity stands apart at the right and is not joined to the
    rest. A name on x (no number) is a place of its own, and points on it are not joined either. A series without a place on x is a level
    across the panel. A cell that failed or did not fit is a cross above it. On a log scale zero is drawn at the lower edge, which says so.

    Args:
      x: a key of the records or of their cells.
    """
    drawn = curves(records, x, series)
    places = sorted({p for c in drawn for p in c.points if isinstance(p, float) and math.isfinite(p)})
    names = list(dict.fromkeys(str(p) for c in drawn for p in c.points if isinstance(p, str)))
    axis_x = _Places(places, names, any(math.inf in c.points for c in drawn), x_scale if places and places[0] > 0 else "linear")
    looks = _looks([c.identity for c in drawn])
    lost = [[p for p, rs in c.points.items() if not any(map(finished, rs))] for c in drawn]
    rows = sum(map(bool, lost))
    columns = {1: 1, 2: 2, 3: 3, 4: 2}.get(len(panels), 3)
    height = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH if columns > 1 else 4.6, 2.35 * height + 0.9), layout="constrained")
        grid = figure.subplots(height, columns, squeeze=False)
        titles: dict[str, str] = {}
        for index, panel in enumerate(panels):
            axis = grid.flat[index]
            shown = [{p: s for p, rs in c.points.items() if (s := summary(rs, panel.key, panel.factor))} for c in drawn]
            floor = _floor(shown) if panel.scale == "log" else None
            for curve, look, found in zip(drawn, looks, shown, strict=True):
                beside = DODGE * (drawn.index(curve) - (len(drawn) - 1) / 2)
                _curve(axis, curve, look, found, axis_x, floor, titles, f"p{index}", (x_label, panel.label), beside)
            _finish(axis, panel, shown, floor)
            axis_x.finish(axis, x_label)
            _crosses(axis, drawn, looks, lost, axis_x, titles, f"lost{index}", x_label)
            if panel.better:
                arrow = "↓ less" if panel.better == "less" else "↑ more"
                axis.set_title(f"{arrow} is better", loc="right", fontsize=7, color=MUTED, pad=4 + 7 * rows)
        for axis in grid.flat[len(panels) :]:
            axis.set_visible(False)
        _legend(figure, drawn, looks, lost)
        _head(figure, title)
        _save(figure, stem, titles, formats)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where values of x stand: numbers at their value, infinity beyond them, names one after the other."""

    numbers: list[float]
    names: list[str]
    endless: bool
    scale: Scale

    def at(self, place: Any) -> float | None:
        """None for what has no place."""
        if isinstance(place, str):
            return self._after(1 + self.names.index(place)) if self.numbers else float(self.names.index(place))
        if place is None:
            return None
        return self._after(1) if math.isinf(place) else place

    def _after(self, steps: int) -> float:
        if not self.numbers:
            return float(steps)
        low, high = self.numbers[0], self.numbers[-1]
        if self.scale == "log":
            return high * max((high / low) ** 0.16, 1.3) ** steps
        return high + max(0.16 * (high - low), 0.1 * abs(high), 1e-9) * steps

    def finish(self, axis: Any, label: str) -> None:
        """Ticks at what was measured where that leaves room, else where matplotlib wants them."""
        axis.set_xlabel(label)
        if self.scale == "log":
            axis.set_xscale("log")
            axis.xaxis.set_minor_locator(NullLocator())
        ticks = self._roomy() or [t for t in axis.get_xticks() if self.numbers and self.numbers[0] <= t <= self.numbers[-1]]
        labels = [_tick(t) for t in ticks]
        if self.endless:
            ticks, labels = [*ticks, self.at(math.inf)], [*labels, "∞"]  # type: ignore[list-item]
        ticks, labels = [*ticks, *(self.at(name) for name in self.names)], [*labels, *map(_plain, self.names)]  # type: ignore[list-item]
        axis.set_xticks(ticks, labels)
        if self.names and not self.numbers:
            axis.set_xlim(-0.6, len(self.names) - 0.4)
            if sum(map(len, self.names)) > 24:
                axis.tick_params(axis="x", labelrotation=30)
                for text in axis.get_xticklabels():
                    text.set(ha="right", rotation_mode="anchor")
        elif len(self.numbers) > 1 and not self.names:
            last = self._after(1) if self.endless else self.numbers[-1]
            low, high = (math.log(end) if self.scale == "log" else end for end in (self.numbers[0], last))
            ends = (low - 0.05 * (high - low), high + 0.05 * (high - low))
            axis.set_xlim(*(map(math.exp, ends) if self.scale == "log" else ends))
        elif len(self.numbers) == 1 and not self.endless:
            axis.set_xlim(*(self.numbers[0] * f if self.numbers[0] else s for f, s in ((0.5, -1), (2, 1))))

    def _roomy(self) -> list[float]:
        """The measured places that do not crowd each other, the first and the last among them if any."""
        if not self.numbers:
            return []
        where = [math.log(n) for n in self.numbers] if self.scale == "log" else self.numbers
        widths = [0.035 * len(_tick(n)) for n in self.numbers]  # of the axis, in a grid of three columns
        kept = [0]
        for index in range(1, len(where)):
            gap = max(0.085, 0.01 + (widths[index] + widths[kept[-1]]) / 2)
            if where[index] - where[kept[-1]] >= gap * (where[-1] - where[0]):
                kept.append(index)
        return [self.numbers[i] for i in kept]


def _looks(strategies: Sequence[Identity]) -> list[dict[str, Any]]:
    """What matplotlib draws each strategy with. Those that would look the same grow paler, one after the other."""
    styles = [style(one.family, one.variant) for one in strategies]
    looks = []
    for index, look in enumerate(styles):
        before, count = styles[:index].count(look), styles.count(look)
        alpha = 1.0 if count == 1 else 1 - 0.65 * before / (count - 1)
        face = look.color if look.filled != bool(before % 2) else PAPER
        line = dict(color=look.color, linestyle=look.line, alpha=alpha)
        looks.append(line | dict(marker=look.marker, markerfacecolor=face, markeredgewidth=1.0))
    return looks


def _curve(
    axis, curve: Curve, look, found: dict[Any, Summary], places: _Places, floor, titles: dict[str, str], where: str, labels, beside
) -> None:
    line = {key: look[key] for key in ("color", "linestyle", "alpha")}
    point = {key: look[key] for key in ("color", "marker", "alpha", "markerfacecolor", "markeredgewidth")}
    joined = [(places.at(p), _at_least(s.mean, floor)) for p, s in found.items() if isinstance(p, float) and math.isfinite(p)]
    axis.plot([a for a, _ in joined], [b for _, b in joined], **line, zorder=2)
    for place, seen in found.items():
        say = f"{curve.label}, {labels[0]} {_say(place)}: {labels[1]} {seen}"
        gid = f"{where}-{len(titles)}"
        titles[gid] = say
        across = places.at(place)
        if across is None:
            titles[gid] = f"{curve.label}: {labels[1]} {seen}"
            axis.axhline(_at_least(seen.mean, floor), **line, linewidth=1.0, zorder=1.5, gid=gid)
            continue
        across += beside if isinstance(place, str) else 0.0
        if seen.count > 1:
            ends = [_at_least(seen.low, floor), _at_least(seen.high, floor)]
            axis.plot([across] * 2, ends, color=look["color"], alpha=look["alpha"], linewidth=0.9, marker="_", markersize=4, zorder=2.2)
        axis.plot([across], [_at_least(seen.mean, floor)], linestyle="none", **point, zorder=3, clip_on=False, gid=gid)


def _crosses(axis, drawn, looks, lost, places: _Places, titles: dict[str, str], where: str, x_label: str) -> None:
    """A row of crosses above the panel for each strategy that has cells without figures."""
    rows = 0
    for curve, look, gone in zip(drawn, looks, lost, strict=True):
        cross = dict(color=look["color"], alpha=look["alpha"], marker="x", markersize=4.5, markeredgewidth=1.2, clip_on=False)
        for place in gone:
            gid = f"{where}-{len(titles)}"
            titles[gid] = f"{curve.label}, {x_label} {_say(place)}: {_why(curve.points[place])}"
            across, transform = places.at(place), axis.get_xaxis_transform()
            if across is None:
                across, transform = 0.0, axis.transAxes
            axis.plot([across], [1.035 + 0.05 * rows], transform=transform, gid=gid, **cross)
        rows += bool(gone)


def _floor(shown: Sequence[Mapping[Any, Summary]]) -> float | None:
    """Where a log scale shows what is not above zero; None where there is no such thing, or nothing else."""
    means = [s.low for found in shown for s in found.values()] + [s.mean for found in shown for s in found.values()]
    above = [m for m in means if m > 0]
    return min(above) / 4 if above and len(above) < len(means) else None


def _at_least(y: float, floor: float | None) -> float:
    return y if floor is None or y > 0 else floor


def _finish(axis, panel: Panel, shown: Sequence[Mapping[Any, Summary]], floor: float | None) -> None:
    """Scale, limits and ticks of y. A linear scale begins at zero unless something lies below."""
    axis.set_ylabel(textwrap.fill(_plain(panel.label), 34) + ("\nlog scale" if panel.scale == "log" else ""))
    summaries = [s for found in shown for s in found.values()]
    if not summaries:
        axis.text(0.5, 0.5, "no finished cell has this", transform=axis.transAxes, ha="center", va="center", color=MUTED)
        axis.set_yticks([])
        return
    if panel.scale == "linear":
        if min(s.low for s in summaries) >= 0:
            most = max(s.high for s in summaries)
            axis.set_ylim(0, 1.06 * most if most else 1)
        return
    if max(s.high for s in summaries) <= 0:
        return
    axis.set_yscale("log")
    low = min(s.low for s in summaries if s.low > 0) if any(s.low > 0 for s in summaries) else min(s.mean for s in summaries if s.mean > 0)
    high = max(s.high for s in summaries)
    bottom = floor if floor is not None else low
    axis.set_ylim(bottom / 1.25, high * 1.25)
    decades = math.log10(high / bottom)
    axis.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.9 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,))
    )
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if 1e-4 <= y < 1e5 else f"{y:.0e}".replace("e-0", "e-")))
    if floor is not None:
        ticks = [t for t in axis.yaxis.get_majorticklocs() if 1.6 * floor < t <= high * 1.25]
        axis.yaxis.set_major_locator(FixedLocator([floor, *ticks]))
        plain = axis.yaxis.get_major_formatter()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, i: "0" if math.isclose(y, floor) else plain(y, i)))
        axis.axhline(1.6 * floor, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)


def _legend(figure: Figure, drawn: Sequence[Curve], looks: Sequence[Mapping[str, Any]], lost: Sequence[Sequence[Any]]) -> None:
    """Below the panels, where it hides nothing; under it, what points and crosses mean."""
    if not drawn:
        return
    levels = [set(curve.points) == {None} for curve in drawn]
    handles = [Line2D([], [], **({**look, "marker": ""} if level else look)) for level, look in zip(levels, looks, strict=True)]
    names = [_plain(curve.label) for curve in drawn]
    longest = max(map(len, names))
    columns = max(1, min(len(names), 5, int(figure.get_figwidth() * 17 / (longest + 7))))
    counts = {len(list(filter(finished, rs))) for curve in drawn for rs in curve.points.values()} - {0}
    notes = []
    if counts and max(counts) > 1:
        repeats = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        notes.append(f"Points are means of {repeats} repeats, whiskers their least and most.")
    if any(lost):
        notes.append("A cross above a panel: did not fit, or failed.")
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, columnspacing=1.6, title=" ".join(notes) or None)
    legend.get_title().set(fontsize=7, color=MUTED)


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")


# ------------------------------------------------------------------------------------------------------------ quality against latency


def pareto(
    records: Iterable[Record],
    stem: pathlib.Path,
    *,
    latency: Panel | None = None,
    quality: Panel | None = None,
    size: str = "kv_device_total_bytes",
    title: str = "Quality against latency",
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draws every strategy once: latency to the right, quality upwards, bytes as the area of the point; writes stem.svg and stem.png.

    The line is the front: what lies on it is beaten by nothing in both. Strategies that only differ in their budget are joined.

    Args:
      quality: recall of facts where a record has it, else the divergence from the full cache.
      size: key of the bytes; a record without it gets the smallest point.
    """
    chosen = [r for r in records if finished(r)]
    recalled = any(number(r.get("task_recall")) is not None for r in chosen)
    along = latency or Panel("mean_tpot_ms", "mean time per output token (ms)", better="less")
    told = Panel("task_recall", "facts recalled (%)", better="more", factor=100)
    diverged = Panel("fidelity_kld_mean", "KLD to the full cache (nats)", "log", "less")
    upward = quality or (told if recalled else diverged)
    points = []
    for (name, extra), mine in by_strategy(chosen).items():
        a, b = summary(mine, along.key, along.factor), summary(mine, upward.key, upward.factor)
        if a is not None and b is not None:
            points.append((name, extra, a, b, summary(mine, size), identity_of(mine[0])))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
        axis = figure.subplots()
        titles: dict[str, str] = {}
        floor = _floor([{i: p[3] for i, p in enumerate(points)}]) if upward.scale == "log" else None
        most = max((p[4].mean for p in points if p[4]), default=0.0)
        joined_points: dict[Any, list[tuple[float, float]]] = {}
        places = [(p[2].mean, _at_least(p[3].mean, floor)) for p in points]
        on_front = front([(p[2].mean, p[3].mean) for p in points], upward.better == "more")
        for index, ((name, extra, a, b, held, identity), (across, up)) in enumerate(zip(points, places, strict=True)):
            kind = identity.family, identity.variant
            look = style(*kind)
            joined_points.setdefault((kind, extra), []).append((across, up))
            if max(a.count, b.count) > 1:
                axis.plot([a.low, a.high], [up, up], color=look.color, linewidth=0.8, alpha=0.7, zorder=2)
                axis.plot([across] * 2, [_at_least(b.low, floor), _at_least(b.high, floor)], color=look.color, linewidth=0.8, alpha=0.7)
            gid = f"point-{index}"
            bytes_held = f"; {held.mean / MIB:.4g} MiB" if held else ""
            titles[gid] = f"{name}{', ' + extra if extra else ''}: {along.label} {a}; {upward.label} {b}{bytes_held}"
            axis.plot(
                [across], [up], linestyle="none", marker="o", markersize=_diameter(held.mean if held else 0.0, most), color=look.color,
                alpha=0.75, markeredgecolor=INK if index in on_front else PAPER, markeredgewidth=1.1 if index in on_front else 0.6,
                zorder=3, gid=gid,
            )  # fmt: skip
        for (kind, _), joined in joined_points.items():
            across_all, up_all = zip(*sorted(joined), strict=True)
            axis.plot(across_all, up_all, color=style(*kind).color, linewidth=0.7, alpha=0.5, zorder=1)
        steps = sorted(places[i] for i in on_front)
        axis.plot([a for a, _ in steps], [b for _, b in steps], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), drawstyle="steps-post")
        found = [{i: p[3] for i, p in enumerate(points)}]
        _finish(axis, upward, found, floor)
        if upward.key == "task_recall" and points:
            axis.set_ylim(-4, 108)
        if points:
            _finish_latency(axis, along, [p[2] for p in points])
        axis.set_title(f"{'up' if upward.better == 'more' else 'down'} and to the left is better", loc="right", fontsize=7, color=MUTED)
        _name_front(axis, [(points[i][0], places[i]) for i in sorted(on_front)])
        _pareto_legend(figure, list(dict.fromkeys(p[5].family for p in points)), most)
        _head(figure, title)
        _save(figure, stem, titles, formats)


def front(points: Sequence[tuple[float, float]], more: bool) -> set[int]:
    """Which of (latency, quality) are beaten by no other: none is as good in both and better in one."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        better_quality, worse_quality = (one[1] > other[1], one[1] < other[1]) if more else (one[1] < other[1], one[1] > other[1])
        return one[0] <= other[0] and not worse_quality and (one[0] < other[0] or better_quality)

    return {i for i, mine in enumerate(points) if not any(beats(other, mine) for other in points)}


def _diameter(size: float, most: float) -> float:
    """Points: the area is in proportion to the bytes, with a least diameter that can still be seen."""
    return max(3.5, 22 * math.sqrt(size / most)) if most else 7.0


def _name_front(axis, named: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Names below the points of the front, or above where the axis ends; points that lie together share a label, labels make way."""
    box = axis.get_window_extent()
    scale = 72 / axis.figure.dpi
    together: list[tuple[list[str], tuple[float, float]]] = []
    for name, place in named:
        spot = scale * axis.transData.transform(place)
        for names, other in together:
            if all(abs(a - b) < 5 for a, b in zip(spot, other, strict=True)):
                names.append(name)
                break
        else:
            together.append(([name], tuple(spot)))
    taken: list[tuple[float, float, float, float]] = []
    for names, (across, up) in sorted(together, key=lambda entry: entry[1]):
        right = across > scale * (box.x0 + 0.6 * box.width)
        width, height = 3.7 * max(map(len, names)), 8.5 * len(names)
        left = across - 9 - width if right else across + 9
        bottom = up - 7.0 - height
        above = bottom < scale * box.y0  # no room below
        if above:
            bottom = up + 7.0
        while any(left < r and x < left + width and bottom < t and y < bottom + height for x, y, r, t in taken):
            bottom += 4 if above else -4
        taken.append((left, bottom, left + width, bottom + height))
        text = _plain("\n".join(names))
        axis.annotate(
            text, axis.transData.inverted().transform((across / scale, up / scale)), xytext=(-9 if right else 9, bottom + height - up),
            textcoords="offset points", fontsize=6.5, color=INK, ha="right" if right else "left", va="top", zorder=4, linespacing=1.25,
        )  # fmt: skip


def _finish_latency(axis, panel: Panel, found: Sequence[Summary]) -> None:
    low, high = min(s.low for s in found), max(s.high for s in found)
    axis.set_xlabel(panel.label)
    if low > 0 and high / low > 12:
        axis.set_xscale("log")
        axis.set_xlabel(f"{panel.label}, log scale")
        axis.set_xlim(low / 1.4, high * 1.6)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        axis.set_xlim(0, 1.12 * high if high > 0 else 1)


def _pareto_legend(figure: Figure, families: Sequence[str], most: float) -> None:
    handles = [Line2D([], [], linestyle="none", marker="o", markersize=6, color=style(name).color, alpha=0.85) for name in families]
    names = [_plain(name) for name in families]
    if not families:
        return
    handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2))))
    figure.legend(handles, [*names, "front"], loc="outside right upper", labelspacing=0.7, borderpad=1.6)
    if most:
        shares = (1.0, 0.25)
        circles = [Line2D([], [], linestyle="none", marker="o", markersize=_diameter(s * most, most), color=GRID) for s in shares]
        sizes = [_size(share * most) for share in shares]
        legend = figure.legend(circles, sizes, loc="lower right", labelspacing=2.2, borderpad=2.2, title="area: cache\non the device")
        legend.get_title().set(fontsize=7, color=MUTED)


# ------------------------------------------------------------------------------------------------------------------------- the ledger


def ledger(
    records: Iterable[Record],
    stem: pathlib.Path,
    *,
    title: str = "Bytes of the cache, by tier and purpose",
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draws where the bytes of each strategy's cache are, device and host side by side on one scale; writes stem.svg and stem.png."""
    chosen = [r for r in records if finished(r) and number(r.get("kv_device_live_bytes")) is not None]
    bars = {f"{name}, {extra}" if extra else name: mine for (name, extra), mine in by_strategy(chosen).items()}
    tiers = ["device"] + ["host"] * any(number(r.get("kv_host_total_bytes")) for r in chosen)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.24 * max(len(bars), 2)), layout="constrained")
        axes = figure.subplots(1, len(tiers), squeeze=False, sharey=True, sharex=True)[0]
        titles: dict[str, str] = {}
        most = 0.0
        for axis, tier in zip(axes, tiers, strict=True):
            for row, (name, mine) in enumerate(bars.items()):
                left = 0.0
                for purpose, label, colour in PURPOSES:
                    found = summary(mine, f"kv_{tier}_{purpose}_bytes", 1 / MIB)
                    if found is None or not found.mean:
                        continue
                    gid = f"bar-{tier}-{row}-{purpose}"
                    titles[gid] = f"{name}, {tier}: {_size(found.mean * MIB)} of {label}"
                    axis.barh(row, found.mean, left=left, height=0.68, color=colour, gid=gid)[0].set_gid(gid)
                    left += found.mean
                most = max(most, left)
                axis.annotate(
                    _size(left * MIB) if left else "-", (left, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                    color=INK if left else MUTED,
                )  # fmt: skip
            axis.set_xlabel(f"{tier} memory (MiB)")
            axis.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(bars)), [_plain(name) for name in bars])
        for axis in axes:
            axis.tick_params(axis="y", length=0)
        axes[0].set_ylim(max(len(bars), 1) - 0.45, -0.55)
        axes[0].set_xlim(0, 1.3 * most or 1)
        handles = [Patch(color=colour, label=label) for _, label, colour in PURPOSES]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(PURPOSES))
        _head(figure, title)
        _save(figure, stem, titles, formats)


# ----------------------------------------------------------------------------------------------------------------------------- helpers


def _size(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    unit = min(int(math.log(size, 1024)), 3) if size >= 1 else 0
    amount = size / 1024**unit
    return f"{size:.0f} B" if unit == 0 else f"{amount:.{0 if amount >= 100 else 1}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _tick(place: float) -> str:
    """1017216 -> '1.02M'."""
    return f"{place / 1e6:.3g}M" if place >= 1e6 else f"{place:,.10g}"


def _plain(text: str) -> str:
    """Text that matplotlib neither typesets nor leaves out of a legend."""
    plain = text.replace("\\", "\\\\").replace("$", r"\$") if "$" in text else text
    return " " + plain if plain.startswith("_") else plain


def _say(place: Any) -> str:
    if isinstance(place, float):
        return "∞" if math.isinf(place) else f"{place:,.10g}"
    return str(place)


def _why(records: Sequence[Record]) -> str:
    """What became of a cell that has no figures."""
    first = records[-1]
    outcome = {"infeasible": "does not fit"}.get(str(first.get("outcome")), "failed" if first.get("outcome") != "done" else "incomplete")
    return f"{outcome}: {first['error']}" if first.get("error") else outcome


def _save(figure: Figure, stem: pathlib.Path, titles: Mapping[str, str], formats: Sequence[str]) -> None:
    """Writes stem.svg, with a <title> for each named artist, and stem.png. Neither holds a date."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if "png" in formats:
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200, metadata={"Software": None})
        replace(stem.with_name(stem.name + ".png"), image.getvalue())
    if "svg" not in formats:
        return
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    for gid, title in titles.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(title, quote=False)}</title>', 1)
    replace(stem.with_name(stem.name + ".svg"), svg)
