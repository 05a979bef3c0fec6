# SPDX-License-Identifier: Apache-2.0
"""A drawing whose CSV is the drawing: every mark is drawn and noted by the same call."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_jax import files

# One column of print is 89 mm = 3.5 inches; at this width 7 to 8 point stays readable on paper
# and on a phone.
COLUMN_INCHES = 3.5
STYLE = {
    "font.size": 8,
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
    "svg.fonttype": "path",
}
# Okabe & Ito, "Color Universal Design" (2008): eight colors that color-blind readers tell apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "oo", "--")
COLUMNS = ("series", "kind", "x", "y", "low", "high", "N_billions", "V", "Q", "label")


@dataclass(frozen=True)
class Figure:
    """One finished figure: its three files and the words that stand beside it."""

    name: str
    title: str
    caption: str
    alt: str
    png: Path
    svg: Path
    csv: Path
    section: str = ""  # the family it is about; "" is all of them

    @property
    def paths(self) -> list[Path]:
        return [self.png, self.svg, self.csv]


def parameters_text(billions: int | float) -> str:
    """A parameter count as people write it: 2.5e-5 (billions) is "25k", 7 is "7B"."""
    # 0.5B, not 500M: published sizes are called so.
    for least, factor, unit in ((0.0995, 1.0, "B"), (0.9995e-3, 1e-3, "M"), (0.9995e-6, 1e-6, "k")):
        if billions >= least:
            return f"{billions / factor:.3g}{unit}"
    return f"{billions * 1e9:.0f}"


def amount_text(value: int | float) -> str:
    """A count with a metric prefix and three digits: 1.23e9 is "1.23 G"."""
    for power, prefix in zip((18, 15, 12, 9, 6, 3), "EPTGMk", strict=True):
        factor = 10.0**power
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def seconds_text(seconds: int | float) -> str:
    """A duration with the unit that fits: "3 h 05 min", "2 min 10 s", "4.1 s", "12 ms"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 100:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size_colors(count: int) -> list:
    """Colors for `count` ordered sizes, dark to light, none lighter than prints well on white."""
    matplotlib = require_matplotlib()
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.0, 0.8, max(count, 1))]


def require_matplotlib():
    """The matplotlib module; where missing, ModuleNotFoundError saying how to get it."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as error:
        raise ModuleNotFoundError(
            'figures need matplotlib: pip install "vlm_jax[report]"', name="matplotlib"
        ) from error
    return matplotlib


class Canvas:
    """One pair of axes; what is drawn on it is exactly what `save` writes to the CSV.

    `x` and `y` are axis labels with units. Columns of the CSV are COLUMNS: x and y of each mark,
    low and high of its bar or band, and the N (billions), V, Q it stands for where they apply.
    """

    def __init__(
        self,
        *,
        x: str,
        y: str,
        title: str,
        height: int | float = 2.75,
    ):
        self.matplotlib = require_matplotlib()
        self.title, self.rows, self.labels, self.extras, self.marks = title, [], [], [], []
        with self.matplotlib.rc_context(STYLE):
            self.figure = self.matplotlib.figure.Figure(
                (COLUMN_INCHES, height), layout="constrained"
            )
            # Words are measured before saving.
            self.matplotlib.backends.backend_agg.FigureCanvasAgg(self.figure)
            self.axes = self.figure.add_subplot()
            self.axes.set(xlabel=x, ylabel=y, title=title)
            self.axes.grid(True, axis="y", color="0.9", linewidth=0.5)
            self.axes.set_axisbelow(True)

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
        """Upright bars from zero, with one standard error where known, the value written on top."""
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
        """A word to the right of a mark, moved up at saving where it would cover another one."""
        red, green, blue, _ = self.matplotlib.colors.to_rgba(color)
        # Light colors that serve for marks are too pale for thin letters.
        dark = (0.65 * red, 0.65 * green, 0.65 * blue)
        self.labels.append(
            self._annotate(text, x, y, dark, 7.5, xytext=(5, 0), ha="left", va="center")
        )

    def write_above(self, text: str, x: int | float, y: int | float, *, size=6.8, gap=1.5) -> None:
        """A word above a mark, left out where it would cover another mark or an earlier word."""
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
        # An axis so narrow that no mark falls on it (every row costs the same) names its ends.
        marks = marks if len(marks) else np.array([low, high])
        self.axes.set_xticks(marks[:: int(np.ceil(len(marks) / 6))])
        axis.set_major_formatter(ticker.EngFormatter(unit, sep=""))

    def legend(self, columns: int = 2) -> None:
        """A legend below the axes, where it covers nothing, for the marks that were named."""
        named = {}
        for handle, name in zip(*self.axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, []).append(handle)  # a line and its marks are one entry
        if named:
            self.figure.legend(
                [handles[0] if len(handles) == 1 else tuple(handles) for handles in named.values()],
                list(named),
                loc="outside lower center",
                ncols=columns,
                fontsize=7,
                frameon=False,
                handlelength=2.2,
                columnspacing=1.0,
                labelspacing=0.25,
                borderpad=0.1,
            )

    def _settle_words(self) -> None:
        """Moves words on the right up until none covers another; drops words above that do.

        Words above that cover a mark are dropped as well.
        """
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # the layout stands; saving twice need not redo it
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

    def save(self, out_dir: Path | str, name: str, *, caption: str, alt: str) -> Figure:
        """Writes NAME.png, NAME.svg and NAME.csv into `out_dir`, which is made where missing."""
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        paths = {kind: out_dir / f"{name}.{kind}" for kind in ("png", "svg", "csv")}
        # A fixed salt and no date: the same rows give the same bytes.
        with self.matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            self._settle_words()
            with files.writing(paths["png"], "wb") as file:
                self.figure.savefig(file, format="png")
            with files.writing(paths["svg"], "wb") as file:
                self.figure.savefig(file, format="svg", metadata={"Date": None})
        with files.writing(paths["csv"]) as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        return Figure(name, self.title, caption, alt, **paths)


def _cell(value):
    return float(value) if isinstance(value, np.floating) else value
