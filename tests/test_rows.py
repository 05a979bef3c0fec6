# SPDX-License-Identifier: Apache-2.0
"""Files of rows: what spoils a row costs that row; how the file is written costs none."""

import codecs
import hashlib
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import base
from vlm_jax.data.example import BadExample
from vlm_jax.data.paths import Folder, existing_path
from vlm_jax.data.rows import own_ids, read_rows
from vlm_jax.data.sources import Origin, open_source

DEEP = "[" * 100_000 + "]" * 100_000


def row(k, **changed):
    said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"a {k}"}]
    return {"id": f"r{k}", "image": f"{k}.jpg", "conversations": said, **changed}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{k}.jpg")
    return tmp_path


def opened(folder, data, **fields):
    """The rows as a source; `data` is the content of the file, or its rows."""
    path = folder / "rows.json"
    data = data if isinstance(data, (str, bytes)) else json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    config = base.get_config()
    config.data.path, config.data.images = str(path), str(folder / "images")
    with config.unlocked():
        config.data.update(fields)
    return open_source(Origin.of(config), "train")


def ids(source):
    return [source[i].id for i in range(len(source))]


def test_rows_that_repeat_an_id_are_all_there_with_ids_of_our_own(folder, caplog):
    rows = [row(0), row(1, id="r0"), row(2, id=7), row(3, id="7"), row(4, id="r0")]
    source = opened(folder, rows)
    assert ids(source) == ["r0", "r0#2", "7", "7#2", "r0#3"]
    assert [source[i].given for i in range(5)] == ["", "r0", "", "7", "r0"]
    assert [source[i].turns[0][1] for i in range(5)] == [f"a {k}" for k in range(5)]
    assert source.describe()["repeated_ids"] == 3 and source.describe()["left_out"] == {}
    assert "3 rows have the id of an earlier row" in caplog.text


@pytest.mark.parametrize("value", [None, "", float("nan"), True, {"a": 1}, [1]])
def test_a_row_without_an_id_gets_one(value, folder, caplog):
    rows = [row(0), row(1, id=value), row(2)]
    if value is None:
        del rows[1]["id"]
    source = opened(folder, rows)
    assert ids(source) == ["r0", "#1", "r2"] and source.describe()["missing_ids"] == 1
    assert "1 rows have no id" in caplog.text


@given(st.lists(st.sampled_from(["a", "a#2", "a#2#2", "#0", "#3", "#3#2", None, 1, "1"])))
def test_own_ids_are_unique_and_the_first_to_give_an_id_keeps_it(values):
    made = own_ids(values)
    assert len(set(made.own)) == len(values)
    seen = set()
    for value, own, told in zip(values, made.own, made.given, strict=True):
        if value is not None and str(value) not in seen:
            assert (own, told) == (str(value), "")
        elif value is not None:
            # Never an id that a row of the file has.
            assert own not in map(str, values) and told == str(value)
        seen.add(str(value))


def test_an_id_does_not_depend_on_which_rows_are_bad(folder):
    rows = [row(0, image="gone.jpg"), row(1, id="r0"), row(2)]
    source = opened(folder, rows, on_bad_example="skip")
    assert ids(source) == ["r0#2", "r2"]


