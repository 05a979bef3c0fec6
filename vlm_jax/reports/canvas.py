# SPDX-License-Identifier: Apache-2.0
"""Figures with a CSV of the same data: every mark is drawn and recorded by the same call."""

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_jax import files
from vlm_jax.reports.colors import require_matplotlib
from vlm_jax.reports.svg import slim

# One column of print is 89 mm = 3.5 inches; at this width 7 to 8 point stays readable on paper
# and on a phone.
COLUMN_INCHES = 3.5
STYLE = {
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.3,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.dpi": 220,
    # Text stays text, half of the bytes; no usual font is wider than the one that is laid out.
    "svg.fonttype": "none",
}
LABEL = 1 / 11.5  # of a logarithmic axis, between labels that do not touch
COLUMNS = ("series", "kind", "x", "y", "low", "high", "N_billions", "V", "Q", "flops", "label")


@dataclass(frozen=True)
class Figure:
    """One finished figure: its files, caption and alternative text; `png` may not be drawn."""

    name: str
    title: str
    caption: str
    alt: str
    png: Path | None
    svg: Path
    csv: Path
    section: str = ""  # the family it shows; "" is all families

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.png, self.svg, self.csv) if path]


@dataclass(frozen=True)
class Output:
    """The folder of figures, and whether each is there as PNG too, two fifths of drawing's time."""

    folder: Path
    png: bool = True


