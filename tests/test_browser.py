# SPDX-License-Identifier: Apache-2.0
"""The report and the planner in a real browser: nothing scrolls sideways, plans are Python's.

Runs with `pytest -m browser` where Chromium is installed (Debian: apt-get install chromium).
"""

import base64
import json
import shutil
import subprocess

import made_rows
import made_settings
import numpy as np
import pytest

from vlm_jax.reports import planner_page
from vlm_jax.reports import report as reports
from vlm_jax.rows import records

pytestmark = pytest.mark.browser

# Probes a page inside a frame of a given width and writes what it finds into the frame's parent.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><iframe id="frame"
style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument;
  const table = page.querySelector("#cells table");
  const column = [...table.tHead.rows[0].cells].findIndex(h => h.textContent === "reasoning");
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const scores = () => [...table.tBodies[0].rows].map(r => +r.cells[column].dataset.sort);
  button.focus();
  const focused = page.activeElement === button;
  button.click();
  const up = scores(), first = button.parentElement.getAttribute("aria-sort");
  button.click();
  const down = scores(), second = button.parentElement.getAttribute("aria-sort");
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre"))
    .filter(e => e.getBoundingClientRect().right > page.documentElement.clientWidth + 1)
    .map(e => e.tagName);
  document.getElementById("found").textContent = JSON.stringify({
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    width: page.documentElement.clientWidth, focused, up, down, first, second, wide,
    broken: [...page.images].filter(i => !i.naturalWidth).length,
    images: page.images.length, ink: getComputedStyle(page.body).color,
    filters: [...new Set([...page.images].map(i => getComputedStyle(i).filter))]});
};
frame.srcdoc = PAGE;
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The text of a made run's page, several methods beside the grid's own."""
    folder = tmp_path_factory.mktemp("browser")
    records.write(folder / "rows.jsonl", made_rows.rows(methods=made_rows.METHODS))
    reports.write(folder)
    return (folder / "report/index.html").read_text()


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    assert found, "no Chromium found: apt-get install chromium"
    return found


def probe(chromium, page, tmp_path, *, width: int, flags=()) -> dict:
    """What the browser says of the page in a frame `width` pixels wide."""
    literal = json.dumps(page).replace("</", "<\\/")
    html = PROBE.replace("WIDTH", str(width)).replace("PAGE", literal)
    return found_in(chromium, html, tmp_path, flags)


def found_in(chromium, html, tmp_path, flags) -> dict:
    """What a probe writes into its element "found", as it is or in base64."""
    (tmp_path / "probe.html").write_text(html)
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000", "--window-size=1400,1000", *flags, "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    text = done.stdout.rpartition('<pre id="found">')[2].partition("</pre>")[0]
    return json.loads(text if text.startswith("{") else base64.b64decode(text))


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_never_scrolls_sideways_and_every_figure_shows(chromium, page, tmp_path, width):
    found = probe(chromium, page, tmp_path, width=width)
    assert found["width"] == width
    assert found["overflow"] == 0 and found["wide"] == []
    assert found["images"] > 10 and found["broken"] == 0


def test_a_head_sorts_up_then_down_and_says_so(chromium, page, tmp_path):
    found = probe(chromium, page, tmp_path, width=1280)
    assert found["focused"]
    assert found["up"] == sorted(found["up"]) and len(set(found["up"])) > 10
    assert found["down"] == sorted(found["down"], reverse=True)
    assert (found["first"], found["second"]) == ("ascending", "descending")


@pytest.mark.parametrize("width", [360, 1280])
def test_dark_ink_turns_light_where_dark_is_preferred_and_figures_follow(
    chromium, page, tmp_path, width
):
    flags = ["--blink-settings=preferredColorScheme=0"]
    light = probe(chromium, page, tmp_path, width=width)
    dark = probe(chromium, page, tmp_path, width=width, flags=flags)
    assert light["ink"] == "rgb(27, 29, 33)" and dark["ink"] == "rgb(232, 234, 238)"
    assert light["filters"] == ["none"] and dark["filters"] == ["invert(0.917) hue-rotate(180deg)"]
    assert dark["overflow"] == 0 and dark["wide"] == []


# Opens the planner in a frame, moves every kind of input by hand, then plans settings given to it.
PLANNED = """<!DOCTYPE html><meta charset="utf-8"><iframe id="frame"
style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = async () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const pause = () => new Promise(done => setTimeout(done, 300));
  await pause();
  const choice = page.getElementById("planner-choice"), said = [choice.textContent];
  const move = async (id, value, event) => {
    const input = page.getElementById(id);
    input.value = value;
    input.dispatchEvent(new view.Event(event));
    await pause();
    said.push(choice.textContent);
  };
  await move("amount-flops", "1", "change");
  await move("amount-flops", "what", "change");
  await move("amount-flops", "3e12", "change");
  await move("text-slider", "400", "input");
  const inputs = [...page.querySelectorAll("#planner-form input, #planner-form select")]
    .filter(e => e.offsetParent && !e.disabled);
  const bare = inputs.filter(e => !e.labels.length && !e.ariaLabel).map(e => e.id);
  const unfocused = inputs.filter(e => { e.focus(); return page.activeElement !== e ||
    view.getComputedStyle(e).outlineStyle === "none"; }).map(e => e.id);
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg"))
    .filter(e => e.getBoundingClientRect().right > page.documentElement.clientWidth + 1)
    .map(e => e.tagName + e.id);
  const of = view.eval("planner")(JSON.parse(page.getElementById("planner-data").textContent));
  document.getElementById("found").textContent = btoa(unescape(encodeURIComponent(JSON.stringify({
    said, bare, unfocused, wide, inputs: inputs.length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    live: choice.getAttribute("aria-live"), marks: page.querySelectorAll("svg .best").length,
    plans: SETTINGS.map(of.plan)}))));
};
frame.srcdoc = PAGE;
</script>"""


def planned(chromium, page, tmp_path, settings, *, width=1280, flags=()) -> dict:
    """What the planner of a page says, and its plans of settings."""
    literal = json.dumps(page).replace("</", "<\\/")
    html = PLANNED.replace("WIDTH", str(width)).replace("SETTINGS", json.dumps(settings))
    return found_in(chromium, html.replace("PAGE", literal), tmp_path, flags)


def test_the_page_plans_as_python_does(chromium, tmp_path):
    """200 random settings of eight pages, each computed by its page, to a millionth."""
    rng, answered = np.random.default_rng(1), 0
    for made in made_settings.pages(tmp_path):
        data = made_settings.data(made)
        settings = made_settings.settings(made, data, 25, rng)
        found = planned(chromium, planner_page.build(data, source="a test"), tmp_path, settings)
        for number, (setting, plan) in enumerate(zip(settings, found["plans"], strict=True)):
            python = made_settings.by_python(made, setting)
            made_settings.assert_same(plan, python, f"{made} {number} {setting}")
            answered += "error" not in plan
    assert answered > 100


@pytest.mark.parametrize("width", [400, 1280])
def test_the_planner_works_on_a_phone_by_keyboard_and_in_the_dark(chromium, tmp_path, width):
    made = made_settings.pages(tmp_path)[0]
    page = planner_page.build(made_settings.data(made), source="a test")
    flags = ["--blink-settings=preferredColorScheme=0"]
    found = planned(chromium, page, tmp_path, [], width=width, flags=flags)
    assert found["overflow"] == 0 and found["wide"] == []
    assert found["bare"] == [] == found["unfocused"] and found["inputs"] > 10
    assert found["live"] == "polite" and found["marks"] > 2
    first, refused, unread, again, longer = found["said"]
    assert "Predicted error" in first and "Best of" in first
    assert "nothing meets the budget: the cheapest is N=0.5" in refused
    assert "is not a number" in unread
    assert "Predicted error" in again and longer != again


def test_the_report_holds_the_planner(chromium, page, tmp_path):
    found = planned(chromium, page, tmp_path, [], width=400)
    assert found["overflow"] == 0 and found["wide"] == []
    assert "Predicted error" in found["said"][0] and found["marks"] > 2
