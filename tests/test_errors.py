# SPDX-License-Identifier: Apache-2.0
"""Errors become one line that a person can act on."""

import errno
import re
from pathlib import Path

from vlm_jax import errors


def failed(path, mode="r"):
    try:
        open(path, mode)
    except OSError as error:
        return error


def test_what_goes_wrong_with_a_file_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    said = {
        failed(tmp_path / "none"): f"there is no file {tmp_path}/none",
        failed(tmp_path / "no/where", "w"): f"there is no folder {tmp_path}/no",
        failed(tmp_path): f"{tmp_path} is a folder, not a file",
        failed(tmp_path / "file/x"): f"{tmp_path}/file/x is inside something that is not a folder",
        PermissionError(errno.EACCES, "no", "x"): "x cannot be opened: give this user permission",
        OSError(errno.ENOSPC, "no", "x"): "no space is left for x: make room",
        OSError(errno.EIO, "Input/output error", "x"): "x: Input/output error",
        OSError("a sentence of ours"): "a sentence of ours",
    }
    for error, words in said.items():
        assert errors.sentence(error).startswith(words) and "Errno" not in errors.sentence(error)


def test_an_error_is_one_line_without_the_spelling_of_a_program():
    assert errors.sentence(KeyError("no such thing")) == "no such thing"
    assert errors.sentence(ValueError(f"{[Path('a/b')]} is bad")) == "[a/b] is bad"
    assert errors.sentence(ValueError("first\n  second")) == "first second"
    assert errors.sentence(ValueError()) == "ValueError"
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n\nand pages")):
        assert re.match("out of memory.*: make the batch smaller", errors.sentence(error))
        assert "\n" not in errors.sentence(error)


def test_the_nearest_known_word_is_suggested_where_one_is_near():
    assert errors.suggestion("detph", ("width", "depth")) == ", did you mean depth?"
    assert errors.suggestion("colour", iter(("width", "depth"))) == ""
