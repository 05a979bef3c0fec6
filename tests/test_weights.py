# SPDX-License-Identifier: Apache-2.0
"""Files of weights: read as their libraries write them, in pieces; refused where cut or unsafe."""

import collections
import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from safetensors.numpy import load_file, save_file

from vlm_jax.weights import names, stored
from vlm_jax.weights.files import read_tensors
from vlm_jax.weights.pickles import read_torch
from vlm_jax.weights.stored import Pending, read_safetensors, write_safetensors

FROZEN = Path(__file__).parent / "published_weights"
DTYPES = [np.dtype(x) for x in ("f4", "f2", ml_dtypes.bfloat16, "i8", "u1", "?")]


@given(some.lists(some.tuples(some.lists(some.integers(0, 5), max_size=3),
                              some.sampled_from(DTYPES)), min_size=1, max_size=6))  # fmt: skip
def test_the_format_is_read_and_written_as_its_library_does(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    tensors = {
        f"t{k}": np.asarray(9 * draw.normal(size=shape)).astype(dtype)
        for k, (shape, dtype) in enumerate(shapes)
    }
    save_file(tensors, path / "theirs.safetensors")
    found = read_safetensors(path / "theirs.safetensors")
    pending = [Pending(n, x.dtype, x.shape, found[n].pieces) for n, x in tensors.items()]
    write_safetensors(path, pending)
    again = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        for got in (found[name].read(), again[name]):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert got.tobytes() == tensor.tobytes()


def test_pieces_and_rows_are_parts_of_the_whole(tmp_path, monkeypatch):
    whole = np.arange(70, dtype="f4").reshape(7, 10)
    save_file({"x": whole}, tmp_path / "x.safetensors")
    tensor = read_safetensors(tmp_path / "x.safetensors")["x"]
    monkeypatch.setattr(stored, "PIECE", 44)
    pieces = list(tensor.pieces())
    assert max(piece.nbytes for piece in pieces) <= 44
    np.testing.assert_array_equal(np.concatenate(pieces), whole.reshape(-1))
    np.testing.assert_array_equal(tensor.read(2, 5), whole[2:5])


@given(some.data())
def test_a_file_cut_off_anywhere_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file({"x": np.ones((4, 5), "f4"), "y": np.ones(3, "f2")}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(some.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="cut off"):
        read_safetensors(path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"x": 3}', b'{"x": {"dtype": "F32"}}'])
def test_a_header_that_describes_no_tensors_is_refused(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_safetensors(path)


def test_overlapping_tensors_and_unknown_types_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for header, words in (
        (
            b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
            "the header contradicts itself",
        ),
        (b'{"x":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', "dtype F4: weights may be"),
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(ValueError, match=words):
            read_safetensors(path)


def test_shards_hold_at_most_what_was_asked_and_are_found_by_their_index(tmp_path):
    tensors = {f"t{k}": np.full((k + 1, 10), k, "f4") for k in range(6)}
    pending = [Pending(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in tensors.items()]
    write_safetensors(tmp_path, pending, shard=200)
    sizes = [sum(x.nbytes for x in load_file(f).values()) for f in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2 and all(size <= 240 for size in sizes)  # the largest tensor has 240
    found = read_tensors(tmp_path)
    assert all(np.array_equal(found[name].read(), x) for name, x in tensors.items())


# --- pickles -------------------------------------------------------------------------------------


class Harmless:
    """On loading, an ordinary unpickler makes the file that `path` names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def torch_like(path, content):
    """A file in torch's zip format around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        archive.writestr("archive/byteorder", "little")
    return path


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    path = torch_like(tmp_path / "x.bin", {"w": Harmless(tmp_path / "ran")})
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / "ran").exists()  # the trap works
    (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match=r"asks for \S+, .*it could run code"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("word", ["os\nsystem", "builtins\neval", "torch\nload", "posix\nsystem",
                                  "collections\nChainMap"])  # fmt: skip
def test_every_word_but_those_of_tensors_is_refused(word, tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"c{word}\n(S'exit 3'\ntR.".encode())
    with pytest.raises(ValueError, match="is refused"):
        read_torch(path)


def test_a_pickle_outside_the_zip_format_is_not_even_opened(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": Harmless(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="refused unread"):
        read_tensors(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    for content in ([1, 2], {"step": 3}, collections.OrderedDict(w=[1.0])):
        with pytest.raises(ValueError, match="something else than named tensors"):
            read_torch(torch_like(tmp_path / "x.bin", content))


def test_a_pickle_cut_off_anywhere_is_refused(tmp_path):
    whole = (FROZEN / "mm_projector.bin").read_bytes()
    path = tmp_path / "x.bin"
    for length in range(4, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut off"):
            read_torch(path)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, one", [
    ("model.layers.0.mlp.up_proj.weight", "llm.layers.0.mlp.up_proj.weight"),
    ("lm_head.weight", "llm.lm_head.weight"),
    ("language_model.lm_head.weight", "llm.lm_head.weight"),
    ("language_model.model.norm.weight", "llm.norm.weight"),
    ("model.language_model.norm.weight", "llm.norm.weight"),
    ("vision_model.pre_layrnorm.bias", "vit.pre_layrnorm.bias"),
    ("vision_tower.vision_model.head.probe", "vit.head.probe"),
    ("model.vision_tower.embeddings.class_embedding", "vit.embeddings.class_embedding"),
    ("model.vision_tower.vision_tower.vision_model.post_layernorm.bias", "vit.post_layernorm.bias"),
    ("multi_modal_projector.linear_2.bias", "compressor.2.bias"),
    ("model.multi_modal_projector.linear_1.bias", "compressor.0.bias"),
    ("model.mm_projector.0.clip_attn.in_proj_bias", "compressor.0.clip_attn.in_proj_bias"),
    ("base_model.model.model.mm_projector.2.bias", "compressor.2.bias"),
    ("model.query_abstractor.pos_embed", "compressor.pos_embed"),
    ("encoder.layers.3.mlp.fc1.bias", "vit.encoder.layers.3.mlp.fc1.bias"),
    ("logit_scale", "logit_scale"),
])  # fmt: skip
def test_every_layout_comes_to_one_name(name, one):
    assert names.canonical(name) == one == names.canonical(one)


def test_two_tensors_of_one_meaning_are_refused():
    with pytest.raises(ValueError, match="two tensors mean llm.norm.weight"):
        names.by_canonical_name({"model.norm.weight": 1, "language_model.model.norm.weight": 2})


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in "ab":
        save_file({"x": np.ones(2, "f4")}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="has x twice: in b.safetensors"):
        read_tensors(tmp_path)
    shutil.rmtree(tmp_path)
