# SPDX-License-Identifier: Apache-2.0
"""What a figure shows is what its CSV holds, and both are what rows and law say."""

import csv
import dataclasses
import sys

import made_rows
import numpy as np
import pytest
import tiny
from matplotlib.colors import to_rgba

from configs import sizes
from vlm_jax.cost import flops as cost
from vlm_jax.cost.chips import CHIPS
from vlm_jax.law import law, published
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.reports import amounts, cells, colors, cost_figures, figures, score_figures
from vlm_jax.reports import canvas as canvases
from vlm_jax.reports import run as runs
from vlm_jax.rows import records


def read(figure) -> list[dict]:
    """The rows of a figure's CSV, numbers as numbers."""
    with open(figure.csv, newline="") as file:
        return [
            {
                k: v if k in ("series", "kind", "label") else float(v or "nan")
                for k, v in row.items()
            }
            for row in csv.DictReader(file)
        ]


def looks_of(points):
    return colors.of_sizes(points.N)


def column(rows, name, **wanted) -> np.ndarray:
    return np.array([r[name] for r in rows if all(r[k] == v for k, v in wanted.items())])


@pytest.fixture(scope="module")
def reasoning():
    """The published reasoning points and their law."""
    points = published.points("reasoning")
    return points, law.fit(points, bootstrap=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Rows of a made run, their laws, their figures by name."""
    rows = made_rows.rows(seeds=(0, 1))
    laws = {f: law.fit(records.points(rows, f), bootstrap=100) for f in ("reasoning", "text")}
    drawn = figures.run_figures(
        runs.of(rows), laws, tmp_path_factory.mktemp("run"), majority={"reasoning": 0.4}
    )
    return rows, laws, {figure.name: figure for figure in drawn}


def test_every_mark_on_the_axes_is_in_the_csv_and_nothing_else(tmp_path):
    canvas = canvases.Canvas(x="x", y="y", title="t")
    canvas.line("curve", [1.0, 2.0, 4.0], [0.5, 0.25, 0.125])
    canvas.band("curve", [1.0, 2.0], [0.1, 0.2], [0.3, 0.5])
    canvas.points("marks", [1.5, 3.0], [0.7, 0.8], stderr=[0.01, np.nan], V=[4, 16])
    canvas.bars("bars", [5.0, 6.0], [0.2, 0.4], width=0.5)
    rows = read(canvas.save(tmp_path, "f", caption="", alt=""))
    (curve,), (band, marks) = (
        canvas.axes.lines,
        [
            c
            for c in canvas.axes.collections
            if len(c.get_offsets()) > 1 or len(c.get_paths()[0]) > 4
        ],
    )
    drawn = {
        "line": curve.get_xydata(),
        "point": marks.get_offsets(),
        "bar": [(p.get_x() + p.get_width() / 2, p.get_height()) for p in canvas.axes.patches],
    }
    for kind, places in drawn.items():
        noted = np.stack([column(rows, "x", kind=kind), column(rows, "y", kind=kind)], 1)
        np.testing.assert_allclose(noted, places)
    corners = {(x, y) for x, y in band.get_paths()[0].vertices}
    for row in (row for row in rows if row["kind"] == "band"):
        assert {(row["x"], row["low"]), (row["x"], row["high"])} <= corners
    known, unknown = (row for row in rows if row["kind"] == "point")
    assert (known["low"], known["high"]) == pytest.approx((0.69, 0.71))
    assert np.isnan([unknown["low"], unknown["high"]]).all()
    assert len(rows) == 3 + 2 + 2 + 2


@pytest.mark.parametrize("Q", [0.0, 50.0])
def test_figure_1_holds_the_points_the_law_and_its_band(reasoning, tmp_path, Q):
    points, fitted = reasoning
    figure = figures.error_against_flops(
        cells.average(points),
        fitted,
        tmp_path,
        family="reasoning",
        name="one",
        Q=Q,
        looks=looks_of(points),
    )
    rows = read(figure)
    for n in np.unique(points.N):
        mine = points.N == n
        marks = {"kind": "point", "series": amounts.parameters_text(n)}
        np.testing.assert_allclose(column(rows, "y", **marks), points.error[mine])
        np.testing.assert_allclose(column(rows, "x", **marks), 2e9 * n * (Q + points.V[mine]))
        curve = {"kind": "line", "series": f"law {amounts.parameters_text(n)}"}
        tokens = column(rows, "V", **curve)
        np.testing.assert_allclose(column(rows, "y", **curve), fitted.error(n, tokens, Q))
        np.testing.assert_allclose(column(rows, "x", **curve), 2e9 * n * (Q + tokens))
        low, high = fitted.band(n, tokens, Q)
        curve["kind"] = "band"
        np.testing.assert_allclose(column(rows, "low", **curve), low)
        np.testing.assert_allclose(column(rows, "high", **curve), high)


@pytest.mark.parametrize("Q", [0.0, 14.0, 50.0, 500.0])
def test_nothing_inside_the_measured_range_beats_the_frontier_at_its_cost(reasoning, Q):
    points, fitted = reasoning
    N, V = (0.5, 7.0), (1.0, 576.0)
    best = cells.frontier(fitted, N, V, Q=Q)
    rng = np.random.default_rng(0)
    for flops, error in zip(best.flops, best.error, strict=True):
        tokens = np.exp(rng.uniform(*np.log(V), 200))
        size = flops / (2e9 * (Q + tokens))
        inside = (size >= N[0]) & (size <= N[1])
        if not inside.any():
            continue  # at either end of the budgets hardly any V leaves N inside
        # The frontier's V is one of 400, a step of 1.6 %: with alpha .071 and an error of .5, an N
        # that is 1.6 % too small costs less than 6e-4.
        assert (fitted.error(size[inside], tokens[inside], Q) >= error - 6e-4).all()
    assert (np.diff(best.error) <= 1e-12).all()


def test_the_closed_optimum_is_the_frontier_s_and_a_boundary_where_beta_exceeds_alpha(reasoning):
    _, fitted = reasoning
    V = (1.0, 576.0)
    best = cells.frontier(fitted, (1e-3, 1e3), V, Q=50)
    middle = len(best.V) // 2
    closed = cells.best_tokens(fitted.params["alpha"], fitted.params["beta"], 50, V)
    assert best.V[middle] == pytest.approx(float(closed), rel=0.02)  # 400 steps over 576
    assert cells.best_tokens(0.03, 0.04, 50, V) == 576
    assert cells.best_tokens(0.03, -0.01, 50, V) == 1
    assert cells.best_tokens(0.07, 0.015, 0, V) == 1


def test_seeds_do_not_shrink_the_error_of_the_questions_they_share():
    points = published.points("reasoning").where(np.arange(28) < 1)
    twice = dataclasses.replace(
        points, N=points.N.repeat(4), V=points.V.repeat(4), Q=points.Q.repeat(4),
        error=np.full(4, 0.5), stderr=np.full(4, 0.02), label=points.label * 4,
    )  # fmt: skip
    assert cells.average(twice).stderr[0] == pytest.approx(0.02)
    apart = dataclasses.replace(twice, error=np.array([0.4, 0.6, 0.4, 0.6]))
    between = np.var([0.4, 0.6, 0.4, 0.6], ddof=1) / 4
    assert cells.average(apart).stderr[0] == pytest.approx(np.sqrt(0.02**2 + between))


def test_figure_2_is_the_law_of_the_smaller_sizes(reasoning, tmp_path):
    points, fitted = reasoning
    (figure,) = figures.extrapolation(
        points,
        fitted,
        tmp_path,
        family="reasoning",
        name="two",
        beyond=14.0,
        looks=looks_of(points),
    )
    without = law.fit(points.where(points.N < 7))
    rows = read(figure)
    curve = {"series": "predicted", "kind": "line"}
    np.testing.assert_allclose(
        column(rows, "y", **curve), without.error(7.0, column(rows, "V", **curve)), rtol=1e-6
    )
    np.testing.assert_allclose(column(rows, "y", series="measured"), points.error[points.N == 7])
    assert column(rows, "N_billions", series="14B predicted").tolist()[0] == 14.0


def test_a_described_request_costs_what_the_cost_model_says(reasoning, tmp_path):
    points, fitted = reasoning
    vit = ViTSize.of(sizes.VIT["clip-vit-large-patch14-336"] | {"levels": (12, 16, 22, 23)})
    llms = {name: LLMSize.of(fields) for name, fields in sizes.LLM.items()}
    counted, asked, latency = cost_figures.described_figures(
        points, fitted, tmp_path, "reasoning", llms=llms, vit=vit, chip=CHIPS["v5e"], Q=50, G=16
    )
    packer = tiny.method("token_packer", 576)
    flops = cost.request_flops(vit, packer, llms["qwen1.5-7b"], Q=50, G=16).total
    assert column(read(counted), "x", series="7B", kind="point")[-1] == pytest.approx(flops)
    separate = cost.llm_flops(llms["qwen1.5-7b"], 50, logits=0)
    extra = column(read(asked), "x", series="7B", kind="point")[-1] - flops
    assert extra == pytest.approx(separate, rel=0.01)  # and QueCC's own, under 1 % of it
    assert (np.diff(column(read(latency), "x", series="7B", kind="point")) >= 0).all()


def test_a_run_has_the_figures_of_the_paper_and_those_it_lacks(run):
    drawn = dict(run[2])
    for family in ("reasoning", "text"):
        for kind in (
            "scores", "methods", "flops_measured_q", "extrapolation",
            "optimal_v", "frontier_over_q", "total_flops", "measured_time",
        ):  # fmt: skip
            figure = drawn.pop(f"{family}_{kind}")
            assert figure.section == family and figure.alt and figure.caption
            assert figure.png.read_bytes().startswith(b"\x89PNG")
            assert figure.svg.read_text().lstrip().startswith("<?xml")
    assert set(drawn) == {"equal_compute", "phases"}


def test_blind_scores_and_other_methods_stand_beside_the_grid(run):
    rows, _, drawn = run
    table = read(drawn["reasoning_scores"])
    for n in made_rows.SIZES:
        blind = [
            r.families["reasoning"]["score"] for r in rows if r.blind and r.llm_parameters == n
        ]
        text = amounts.parameters_text(n / 1e9)
        assert column(table, "y", series=f"{text} blind", kind="point") == pytest.approx(
            [np.mean(blind)]
        )
    assert set(column(table, "y", series="commonest answer")) == {0.4}
    beside = read(drawn["reasoning_methods"])
    for method, tokens in (("pool", (16, 36)), ("token_packer", made_rows.TOKENS)):
        scores = [
            np.mean([r.families["reasoning"]["score"] for r in rows
                     if r.method == method and not r.blind and r.V == V
                     and r.llm_parameters == 250_000])
            for V in tokens
        ]  # fmt: skip
        assert column(beside, "y", series=method, kind="point") == pytest.approx(scores)
        assert column(beside, "V", series=method, kind="point").tolist() == list(tokens)


def test_measured_time_is_the_steady_time_where_every_row_has_it():
    timed = made_rows.rows(timing=True)[:3]
    seconds, words = cost_figures.measured_seconds(timed)
    assert seconds.tolist() == [row.timing["seconds_per_example"] for row in timed]
    assert "batches of 64" in words
    mixed = [*timed, made_rows.rows()[0]]
    seconds, words = cost_figures.measured_seconds(mixed)
    assert seconds == pytest.approx([3.5 / 4000] * 4) and "compilation" in words
    idle = [dataclasses.replace(row, evaluate_seconds=0.0) for row in made_rows.rows()]
    assert cost_figures.measured_seconds(idle) is None


def test_phases_add_up_to_the_request(run):
    rows, _, drawn = run
    table = read(drawn["phases"])
    for bar in range(4):
        assert sum(column(table, "y", x=float(bar))) == pytest.approx(1.0)
    largest = next(r for r in rows if r.llm_parameters == 250_000 and r.V == 36)
    share = largest.flops["prefill"] / sum(largest.flops.values())
    assert column(table, "y", series="prefill", x=3.0) == pytest.approx([share])


def test_counted_flops_are_those_of_the_rows(run):
    rows, _, drawn = run
    table = read(drawn["text_total_flops"])
    wanted = [sum(r.flops.values()) for r in rows if r.llm_parameters == 25_000][:4]
    np.testing.assert_allclose(column(table, "x", series="25k", kind="point"), wanted)


def test_curves_differ_in_more_than_color_and_words_are_large_enough(reasoning, tmp_path):
    points, fitted = reasoning
    canvas = canvases.Canvas(x="x", y="y", title="t")
    averaged = cells.average(points)
    figures.size_curves(canvas, averaged, averaged.at(50.0).flops, fitted, looks_of(points))
    canvas.log_x()
    canvas.save(tmp_path, "f", caption="", alt="")
    marks = [c for c in canvas.axes.collections if len(c.get_offsets()) == 7]
    shapes = {tuple(c.get_paths()[0].vertices.ravel().round(3)) for c in marks}
    light = sorted(np.dot(c.get_facecolors()[0][:3], (0.299, 0.587, 0.114)) for c in marks)
    assert len(shapes) == 4
    assert min(np.diff(light)) > 0.1  # apart in gray print as well
    assert max(light) < 0.75 and to_rgba("white")[0] == 1.0
    words = [t for t in canvas.axes.texts if t.get_text()]
    assert min(t.get_fontsize() for t in words) >= 6.5
    renderer = canvas.figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer).shrunk(0.9, 0.9) for t in words]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_no_curve_joins_cells_whose_measured_cost_falls_with_V(reasoning, tmp_path):
    points, fitted = reasoning
    spent = np.arange(1.0, len(points) + 1)
    spent[points.N == 7.0] = spent[points.N == 7.0][::-1]  # noise turned the order round
    figure = cost_figures.error_against_cost(
        points,
        fitted,
        spent,
        tmp_path,
        family="x",
        name="f",
        x="s",
        title="t",
        words="w.",
        looks=looks_of(points),
    )
    curves = {row["series"] for row in read(figure) if row["kind"] == "line"}
    assert curves == {"law 0.5B", "law 1.8B", "law 4B"}
    assert len(column(read(figure), "x", series="7B", kind="point")) == 7


def test_a_word_above_a_mark_gives_way_to_another_mark(tmp_path):
    canvas = canvases.Canvas(x="x", y="y", title="t")
    canvas.points("marks", [0.0, 1.0, 1.0], [0.5, 0.0, 0.03])
    canvas.write_above("free", 0.0, 0.5)
    canvas.write_above("covering", 1.0, 0.0)
    canvas.save(tmp_path, "f", caption="", alt="")
    assert [t.get_text() for t in canvas.axes.texts] == ["free"]


def test_an_axis_has_few_ticks_however_many_token_counts_there_are():
    assert [*map(canvases.few_of, ([36, 1, 4], [36, 16, 18, 4]))] == [[1, 4, 36], [4, 16, 36]]
    many = canvases.few_of(range(1, 577))
    gaps = np.diff(np.log(many)) / np.log(576) / canvases.LABEL
    assert (many[0], many[-1]) == (1, 576) and 1 <= gaps.min() and gaps.max() < 2


def test_equal_rows_give_equal_bytes(reasoning, tmp_path):
    points, fitted = reasoning
    for folder in ("a", "b"):
        figures.question_lengths(
            cells.average(points), fitted, tmp_path / folder, family="x", name="f"
        )
    for kind in ("png", "svg", "csv"):
        assert (tmp_path / f"a/f.{kind}").read_bytes() == (tmp_path / f"b/f.{kind}").read_bytes()


def test_without_a_law_the_points_are_still_drawn(tmp_path):
    points = published.points("ocr")
    paths = figures.law_figures(points, None, tmp_path, "ocr")
    shown = {p.stem.removeprefix("ocr_") for p in paths}
    assert shown == {"flops_q0", "flops_q50", "equal_compute_q0", "equal_compute_q50"}
    assert {p.suffix for p in paths} == {".png", ".svg", ".csv"}
    assert all(p.stat().st_size for p in paths)


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .vlm_jax\[report\]"):
        figures.law_figures(published.points("ocr"), None, tmp_path, "ocr")


def canvases_saved(monkeypatch) -> list:
    """The canvases that are saved from now on."""
    saved, save = [], canvases.Canvas.save

    def noted(self, *args, **more):
        saved.append(self)
        return save(self, *args, **more)

    monkeypatch.setattr(canvases.Canvas, "save", noted)
    return saved


def test_the_legend_of_figure_1_explains_every_color_and_size(reasoning, tmp_path, monkeypatch):
    saved = canvases_saved(monkeypatch)
    points, fitted = reasoning
    figures.error_against_flops(
        cells.average(points),
        fitted,
        tmp_path,
        family="reasoning",
        name="one",
        Q=50.0,
        looks=looks_of(points),
    )
    (legend,) = saved[0].figure.legends
    words = [text.get_text() for text in legend.get_texts() if text.get_text().strip()]
    assert words == [
        "Color: language model", "0.5 B parameters", "1.8 B parameters", "4 B parameters",
        "7 B parameters", "fitted law, 95 % interval", "lowest error of the law",
        "best choice at its cost", "Size: visual tokens V", "V = 1", "V = 16", "V = 64", "V = 576",
    ]  # fmt: skip
    assert saved[0].axes.get_xlabel() == "FLOPs per request, 2N(Q+V), Q = 50 text tokens"


def test_a_method_has_a_panel_of_its_own_and_the_others_pale_behind_it(run, tmp_path, monkeypatch):
    saved = canvases_saved(monkeypatch)
    score_figures.methods(
        runs.of(run[0]),
        "reasoning",
        tmp_path,
        name="m",
        looks=colors.of_sizes(n / 1e9 for n in made_rows.SIZES),
    )
    (canvas,) = saved
    shown = {row.method for row in run[0] if not row.blind and row.llm_parameters == 250_000}
    assert {axes.get_title(loc="left") for axes in canvas.panels} == shown
    for axes in canvas.panels:
        pale = [line for line in axes.lines if line.get_color() == "0.85"]
        assert len(pale) == len(shown) - 1
        assert axes.get_ylim() == canvas.panels[0].get_ylim()
