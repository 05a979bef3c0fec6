# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md lists the tasks and protocols that there are.

`python tests/test_benchmarks_page.py` writes its two tables anew.
"""

import re
from pathlib import Path

from vlm_jax.evals import submission
from vlm_jax.evals.tasks import TASKS
from vlm_jax.evals.tasks.own import TASK as OWN

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def cell(text):
    """A text inside a table: one line, and no bar ends it."""
    return " ".join(text.split()).replace("|", "\\|")


def linked(text):
    return re.sub(r"https?://[^\s,;)]+", lambda found: f"<{found[0]}>", cell(text))


def of_tasks():
    rows = [
        "| task | benchmark | files below `--annotations` | where they are |",
        "|---|---|---|---|",
    ]
    for name, task in sorted(TASKS.items()):
        rows.append(
            f"| `{name}` | {cell(task.title)} | {cell(task.layout)} | {linked(task.where)} |"
        )
    return rows


def of_protocols():
    rows = ["| task | protocol | metric | source | faults that are kept |", "|---|---|---|---|---|"]
    for name, task in sorted(TASKS.items()):
        for protocol, rule in task.protocols.items():
            rows.append(
                f"| `{name}` | `{protocol}` | `{cell(rule.metric)}` | {linked(rule.source)} | "
                f"{cell('; '.join(rule.faults))} |"
            )
    return rows


def written(text):
    """The page with both tables as the code has them."""
    for name, rows in (("tasks", of_tasks()), ("protocols", of_protocols())):
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        body = "\n" + "\n".join(rows) + "\n\n"
        text, count = re.subn(
            pattern, lambda found, body=body: found[1] + body + found[2], text, flags=re.DOTALL
        )
        assert count == 1, name
    return text


def test_the_tables_of_the_page_are_those_of_the_code():
    text = PAGE.read_text()
    assert text == written(text), "run: python tests/test_benchmarks_page.py"


def test_the_page_names_every_submission_and_every_metric():
    text = PAGE.read_text()
    for name in (*submission.FORMATS, *OWN.protocols):
        assert f"`{name}`" in text, name


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
