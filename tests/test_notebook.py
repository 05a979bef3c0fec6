# SPDX-License-Identifier: Apache-2.0
"""docs/quickstart.ipynb is executed, whole and of this version; make test-notebook runs it anew."""

import json
import os
import re

import pytest
import tiny

PATH = tiny.ROOT / "docs/quickstart.ipynb"


def read() -> list[dict]:
    """The cells of code that are kept, each with its outputs."""
    return [c for c in json.loads(PATH.read_text())["cells"] if c["cell_type"] == "code"]


def words(cell: dict) -> str:
    """What a cell printed, and the text of what it shows but for addresses of objects."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            found.append("".join(output["text"]))
        elif "image/png" not in output.get("data", {}):
            found.append("".join(output.get("data", {}).get("text/plain", "")))
    return "".join(found)


def test_what_is_kept_was_run_in_order_and_tells_nothing_of_the_machine():
    cells = read()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds and kinds >= {"stream", "display_data"}
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"]) == 2
    shown = "".join(map(words, cells)) + "".join("".join(cell["source"]) for cell in cells)
    assert not re.search(r"/(?:wo[r]k|tm[p]|home|root|opt|Users)/", shown)
    assert all(o.get("name") != "stderr" for cell in cells for o in cell["outputs"])


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs_and_says_what_is_kept_but_for_what_it_trained(monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    # One device, as a reader has it, and this checkout's package.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path = os.pathsep.join([str(tiny.ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    book = nbformat.read(PATH, as_version=4)
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=folder).execute()
    made = [cell for cell in book.cells if cell.cell_type == "code"]
    for kept, now in zip(read(), made, strict=True):
        if "trains" not in kept["metadata"].get("tags", []):
            assert words(now) == words(kept), "".join(kept["source"])
