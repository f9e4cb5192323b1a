"""A Picture as SVG, by matplotlib. Colours are names of CSS properties, text stays text in the reader's own font.

Inline in the page a picture takes the page's colours, light or dark, and its legend is the page's. Alone in a file it
has fixed colours, a title and a legend of its own.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from tinyllama.report.numbers import FORMS
from tinyllama.report.palette import DARK, LIGHT, NAMES, SERIES, Theme
from tinyllama.report.picture import MUTED, Axis, Marks, Picture, Series

WIDTH, HEIGHT = 440, 285
FONT_SIZE = 12
TITLE, LEGEND_ROW, NOTE_ROW = 26, 17, 13  # points, around a picture that stands alone
HALF_A_LINE, NOTE_CHARACTERS = 28, 84
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (3, 1.5, 1, 1.5, 1, 1.5)),
    (0, (9, 3)),
)
MARKERS_IN_A_LINE = 15
MARK_SHAPES = {"spike": "v", "restart": None, "save": "|"}
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": FONT_SIZE,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
    "text.parse_math": False,
}
# matplotlib wants colours: each name of the palette travels as one that nothing else has.
CODES = {name: f"#0000{number:02x}" for number, name in enumerate(NAMES, 1)}


def series_color(number: int) -> str:
    """The name of a series' colour."""
    return "muted" if number == MUTED else f"s{number % SERIES}"


