# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML in which every word from outside is escaped; the page's style and script."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm_jax.reports.canvas import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #565c66; --paper: #fff; --line: #d5d8de;
  --shade: #f3f4f6; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #a7adb8; --paper: #15171b;
  --line: #3a3f48; --shade: #20242a; --link: #8cc2ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1.6rem 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, li, figcaption, caption { max-width: 46rem; overflow-wrap: anywhere; }
li { margin: .3rem 0; }
dt { font-weight: 600; margin-top: .8rem; }
dd { margin: .3rem 0 0 1.2rem; max-width: 46rem; overflow-wrap: anywhere; }
#answer > dl:first-of-type dd { font-size: 1.08rem; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.figures { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); }
figure { margin: 0; max-width: 36rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .4rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .4rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
.scroll:focus-visible, button:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 .5rem; position: sticky; left: 0;
  width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th[scope=row], td.words, th.words { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
thead th { background: var(--shade); vertical-align: bottom; font-weight: 600;
  white-space: normal; }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: .15rem 0;
  cursor: pointer; text-align: inherit; min-height: 1.5rem; }
thead button::after { content: "\\a0\\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; }
@media (min-width: 60rem) { th[scope=row] { position: sticky; left: 0; background: var(--paper); } }
@media (max-width: 40rem) { th[scope=row] { white-space: normal; overflow-wrap: anywhere;
  min-width: 8.5rem; } }
td.open { color: var(--soft); }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; border-radius: 6px;
  font-size: .88rem; }
code { overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 1.2rem 0; color: var(--link); }
@media print { nav, thead button::after { display: none; } .scroll { overflow: visible; } }
"""

# Sorting needs nothing but the page; a missing value stays last in either direction.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.sort;
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = x - y;
      return sign * (isNaN(difference) ? x.localeCompare(y) : difference);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""


@dataclass(frozen=True)
class Cell:
    """What a table cell says and sorts by; `open` marks a difference that is not settled."""

    text: str
    sort: int | float | str = ""
    open: bool = False


def words(text: str) -> Cell:
    """A cell that sorts as it reads."""
    return Cell(text, text)


def numeral(value: int | float | None, text: str | None = None) -> Cell:
    """A cell that sorts by `value`; a dash where there is none."""
    if value is None:
        return Cell("–")
    return Cell(f"{value:.3g}" if text is None else text, value)


def table(
    caption: str,
    titles: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    keys: Sequence[str] | None = None,
) -> str:
    """A sortable table in a container that scrolls by itself; the first cell of a row is its head.

    `keys` (one per row, or None) become data-cell attributes, by which a row can be found again.
    """
    textual = [all(isinstance(row[i].sort, str) for row in rows) for i in range(len(titles))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_class("words" if text or i == 0 else "")}>'
        f'<button type="button">{escape(title)}</button></th>'
        for i, (title, text) in enumerate(zip(titles, textual, strict=True))
    )
    body = []
    for number, row in enumerate(rows):
        found = f' data-cell="{escape(keys[number])}"' if keys and keys[number] else ""
        cells = []
        for i, cell in enumerate(row):
            tag = 'th scope="row"' if i == 0 else "td"
            wide = "wrap " if len(cell.text) > 60 else ""
            style = f"{'words ' if textual[i] else ''}{wide}{'open' if cell.open else ''}".strip()
            cells.append(
                f'<{tag}{_class(style)} data-sort="{escape(str(cell.sort))}">'
                f"{escape(cell.text)}</{tag[:2]}>"
            )
        body.append(f"<tr{found}>{''.join(cells)}</tr>")
    label = escape(caption.split(".")[0])
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def figure(drawn: Figure) -> str:
    """A figure inside the page: the SVG as data, its caption, its numbers as a file to keep."""
    svg, size = drawn.svg.read_bytes(), _size(drawn.svg)
    return (
        f'<figure><img src="{data_uri(svg, "image/svg+xml")}" alt="{escape(drawn.alt)}" {size}>'
        f"<figcaption><strong>{escape(drawn.title)}.</strong> {escape(drawn.caption)} "
        f'<a download="{escape(drawn.csv.name)}" '
        f'href="{data_uri(drawn.csv.read_bytes(), "text/csv")}">Numbers (CSV)</a></figcaption>'
        "</figure>"
    )


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _size(svg: Path) -> str:
    """Width and height as matplotlib wrote them: the page does not jump while it loads."""
    found = re.search(r'<svg[^>]*?width="([\d.]+)pt"', svg.read_text(), re.S)
    tall = re.search(r'<svg[^>]*?height="([\d.]+)pt"', svg.read_text(), re.S)
    return f'width="{float(found[1]):.0f}" height="{float(tall[1]):.0f}"'


def bullets(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def section(key: str, title: str, *parts: str) -> str:
    """A section with a heading that can be linked to."""
    return f'<section id="{key}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A document that loads nothing; `sections` are (key, title, html), `lead` plain text."""
    links = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name, _ in sections)
    body = "\n".join(section(key, name, html) for key, name, html in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
