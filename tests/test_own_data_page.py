# SPDX-License-Identifier: Apache-2.0
"""The page of one's own data: its files open as it says, its commands have flags that exist."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
from PIL import Image

from configs import demo
from vlm_jax.data.sources import BadExample, Origin, open_source
from vlm_jax.training import fields
from vlm_jax.training.workdir import flat
from vlm_jax.verbs import configuration, parser

PAGE = (Path(tiny.ROOT) / "docs/your_own_data.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("vlm-jax ")
]


def opened(folder, text, **changed):
    """The source of a file with these rows, beside the images that are not said to be gone."""
    for name in re.findall(r"\w+\.(?:png|jpg)", text):
        if name != "gone.png":
            Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "rows.json").write_text(text)
    own = dict(source="llava", path=f"{folder}/rows.json", images=str(folder))
    return open_source(Origin.of(tiny.config(data=own | changed)), "train")


def test_the_rows_of_the_page_are_counted_as_it_says(tmp_path):
    said = json.loads(re.search(r"^data: (.*)$", PAGE, re.M)[1])
    source = opened(tmp_path, blocks("json")[0], on_bad_example="skip")
    ours = source.describe()
    assert ours.keys() == said.keys()
    assert [k for k in said if ours[k] != said[k]] == ["path"]
    told = "\n".join(source.notes()).replace(str(source.path), "runs/own/five.json")
    told = told.replace(str(tmp_path), "runs/own/images")
    assert all(line in PAGE for line in told.splitlines())
    assert [source[k].id for k in range(len(source))] == ["1", "2", "2#2"]


def test_the_rows_of_the_page_fail_as_it_says(tmp_path):
    with pytest.raises(BadExample) as raised:
        opened(tmp_path, blocks("json")[0])
    said = str(raised.value).replace(f"{tmp_path}/rows.json", "runs/own/five.json")
    assert said.replace(str(tmp_path), "runs/own/images") in PAGE


def test_the_row_of_several_images_is_one(tmp_path):
    row = blocks("json")[1]
    assert opened(tmp_path, row, images_per_row=2)[0].images == (0, 1)
    with pytest.raises(BadExample, match="raise that to 2"):
        opened(tmp_path, row)


def test_the_snippet_makes_the_rows_that_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[0], "page", "exec"), {})
    assert printed.getvalue() in PAGE and printed.getvalue().count("100 rows") == 2
    own = dict(source="llava", path="runs/own/{split}.json", images="runs/own/images")
    for split in ("train", "test"):
        assert len(open_source(Origin.of(tiny.config(data=own)), split).images) == 100


def test_the_page_has_commands_of_every_verb_that_it_needs():
    assert {line.split()[1] for line in COMMANDS} == {
        "train",
        "evaluate",
        "generate",
        "convert",
        "data",
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_can_be_read(line, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    _, verb, *argv = shlex.split(line)
    options = parser.parse([verb, *argv])
    if verb in parser.USES_CONFIG:
        default = demo.get_config() if verb == "evaluate" else None
        fields.check(flat(configuration.read(options.config, default=default).config))