class Canvas:
    """One pair of axes, or several alike; what is drawn is exactly what `save` writes to the CSV.

    `x` and `y` are axis labels with units. Columns of the CSV are COLUMNS: x and y of each mark,
    low and high of its bar or band, and the N (billions), V, Q it stands for where they apply.
    With `panels` there are axes for each of these titles, of one scale, in rows of `across`; what
    is drawn goes to the one that `turn_to` chose last.
    """

    def __init__(
        self,
        *,
        x: str,
        y: str,
        title: str,
        height: int | float = 2.75,
        panels: Sequence[str] = (),
        across: int = 3,
    ):
        self.matplotlib = require_matplotlib()
        self.title, self.rows, self.labels, self.extras, self.marks = title, [], [], [], []
        with self.matplotlib.rc_context(STYLE):
            self.figure = self.matplotlib.figure.Figure(
                (COLUMN_INCHES, height), layout="constrained"
            )
            # Texts are measured before saving.
            self.matplotlib.backends.backend_agg.FigureCanvasAgg(self.figure)
            if panels:
                rows = -(-len(panels) // across)
                grid = self.figure.subplots(rows, across, sharex=True, sharey=True).ravel()
                self.panels = list(grid[: len(panels)])
                for axes, name in zip(self.panels, panels, strict=True):
                    name = "\n".join(textwrap.wrap(name, 16))
                    axes.set_title(name, fontsize=7, fontweight="normal", pad=2)
                for axes in grid[len(panels) :]:
                    axes.set_axis_off()
                    axes.tick_params(labelbottom=True)  # rows as far apart above an empty place
                for axes in self.panels[(rows - 1) * across :]:
                    axes.set_xlabel(x)
                self.figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, fontweight="bold")
                self.figure.supylabel(y, fontsize=8)
            else:
                self.panels = [self.figure.add_subplot()]
                self.panels[0].set(xlabel=x, ylabel=y, title=title)
            self.axes = self.panels[0]
            for axes in self.panels:
                axes.grid(True, axis="y", color="0.9", linewidth=0.5)
                axes.set_axisbelow(True)

    def turn_to(self, panel: int) -> None:
        """What follows is drawn in the panel of this number."""
        self.axes = self.panels[panel]

    def shadow(self, x, y) -> None:
        """A pale copy of a curve of another panel, which is in the CSV there."""
        self.axes.plot(x, y, color="0.85", linewidth=0.8, zorder=1)

    def note(self, series: str, kind: str, x, *, y=None, low=None, high=None, **extra) -> None:
        """Writes marks into the CSV; arrays are taken element by element, scalars are repeated."""
        x = np.atleast_1d(np.asarray(x, object))
        columns = {"x": x, "y": y, "low": low, "high": high} | extra
        filled = {
            key: np.broadcast_to(np.asarray("" if value is None else value, object), x.shape)
            for key, value in columns.items()
        }
        for i in range(len(x)):
            row = {key: value[i] for key, value in filled.items()}
            self.rows.append({"series": series, "kind": kind} | row)

    def line(self, series: str, x, y, *, color="black", dash="-", name=None, **extra) -> None:
        """A curve; `name` puts it into the legend."""
        self.axes.plot(x, y, dash, color=color, label=name, linewidth=1.3, zorder=2)
        self.note(series, "line", x, y=y, **extra)

    def band(self, series: str, x, low, high, *, color="black", name=None, **extra) -> None:
        """A shaded interval between `low` and `high`."""
        self.axes.fill_between(
            x, low, high, color=color, alpha=0.15, linewidth=0, label=name, zorder=1
        )
        self.note(series, "band", x, low=low, high=high, **extra)

    def points(
        self,
        series: str,
        x,
        y,
        *,
        stderr=None,
        color="black",
        marker="o",
        area=22.0,
        name=None,
        hollow=False,
        **extra,
    ) -> None:
        """Measured points with bars of one standard error where `stderr` is known (not NaN)."""
        x, y = np.asarray(x, float), np.asarray(y, float)
        stderr = np.full(y.shape, np.nan) if stderr is None else np.asarray(stderr, float)
        known = np.isfinite(stderr)
        if known.any():
            self.axes.errorbar(
                x[known],
                y[known],
                stderr[known],
                fmt="none",
                ecolor=color,
                elinewidth=0.8,
                zorder=3,
            )
        self.axes.scatter(
            x,
            y,
            s=area,
            marker=marker,
            label=name,
            zorder=4,
            linewidths=0.9 if hollow else 0.4,
            facecolors="none" if hollow else [color],
            edgecolors=[color if hollow else "white"],
        )
        self.marks += zip(x, y, strict=True)
        low, high = (np.where(known, y + sign * stderr, None) for sign in (-1, 1))
        self.note(series, "point", x, y=y, low=low, high=high, **extra)

    def bars(
        self, series: str, x, y, *, width, stderr=None, color="black", hatch="", name=None, **extra
    ):
        """Vertical bars from zero, with one standard error if known and the value on top."""
        x, y = np.asarray(x, float), np.asarray(y, float)
        stderr = np.full(y.shape, np.nan) if stderr is None else np.asarray(stderr, float)
        known = np.isfinite(stderr)
        self.axes.bar(
            x, y, width, color=color, hatch=hatch, edgecolor="white", linewidth=0.6, label=name
        )
        if known.any():
            self.axes.errorbar(
                x[known], y[known], stderr[known], fmt="none", ecolor="0.25", elinewidth=0.8
            )
        low, high = (np.where(known, y + sign * stderr, None) for sign in (-1, 1))
        self.note(series, "bar", x, y=y, low=low, high=high, **extra)

    def write(self, text: str, x: int | float, y: int | float, *, color="black") -> None:
        """A text to the right of a mark, moved up when saving if it would cover another one."""
        red, green, blue, _ = self.matplotlib.colors.to_rgba(color)
        # Light colors that serve for marks are too pale for thin letters.
        dark = (0.65 * red, 0.65 * green, 0.65 * blue)
        self.labels.append(
            self._annotate(text, x, y, dark, 7.5, xytext=(5, 0), ha="left", va="center")
        )

    def write_above(self, text: str, x: int | float, y: int | float, *, size=6.8, gap=1.5) -> None:
        """A text above a mark, left out if it would cover another mark or an earlier text."""
        self.extras.append(
            self._annotate(text, x, y, "0.25", size, xytext=(0, gap), ha="center", va="bottom")
        )

    def _annotate(self, text, x, y, color, size, **placing):
        from matplotlib import patheffects

        halo = [patheffects.withStroke(linewidth=1.8, foreground="white")]
        return self.axes.annotate(
            text,
            (x, y),
            textcoords="offset points",
            color=color,
            fontsize=size,
            path_effects=halo,
            zorder=6,
            annotation_clip=False,
            **placing,
        )

    def log_x(self, *, base10: bool = True, ticks=None, unit: str = "") -> None:
        """A logarithmic x axis: metric prefixes before `unit`, or exactly the given `ticks`."""
        from matplotlib import ticker

        axis = self.axes.xaxis
        self.axes.set_xscale("log", base=10 if base10 else 2)
        axis.set_minor_formatter(ticker.NullFormatter())
        if ticks is not None:
            ticks = few_of(ticks)
            self.axes.set_xticks(list(ticks), [f"{t:g}" for t in ticks])
            self.axes.minorticks_off()
            return
        low, high = self.axes.get_xlim()
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), np.arange(10, 100) / 10):
            marks = np.multiply.outer(decades, steps).ravel()
            marks = marks[(marks >= low) & (marks <= high)]
            if len(marks) >= 3:
                break
        # An axis too narrow for a tick (every row costs the same) labels its ends.
        marks = marks if len(marks) else np.array([low, high])
        kept = marks[:1]
        for mark in marks[1:]:  # labels must not touch: a seventh of the axis is the widest one
            if np.log(mark / kept[-1]) > np.log(high / low) / 7:
                kept = np.append(kept, mark)
        self.axes.set_xticks(kept)
        axis.set_major_formatter(ticker.EngFormatter(unit, sep=""))

    def sample(self, name: str, *, area: int | float = 22.0, dash: str = "", band=False) -> None:
        """A gray mark, or with `dash` a line, that the legend alone shows: what a style means."""
        if dash:
            self.axes.plot([], [], dash, color="0.45", label=name, linewidth=1.3)
        else:
            self.axes.scatter([], [], s=area, color="0.45", label=name, linewidths=0.4)
        if band:
            self.axes.fill_between([], [], [], color="0.45", alpha=0.15, linewidth=0, label=name)

    def legend(
        self, columns: int = 2, *, blocks: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """A legend below the axes, where it covers nothing, for the marks that were named.

        `blocks` puts names under headings, a column each, in order; what has none of these names is
        left out, and names in no block go to the last.
        """
        named = {}
        for handle, name in zip(*self.axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, []).append(handle)  # a line and its marks are one entry
        blank = self.matplotlib.lines.Line2D([], [], linestyle="none")
        if blocks:
            listed = [[head, *(n for n in blocks[head] if n in named)] for head in blocks]
            listed[-1] += [name for name in named if all(name not in of for of in listed)]
            longest, columns = max(map(len, listed)), len(blocks)
            # A name may stand once: empty ones differ in their number of spaces.
            names = [
                name
                for block in listed
                for name in [*block, *(" " * (k + 1) for k in range(longest - len(block)))]
            ]
        else:
            names = list(named)
        if named:
            handles = [named.get(name, [blank]) for name in names]
            legend = self.figure.legend(
                [handle[0] if len(handle) == 1 else tuple(handle) for handle in handles],
                names,
                loc="outside lower center",
                ncols=columns,
                fontsize=7,
                frameon=False,
                handlelength=2.2,
                columnspacing=1.0,
                labelspacing=0.25,
                borderpad=0.1,
            )
            for text in legend.get_texts():
                text.set_fontweight("bold" if text.get_text() in (blocks or ()) else "normal")

    def _settle_words(self) -> None:
        """Moves texts on the right up until none covers another; drops texts above marks that do.

        Words above that cover a mark are dropped as well.
        """
        self.figure.get_layout_engine().execute(self.figure)
        self.figure.set_layout_engine("none")  # final: saving twice must not change it
        renderer = self.figure.canvas.get_renderer()
        points_per_pixel = 72 / self.figure.dpi
        boxes = [(word, word.get_window_extent(renderer)) for word in self.labels]
        placed = []
        for word, box in sorted(boxes, key=lambda item: item[1].y0):
            bottom = box.y0
            for other in sorted(placed, key=lambda p: p.y0):
                if (
                    box.x0 < other.x1
                    and other.x0 < box.x1
                    and bottom < other.y1
                    and other.y0 < bottom + box.height
                ):
                    bottom = other.y1
            x, y = word.xyann
            word.xyann = (x, y + (bottom - box.y0) * points_per_pixel)
            placed.append(box.translated(0, bottom - box.y0))
        marks = self.axes.transData.transform(self.marks) if self.marks else []
        for word in self.extras:
            box = word.get_window_extent(renderer)
            wide = box.padded(2.5 / points_per_pixel)
            own = self.axes.transData.transform(word.xy)
            hidden = [m for m in marks if wide.contains(*m) and np.abs(m - own).max() > 1]
            if hidden or any(box.overlaps(other) for other in placed):
                word.remove()
            else:
                placed.append(box)

    def save(self, out: Path | str | Output, name: str, *, caption: str, alt: str) -> Figure:
        """Writes NAME.png, NAME.svg and NAME.csv into the folder `out`, created if missing."""
        out = out if isinstance(out, Output) else Output(Path(out))
        out.folder.mkdir(parents=True, exist_ok=True)
        png, svg, table = (out.folder / f"{name}.{kind}" for kind in ("png", "svg", "csv"))
        # A fixed salt and no date: the same rows give the same bytes.
        with self.matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            self._settle_words()
            # The backends themselves: savefig draws a second time to measure.
            if out.png:
                self.figure.dpi = STYLE["savefig.dpi"]
                canvas = self.matplotlib.backends.backend_agg.FigureCanvasAgg(self.figure)
                with files.writing(png, "wb") as file:
                    canvas.print_png(file)
            self.figure.dpi = 72
            drawn = io.StringIO()
            canvas = self.matplotlib.backends.backend_svg.FigureCanvasSVG(self.figure)
            canvas.print_svg(drawn, metadata={"Date": None})
            self.matplotlib.backends.backend_agg.FigureCanvasAgg(self.figure)
        files.write_text(svg, slim(drawn.getvalue()))
        with files.writing(table) as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        title = self.title.replace("\n", " ")
        return Figure(name, title, caption, alt, png=png if out.png else None, svg=svg, csv=table)


def few_of(ticks) -> list:
    """The ticks of a logarithmic axis whose labels do not touch, with both ends."""
    ticks = sorted(ticks)
    kept = ticks[:1]
    for tick in ticks[1:]:
        if np.log(tick / kept[-1]) >= LABEL * np.log(ticks[-1] / ticks[0]):
            kept.append(tick)
        elif tick == ticks[-1]:
            kept[-1] = tick
    return kept


def _cell(value):
    return float(f"{value:.8g}") if isinstance(value, float | np.floating) else value
