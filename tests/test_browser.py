# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser: it never scrolls sideways, and its tables sort.

Runs with `pytest -m browser` where Chromium is installed (Debian: apt-get install chromium).
"""

import json
import shutil
import subprocess

import made_rows
import pytest

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
    return json.loads(text)


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_never_scrolls_sideways_and_every_figure_shows(chromium, page, tmp_path, width):
    found = probe(chromium, page, tmp_path, width=width)
    assert found["width"] == width
    assert found["overflow"] == 0 and found["wide"] == []
    assert found["images"] > 20 and found["broken"] == 0


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