FORMS = {
    "a list": lambda rows: json.dumps(rows).encode(),
    "a list with a byte order mark": lambda rows: codecs.BOM_UTF8 + json.dumps(rows).encode(),
    "UTF-16": lambda rows: json.dumps(rows).encode("utf-16"),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "lines of Windows, blank ones between": lambda rows: (
        codecs.BOM_UTF8 + "\r\n\r\n".join(map(json.dumps, rows)).encode() + b"\r\n"
    ),
    "lines with line separators in texts": lambda rows: "\n".join(
        json.dumps(r, ensure_ascii=False) for r in rows
    ).encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_read_by_its_content(name, folder):
    rows = [row(k) for k in range(4)]
    rows[2]["conversations"][1]["value"] = "one\u2028two\u0085three"
    source = opened(folder, FORMS[name](rows))
    assert ids(source) == ["r0", "r1", "r2", "r3"]
    assert source[2].turns[0][1] == "one\u2028two\u0085three"


def test_one_line_is_one_row(folder):
    assert ids(opened(folder, json.dumps(row(3)))) == ["r3"]


BAD_LINES = {
    "cut short": (json.dumps(row(1))[:40], "json"),
    "no JSON": ("rows:", "json"),
    "of two values": (json.dumps(row(1)) + " 7", "json"),
    "nested too deep": (DEEP, "json"),
    "of a list": ("[]", "row"),
    "with a key twice": (
        json.dumps(row(1)).replace('"r1"', '"r1", "image": "2.jpg"'),
        "repeated_key",
    ),
    "of another alphabet": (json.dumps(row(1)).encode().replace(b"what", b"wh\xe4t"), "text"),
    "with zero bytes": (json.dumps(row(1)).replace("what", "wh\x00t"), "json"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_a_bad_row(name, first, folder, caplog):
    line, kind = BAD_LINES[name]
    line = line if isinstance(line, bytes) else line.encode()
    lines = [json.dumps(row(k)).encode() for k in range(4)]
    lines[0 if first else 1] = line
    data = b"\n".join(lines)
    with pytest.raises(BadExample, match=f"rows.json, line {1 if first else 2} .*on_bad_example"):
        opened(folder, data)
    source = opened(folder, data, on_bad_example="skip")
    assert source.describe()["left_out"] == {kind: 1} and len(source) == 3
    assert "1 of 4 rows are left out" in caplog.text and "line" in caplog.text


def test_a_row_of_a_list_that_is_nested_too_deep_is_a_bad_row(folder):
    rows = [json.dumps(row(k, extra='a "quoted" [ { , \\ ')) for k in range(5)]
    rows[3] = '{"id": "r3", "conversations": ' + DEEP + "}"
    data = "[" + ", ".join(rows) + "]"
    with pytest.raises(BadExample, match="rows.json, row 3 .*nested too deep"):
        opened(folder, data)
    source = opened(folder, data, on_bad_example="skip")
    assert ids(source) == ["r0", "r1", "r2", "r4"]


def test_a_key_that_comes_twice_is_a_bad_row_where_it_is_read(folder):
    turn = json.dumps(row(1)).replace('"value": "a 1"', '"value": "a 1", "value": "b"')
    unread = json.dumps(row(2, more={"a": 1})).replace('"a": 1', '"a": 1, "a": 2')
    data = f"[{json.dumps(row(0))}, {turn}, {unread}]"
    with pytest.raises(BadExample, match="row 1 .*turn 2 has 'value' more than once"):
        opened(folder, data)
    assert ids(opened(folder, data, on_bad_example="skip")) == ["r0", "r2"]


def test_a_list_that_was_cut_short_is_not_taken_for_lines(folder):
    text = "[\n" + ",\n".join(json.dumps(row(k)) for k in range(4)) + "\n"
    with pytest.raises(ValueError, match="not JSON, or cut short"):
        opened(folder, text, on_bad_example="skip")


def test_the_hash_of_a_file_is_that_of_its_bytes(folder):
    source = opened(folder, [row(k) for k in range(3)])
    # What runs of this data said before ids of our own were made.
    rows = read_rows(folder / "rows.json")
    assert source.data_hash == hashlib.sha256(f"{rows.sha256} False {{}}".encode()).hexdigest()


COMPOSED, APART = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("stored, asked", [(COMPOSED, APART), (APART, COMPOSED)])
def test_a_name_is_found_in_either_spelling(stored, asked, folder):
    assert stored != asked
    (folder / "images" / stored).mkdir()
    path = folder / "images" / stored / f"{stored}.jpg"
    Image.new("RGB", (6, 4)).save(path)
    rows = [row(0), row(1, image=f"{asked}/{asked}.jpg"), row(2, image=f"{asked}/{asked}.png")]
    source = opened(folder, rows)
    assert source.images[1].shape == (4, 6, 3)
    # The second time under another suffix, too: one file, one image.
    assert [source[i].image for i in range(3)] == [0, 1, 1]
    described = source.describe()
    assert (described["respelled_images"], described["renamed_images"]) == (1, 1)
    assert existing_path(folder / "images" / asked / f"{asked}.jpg") == path
    with pytest.raises(BadExample, match="no image"):
        opened(folder, [row(1, image=f"{asked.upper()}/{asked}.jpg")])


def test_of_two_files_that_are_spelled_differently_each_is_itself(tmp_path):
    for name in (COMPOSED, APART):
        (tmp_path / name).touch()
    folder = Folder(tmp_path)
    assert [folder.find(name) for name in (COMPOSED, APART)] == [
        str(tmp_path / COMPOSED),
        str(tmp_path / APART),
    ]
    assert folder.respelled == 0 and folder.find("cafe") is None
