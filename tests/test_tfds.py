# SPDX-License-Identifier: Apache-2.0
"""A data set of tensorflow-datasets gives the rows that it was made of, without tensorflow."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiny
from test_tars import said, shards

from vlm_jax.__main__ import main
from vlm_jax.data import tfds
from vlm_jax.data.llava import Llava
from vlm_jax.data.sources import BadExample, Origin, open_source


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaVA file, its source, and the data set that was written from it."""
    folder = tmp_path_factory.mktemp("tfds")
    rows = shards(folder)
    both = {"id": "both", "image": ["1.png", "0.png"]}
    rows += [both | said("<image> or <image>?", "this"), {"id": "text"} | said("what?", "that")]
    (folder / "rows.json").write_text(json.dumps(rows))
    how = dict(images=str(folder), text_only=True, images_per_row=2)
    source = Llava(f"{folder}/rows.json", "train", **how)
    return folder, source, tfds.build(source, folder / "out")


def test_it_holds_what_the_file_holds(made):
    _, file, path = made
    source = tfds.Tfds(str(path), "train", text_only=True, images_per_row=2)
    assert len(source) == len(file) == 9
    moved = pickle.loads(pickle.dumps(source))
    for k in range(9):
        ours, theirs = source[k], file[k]
        assert (ours.id, ours.turns) == (theirs.id, theirs.turns)
        for one, other in zip(ours.images, theirs.images, strict=True):
            assert np.array_equal(source.images[one], file.images[other])
            assert np.array_equal(moved.images[one], file.images[other])
            assert source.images.name(one) == file.images.name(other)
    again = tfds.Tfds(str(path), "train", text_only=True, images_per_row=2)
    assert again.data_hash == source.data_hash


def test_tensorflow_is_not_imported(made):
    program = (
        f"import sys; from vlm_jax.data.tfds import Tfds; s = Tfds({str(made[2])!r}, 'train', "
        "text_only=True, images_per_row=2); s.images[0]; "
        "print([m for m in sys.modules if m.split('.')[0] == 'tensorflow'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=tiny.ROOT)  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_not_there_is_named(made, tmp_path):
    folder, source, path = made
    with pytest.raises(ValueError, match="no split 'val'.*it has train"):
        tfds.Tfds(str(path), "val")
    with pytest.raises(FileNotFoundError, match="no dataset_info.json"):
        tfds.Tfds(str(tmp_path), "train")
    with pytest.raises(ValueError, match="holds a data set already"):
        tfds.build(source, folder / "out")
    with pytest.raises(BadExample, match="2 images, and data.images_per_row=1"):
        tfds.Tfds(str(path), "train", text_only=True)


def test_an_image_that_cannot_be_decoded_is_found_when_it_is_read(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "x", "image": "x.png"} | said()]))
    source = Llava(f"{tmp_path}/rows.json", "train", images=str(tmp_path))
    path = tfds.build(source, tmp_path / "out")
    with pytest.raises(BadExample, match=r"record 0: image .*x\.png cannot be decoded"):
        tfds.Tfds(str(path), "train").images[0]
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadExample, match=r"x\.png is not there; replace"):
        tfds.build(source, tmp_path / "other")


def test_the_verb_builds_and_a_configuration_opens_it(tmp_path, capsys):
    shards(tmp_path)
    argv = ["data", "build", f"{tmp_path}/rows.json", "--split=val"]
    assert main(argv) == 2 and "--out is missing" in capsys.readouterr().err
    assert main([*argv, f"--out={tmp_path}/out"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["split"]) == (7, "val")
    place = told["path"].replace("/out/", "/{split}/")
    (tmp_path / "out").rename(tmp_path / "val")
    origin = Origin.of(tiny.config(data=dict(source="tfds", path=place)))
    assert len(open_source(origin, "val")) == 7
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"id": "bad"}]))
    assert main([*argv, f"--out={tmp_path}/bad"]) == 2
    assert "1 bad rows" in capsys.readouterr().err and not (tmp_path / "bad").exists()