def dash(number: int) -> Any:
    """A line style. When the colours begin again, the styles are one further."""
    return DASHES[(number + number // SERIES) % len(DASHES)]


def svg(picture: Picture, theme: Literal["light", "dark"] | None = None, notes: bool = False) -> str:
    """The picture as an `<svg>` element; with a theme as a file of its own, which can hold its notes and then has paper."""
    lines = [line for note in picture.notes for line in textwrap.wrap(note, NOTE_CHARACTERS)] if theme and notes else []
    rows = math.ceil(len(picture.entries) / _columns(picture)) if len(picture.entries) > 1 else 0
    height = HEIGHT + (TITLE + LEGEND_ROW * rows + NOTE_ROW * len(lines) + 6 if theme else 0)
    with rc_context({**SETTINGS, "svg.hashsalt": picture.key}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        top, below = (TITLE, height - HEIGHT - TITLE) if theme else (0, 0)
        labels = 78 if picture.categories else 46
        low, high = below + labels, height - top - 10
        axes = figure.add_axes((0.14, low / height, 0.835, (high - low) / height))
        _draw(axes, picture)
        if theme:
            figure.text(0.02, 1 - top / 2 / height, picture.title, color=CODES["ink"], weight="bold", va="center")
            _legend(figure, picture, (NOTE_ROW * len(lines) + 2) / height)
            for number, line in enumerate(reversed(lines)):
                y = (NOTE_ROW * number + 5) / height
                figure.text(0.02, y, line, color=CODES["soft"], fontsize=FONT_SIZE - 2.5)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _rewrite(stream.getvalue(), picture, theme, notes)


def is_file(text: str) -> bool:
    """Whether a text is such a file."""
    head = text[:4096]
    return (
        head.startswith('<?xml version="1.0" encoding="utf-8"?>\n<svg') and "\n<title>" in head and "\n<desc>" in head
    )


def _draw(axes: Axes, picture: Picture) -> None:
    order = {entry: number for number, entry in enumerate(picture.entries)}
    _axis(axes, picture)
    for number, series in enumerate(picture.series):
        _series(axes, series, f"entry:{order[series.entry]}:{number}")
    for number, marks in enumerate(picture.marks):
        _marks(axes, marks, f"entry:{order[marks.label]}:m{number}")
    for label, y in picture.limits:
        axes.axhline(y, color=CODES["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            label, (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", color=CODES["soft"], fontsize=FONT_SIZE - 1.5,
        )  # fmt: skip
    _limits(axes, picture)


def _limits(axes: Axes, picture: Picture) -> None:
    for axis, change in ((picture.y, axes.set_ylim), (picture.x, axes.set_xlim)):
        low, high = axis.limits
        if low is not None and (axis.scale == "linear" or low > 0):
            change(low, None)
        if high is not None:
            change(None, high)
    if picture.categories:
        axes.set_xlim(-0.6, len(picture.categories) - 0.4)


def _axis(axes: Axes, picture: Picture) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(CODES["line"])
    axes.grid(True, axis="both" if not picture.categories else "y", color=CODES["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=CODES["soft"], which="both", length=3)
    axes.set_xlabel("" if picture.categories else picture.x.label, color=CODES["ink"])
    axes.set_ylabel(picture.y.label, color=CODES["ink"])
    _scale(axes, "x", picture.x, [v for s in picture.series for v in s.x])
    _scale(
        axes,
        "y",
        picture.y,
        [v for s in picture.series for v in (*s.y, *(s.low or ()), *(s.high or ())) if v is not None],
    )
    if picture.categories:
        axes.set_xticks(range(len(picture.categories)), picture.categories, rotation=35, ha="right")


def _scale(axes: Axes, which: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> None:
    part = axes.xaxis if which == "x" else axes.yaxis
    form = FORMS[axis.form]

    def text(value: float, _: int) -> str:
        if axis.form == "tokens":
            return form(value) if value else "0"
        if axis.form == "plain":
            return "0" if value == 0 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
        if axis.form == "percent":
            return f"{value:g}%"
        return f"${value:.6g}"

    positive = [v for v in values if v > 0]
    if axis.scale == "log" and positive:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        narrow = max(positive) < 30 * min(positive)
        part.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=7))
        part.set_minor_formatter(NullFormatter())
    else:
        part.set_major_locator(MaxNLocator(6 if which == "x" else 5, steps=[1, 2, 2.5, 5, 10]))
    if axis.ticks:
        part.set_major_locator(FixedLocator(axis.ticks))
        part.set_minor_locator(NullLocator())
    part.set_major_formatter(FuncFormatter(text))


def _series(axes: Axes, series: Series, gid: str) -> None:
    color = CODES[series_color(series.color)]
    y = [math.nan if value is None else value for value in series.y]
    if series.faint:
        axes.plot(series.x, y, color=color, alpha=0.28, linewidth=0.8, gid=gid, zorder=2)
        return
    for number, (low, high) in enumerate(((series.low, series.high), (series.x_low, series.x_high))):
        if low and high:
            known = [i for i in range(len(y)) if low[i] is not None and high[i] is not None]
            lows: list[Any] = [low[i] for i in known]
            highs: list[Any] = [high[i] for i in known]
            if number == 0:
                lines = axes.vlines(
                    [series.x[i] for i in known], lows, highs, color=color, linewidth=1.2, alpha=0.75, zorder=3
                )
            else:
                lines = axes.hlines(
                    [y[i] for i in known], lows, highs, color=color, linewidth=1.2, alpha=0.75, zorder=3
                )
            lines.set_gid(f"{gid}i{number}")
    axes.plot(
        series.x,
        y,
        color=color,
        linestyle=dash(series.dash) if series.line else "none",
        drawstyle="steps-post" if series.steps else "default",
        linewidth=1.8,
        marker=series.marker or ("o" if len(y) == 1 else None),
        markevery=max(1, len(y) // MARKERS_IN_A_LINE) if series.line else None,
        markersize=6,
        markerfacecolor=CODES["paper"] if series.hollow else color,
        markeredgecolor=color,
        markeredgewidth=1.4,
        gid=gid,
        zorder=4,
    )


def _mark_color(marks: Marks) -> str:
    return "alarm" if marks.kind == "spike" else "muted"


def _marks(axes: Axes, marks: Marks, gid: str) -> None:
    across = axes.get_xaxis_transform()
    color = CODES[_mark_color(marks)]
    if marks.kind == "restart":
        lines = axes.vlines(marks.x, 0, 1, transform=across, color=color, linewidth=1.2, linestyle=dash(2), zorder=1)
        lines.set_gid(gid)
        return
    height = 0.97 if marks.kind == "spike" else 0.015
    axes.plot(
        marks.x, [height] * len(marks.x), transform=across, linestyle="none", marker=MARK_SHAPES[marks.kind],
        color=color, markersize=6 if marks.kind == "spike" else 7, gid=gid, zorder=5, clip_on=False,
    )  # fmt: skip


SHAPES = {
    "o": '<circle cx="15" cy="6" r="3.6"/>',
    "s": '<rect x="11.6" y="2.6" width="6.8" height="6.8"/>',
    "^": '<path d="M15 1.8 19 9.4H11z"/>',
    "v": '<path d="M15 10.2 19 2.6H11z"/>',
    "D": '<path d="M15 1.4 19.6 6 15 10.6 10.4 6z"/>',
    "P": '<path d="M15 1.5V10.5M10.5 6H19.5" stroke-width="3"/>',
    "|": '<path d="M15 1.5V10.5"/>',
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """How a legend entry looks. dash: None where there is no line."""

    color: str
    dash: Any
    marker: str | None
    hollow: bool = False


def _sample(picture: Picture, entry: str) -> Sample:
    for marks in picture.marks:
        if marks.label == entry:
            return Sample(_mark_color(marks), dash(2) if marks.kind == "restart" else None, MARK_SHAPES[marks.kind])
    series = next(s for s in picture.series if s.entry == entry and not s.faint)
    return Sample(series_color(series.color), dash(series.dash) if series.line else None, series.marker, series.hollow)


def sample(picture: Picture, entry: str) -> str:
    """The line and the marker of a legend entry, as a small `<svg>`."""
    found = _sample(picture, entry)
    color, body = f"var(--{found.color})", ""
    if found.dash:
        dashes = "" if found.dash == "-" else f' stroke-dasharray="{" ".join(f"{1.6 * p:g}" for p in found.dash[1])}"'
        body = f'<path d="M0 6H30" stroke-width="2"{dashes}/>'
    if found.marker:
        fill = "var(--paper)" if found.hollow else color
        body += f'<g fill="{fill}" stroke-width="1.4">{SHAPES[found.marker]}</g>'
    return f'<svg viewBox="0 0 30 12" aria-hidden="true" fill="none" stroke="{color}">{body}</svg>'


def _columns(picture: Picture) -> int:
    """Of a legend below the picture."""
    return 2 if all(len(entry) <= HALF_A_LINE for entry in picture.entries) else 1


def _legend(figure: Figure, picture: Picture, bottom: float) -> None:
    if len(picture.entries) < 2:
        return
    lines = []
    for entry in picture.entries:
        found = _sample(picture, entry)
        color, style = CODES[found.color], found.dash or "none"
        face = CODES["paper"] if found.hollow else color
        lines.append(Line2D([], [], color=color, linestyle=style, marker=found.marker, markerfacecolor=face))
    labels = [textwrap.shorten(entry, 2 * HALF_A_LINE, placeholder="…") for entry in picture.entries]
    figure.legend(
        lines, labels, loc="lower left", bbox_to_anchor=(0.02, bottom), ncols=_columns(picture), frameon=False,
        labelcolor=CODES["ink"], fontsize=FONT_SIZE - 1.5, borderpad=0, borderaxespad=0.2, handlelength=2.6,
    )  # fmt: skip


_CODE = re.compile("|".join(CODES.values()))
_BY_CODE = {code: name for name, code in CODES.items()}
_FONT = re.compile(r"font-family: [^;\"]*")
_SHORTHAND = re.compile(r"font: ((?:bold |\d+ )*)([\d.]+px) ([^;\"]*)")  # of matplotlib before 3.11
_ENTRY = re.compile(r'<g id="entry:(\d+):\w+"')
_ID = re.compile(r'<g id="(?:figure|axes|patch|matplotlib\.axis|xtick|ytick|text|line2d|legend|LineCollection)_\d+"')
_LOCAL = re.compile(r'( id="|url\(#|xlink:href="#)(?=[mp][0-9a-f]{10})')
_PATH = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_DIGITS = re.compile(r"(\.\d{2})\d+")


def _rewrite(text: str, picture: Picture, theme: str | None, paper: bool) -> str:
    """matplotlib's file as an element: named colours, the reader's fonts, ids that no other picture of the page has."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _PATH.sub(lambda match: _DIGITS.sub(r"\1", match[0]), text)
    text = _ENTRY.sub(r'<g class="entry entry-\1"', text)
    text = _ID.sub("<g", text)
    text = _SHORTHAND.sub(
        lambda m: f"{f'font-weight: {m[1].strip()}; ' if m[1] else ''}font-size: {m[2]}; font-family: {m[3]}", text
    )
    text = _LOCAL.sub(rf"\g<1>{picture.key}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    if theme:
        values: Theme = LIGHT if theme == "light" else DARK
        text = _CODE.sub(lambda match: values[_BY_CODE[match[0]]], text)
        text = _FONT.sub("font-family: system-ui, sans-serif", text)
        words = f"<title>{escape(picture.title)}</title>\n<desc>{escape(picture.finding)}</desc>\n"
        if paper:
            words += f'<rect width="100%" height="100%" fill="{values["paper"]}"/>\n'
        at = text.index(">") + 1
        return f'<?xml version="1.0" encoding="utf-8"?>\n{text[:at]}\n{words}{text[at:]}'
    text = _CODE.sub(lambda match: f"var(--{_BY_CODE[match[0]]})", text)
    text = _FONT.sub("font-family: var(--font)", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@@">', text, count=1
    )
