# SPDX-License-Identifier: Apache-2.0
"""Files that strangers wrote: whatever is wrong is one line, soon, and in little memory."""

import io
import json
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_convert import edited, refused, run

from vlm_jax.__main__ import main
from vlm_jax.training import stages
from vlm_jax.weights import folder
from vlm_jax.weights.files import read_tensors
from vlm_jax.weights.pickles import read_torch
from vlm_jax.weights.stored import all_finite, equal

FROZEN = Path(__file__).parent / "published_weights"
SECONDS = 10  # for a refusal, on a machine that does much else besides
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def copy(tmp_path):
    """A frozen LLaVA that may be broken."""
    return Path(shutil.copytree(FROZEN / "clip_llama", tmp_path / "copy"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder of ours."""
    path = tmp_path_factory.mktemp("ours") / "model"
    assert run("--from", FROZEN / "clip_llama", "--to", path) == 0
    return path


def one_line(capsys, *argv):
    """The one line that `vlm-jax convert` refuses with."""
    begun = time.monotonic()
    said = refused(capsys, *argv)
    assert said.count("\n") == 1 and said.startswith("vlm-jax convert: "), said
    assert len(said) < 2000 and time.monotonic() - begun < SECONDS
    return said


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("raw, words", [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe{}", "is not JSON"),
    (b"[]", "an object with named fields"), (b"3", "an object with named fields"),
    (b"[" * 100_000, "nested 50 deep"), (b'{"a":' * 60 + b"1" + b"}" * 60, "nested 50 deep"),
    (b" " * (17 * 2**20), "no such file is longer"), (b'{"model_type": "a\\nb"}', "architecture"),
], ids=lambda x: str(x[:8]))  # fmt: skip
def test_a_configuration_that_is_no_json_object_is_one_line(raw, words, copy, capsys):
    (copy / "config.json").write_bytes(raw)
    said = one_line(capsys, "--from", copy)
    assert words in said and "config.json" in said


@pytest.mark.parametrize("field, values", [
    ("model_type", (["llava"], {}, 3, None)),
    ("text_config", ([], "x", 3)),
    ("vision_config__model_type", (["clip"], 3)),
    ("text_config__num_hidden_layers", (0, -1, "x", 1.5, 300_000, 10**9, True, [2])),
    ("vision_config__num_hidden_layers", (0, -1, "x", 300_000)),
    ("text_config__vocab_size", (0, "x", 10**30)),
    ("text_config__hidden_size", (0, 25, 10**8)),
    ("text_config__num_attention_heads", (0, 5)),
    ("vision_config__patch_size", (0, -8, "x", 25, [8, 4])),
    ("vision_config__image_size", (0, 10**9, 16, "x", [])),
    ("text_config__rope_parameters", (3, [], {"rope_type": ["x"]}, {"rope_type": "llama3"})),
    ("text_config__rope_theta", ("x", [], NAN)),
    ("text_config__rms_norm_eps", (NAN, INFINITE, "x", 0.0)),
    ("text_config__layer_types", ("x", 3, [["x"]])),
    ("vision_feature_layer", ("x", 4, -4, 10**30)),
    ("image_token_index", (-1, "x", 1.5)),
    ("tie_word_embeddings", ("yes", 1)),
])  # fmt: skip
def test_a_field_of_a_wrong_kind_is_named_before_anything_is_built(field, values, copy, capsys):
    config = (copy / "config.json").read_text()
    for value in values:
        (copy / "config.json").write_text(config)
        edited(copy, **{field: value})
        said = one_line(capsys, "--from", copy)
        assert "config.json" in said, (value, said)


def test_sizes_are_held_against_the_tensors_that_are_there(copy, capsys):
    for changes, words in (
        (dict(text_config__num_hidden_layers=3), "llm.depth (num_hidden_layers) = 3, and the "
         "tensors have 2"),
        (dict(vision_config__num_hidden_layers=9000), "vit.depth (num_hidden_layers) = 9000"),
        (dict(text_config__vocab_size=68), "llm.vocab (vocab_size) = 68, and llm.embed_tokens"),
        (dict(vision_config__image_size=240), "a tower of 30x30 patches"),
        (dict(text_config__num_key_value_heads=4), "num_key_value_heads, head_dim) = 24, and"),
    ):  # fmt: skip
        config = (copy / "config.json").read_text()
        edited(copy, **changes)
        assert words in one_line(capsys, "--from", copy)
        (copy / "config.json").write_text(config)


# --- an index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [
    None, [], 3, "x", {}, {"a": 3}, {"a": ["b"]}, {"a": "/etc/passwd"}, {"a": "../x.safetensors"},
    {"a": "/etc/passwd.safetensors"}, {"a": "sub/x.safetensors"}, {"a": ""}, {"a": ".."},
    {"a": "x.txt"}, {"a": "a\0b.safetensors"},
], ids=str)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(places, tmp_path, capsys):
    path = Path(shutil.copytree(FROZEN / "siglip_llama3", tmp_path / "copy"))
    # What it must not read would be read.
    shutil.copy(path / "model-00001-of-00003.safetensors", tmp_path / "x.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=places)))
    said = one_line(capsys, "--from", path)
    assert "model.safetensors.index.json: weight_map" in said


# --- safetensors ---------------------------------------------------------------------------------

GOOD = dict(dtype="F32", shape=[1], data_offsets=[0, 4])
HEADERS = [
    b"[]", b"3", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"\xff",
    {"x": 3}, {"x": []}, {"x": {}},
    *({"x": GOOD | dict(dtype=x)} for x in (["F32"], None, 3, "F99")),
    *({"x": GOOD | dict(shape=x)} for x in (
        "x", [-1], [1.0], [True], [2**70], {}, [[1]], [1] * 99)),
    *({"x": GOOD | dict(data_offsets=x)} for x in (
        ["0", "4"], [0.0, 4.0], [-4, 0], [0, 10**30], [False, 4], [0], [0, 4, 8], {}, [4, 0])),
    {"x": GOOD, "y": GOOD},
    b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],'
    b'"data_offsets":[0,4]}}',
    b'{"x":{"dtype":"F16","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda x: str(x)[:60])
def test_a_header_with_values_of_a_wrong_kind_is_one_line(header, copy, capsys):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "model.safetensors" in one_line(capsys, "--from", copy)


# --- pickles -------------------------------------------------------------------------------------


def torch_file(path, program, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", program)
    return path


@pytest.mark.parametrize("program, words", [
    (b"\x80\x02}r\xff\xff\xff\x7f.", ""),  # a place in the memo for which pickle takes 16 GB
    (b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.", "something else"),  # hashed, it overflows
    (b"\x80\x02" + b"}" * 600_000 + b".", "implausibly long"),
    (b"\x80\x02" + b"}" * (3 * 2**20) + b".", "implausibly long"),
    (b"\x80\x04\x8f.", "has the instruction EMPTY_SET"),
    (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "cut off"),
    (b"\x80\x02)R.", "cut off"), (b"\x80\x02h\x05.", "reads memo 5"), (b"", "cut off"),
    (b"\x80\x02)Q.", "is not as torch writes it"), (b"\x80\x02}}b.", ""),
    (b"I" + b"9" * 10_000 + b"\n.", "cut off"),
], ids=range(12))  # fmt: skip
def test_a_pickle_that_would_take_gigabytes_or_overflow_is_refused_soon(program, words, tmp_path):
    path, begun = torch_file(tmp_path / "x.bin", program), time.monotonic()
    if not words:
        assert read_torch(path) == {}
    else:
        with pytest.raises(ValueError, match=words) as raised:
            read_torch(path)
        assert str(path) in str(raised.value)
    assert time.monotonic() - begun < SECONDS


def test_a_compressed_pickle_and_a_long_directory_are_refused_unread(tmp_path):
    bomb = torch_file(tmp_path / "x.bin", b"\x80\x02" + b"}" * 10**6, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which torch never does"):
        read_torch(bomb)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 2**31, 0, 0)
    (tmp_path / "y.bin").write_bytes(b"PK\x03\x04" + end)
    with pytest.raises(ValueError, match="directory of 2147483648 bytes is implausibly long"):
        read_torch(tmp_path / "y.bin")


def test_a_damaged_pickle_is_refused_or_read_and_nothing_else(tmp_path):
    with zipfile.ZipFile(FROZEN / "mm_projector.bin") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (main,) = (name for name in parts if name.endswith("data.pkl"))
    draw, refusals = np.random.default_rng(0), 0
    for _ in range(300):
        program = bytearray(parts[main])
        for place in draw.integers(0, len(program), 3):
            program[place] = draw.integers(0, 256)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, bytes(program) if name == main else content)
        (tmp_path / "x.bin").write_bytes(file.getvalue())
        try:
            read_torch(tmp_path / "x.bin")
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 100


def test_hostile_files_take_less_than_a_gigabyte(tmp_path):
    """In a process whose memory is limited: what it may map besides what its libraries do."""
    header = b'{"a":[' + b"1," * (2**21 - 9) + b"1]}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    torch_file(tmp_path / "x.bin", b"\x80\x02}r\xff\xff\xff\x7f" + b"}" * 10**6 + b".")
    program = (
        "import resource, sys\n"
        "from vlm_jax.weights.files import read_tensors\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        read_tensors(path)\n"
        "    except ValueError as error:\n"
        "        print('refused')\n"
    )
    files = [str(tmp_path / name) for name in ("x.safetensors", "x.bin")]
    done = subprocess.run([sys.executable, "-c", program, *files], cwd=tiny.ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stdout == "refused\n" * 2, done.stderr


# --- an adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(r=0), dict(r="x"), dict(r=1), dict(lora_alpha=NAN), dict(lora_alpha="x"),
    dict(target_modules=3), dict(target_modules=[3]), dict(target_modules="("),
    dict(target_modules=r"(.|.)*\d"), dict(peft_type=["LORA"]), dict(use_rslora="x"),
    dict(quantization_config=dict(quant_method="gptq")),
], ids=str)  # fmt: skip
def test_an_adapter_of_a_wrong_kind_is_one_line(changes, tmp_path, capsys):
    path = Path(shutil.copytree(FROZEN / "clip_llama_adapter", tmp_path / "adapter"))
    settings = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(settings))
    one_line(capsys, "--from", FROZEN / "clip_llama", "--adapter-from", path)


# --- a model folder of ours ----------------------------------------------------------------------


def broken(whole, path, field, value):
    """A model folder with one field of its config.json changed, or without it."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    config = json.loads((path / "config.json").read_text())
    *parts, last = field.split(".")
    of = config
    for part in parts:
        of = of[part]
    of[last] = value
    if value is None:
        del of[last]
    (path / "config.json").write_text(json.dumps(config))
    return path


FIELDS = [
    ("vit", []), ("vit.depth", 300_000), ("vit.width", "x"), ("vit.levels", "x"),
    ("vit.levels", [True]), ("vit.image_size", 10**9), ("vit.patch_size", None), ("llm", None),
    ("llm.heads", 3), ("llm.depth", 0), ("llm.norm_eps", NAN), ("llm.tied_embeddings", 1),
    ("llm.strange", 1), ("compressor.kind", "nope"), ("compressor.tokens", 10**7),
    ("compressor.queries", 10**7), ("facts", None), ("facts.image", {}), ("facts.image.fit", "x"),
    ("facts.image.std", [0, 1, 1]), ("facts.template", 3), ("facts.max_length", "x"),
    ("notes", 3), ("model_type", ["vlm_jax"]), ("format", 2),
]  # fmt: skip


def test_a_damaged_model_folder_is_one_line_to_every_verb(whole, tmp_path, capsys):
    for field, value in FIELDS:
        path = broken(whole, tmp_path / "broken", field, value)
        said = one_line(capsys, "--from", path)
        assert main(["generate", f"--checkpoint={path}", "--prompt=a"]) == 2
        asked = capsys.readouterr().err
        assert asked.startswith("vlm-jax generate: ") and asked.count("\n") == 1, (field, asked)
        with pytest.raises(ValueError):
            stages.with_start(tiny.config(start_from=str(path)))
        if field not in ("model_type",):
            assert said.split(": ", 1)[1] == asked.split(": ", 1)[1], field


def test_a_field_that_an_older_folder_lacks_has_the_value_that_changed_nothing(whole, tmp_path):
    for field in ("vit.class_token", "llm.qk_norm", "compressor.queries", "facts.image.rescale"):
        path = broken(whole, tmp_path / "older", field, None)
        assert folder.read(path).config() == folder.read(whole).config()


def test_a_model_folder_without_its_tensors_is_refused(whole, tmp_path, capsys):
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    tensors = load_file(path / "model.safetensors")
    words = tensors.pop("llm.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors")
    assert main(["generate", f"--checkpoint={path}", "--prompt=a"]) == 2
    assert "has no tensor llm.embed_tokens.weight" in capsys.readouterr().err
    tensors |= {"llm.embed_tokens.weight": words}
    tensors |= {"llm.layers.1.mlp.up_proj.weight": np.full((40, 24), NAN, "f4")}
    save_file(tensors, path / "model.safetensors")
    assert main(["generate", f"--checkpoint={path}", "--prompt=a"]) == 2
    said = capsys.readouterr().err
    assert "llm.layers.1.mlp.up_proj.weight holds NaN or infinite" in said


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("dtype", ["f2", "f4", ml_dtypes.bfloat16], ids=str)
def test_a_weight_that_is_no_number_is_refused_with_its_name(dtype, bad, copy, tmp_path, capsys):
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors = {n: x.astype(dtype) for n, x in tensors.items()}
    tensors[name][-1, -1] = bad
    save_file(tensors, copy / "model.safetensors")
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a")
    assert "model.safetensors: llm.layers.1.mlp.down_proj.weight holds NaN or infinite" in said
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16], ids=str)
def test_every_number_is_finite_but_the_infinite_and_nan(dtype):
    largest = ml_dtypes.finfo(dtype).max
    numbers = np.array([0, -1, largest, -largest, ml_dtypes.finfo(dtype).tiny], dtype)
    assert all_finite(numbers) and all_finite(numbers[:0])
    for bad in (NAN, -NAN, INFINITE, -INFINITE):
        assert not all_finite(np.append(numbers, np.array(bad, dtype)))


def test_two_tensors_are_equal_where_their_numbers_are(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_jax.weights.stored.BLOCK", 7)
    one = np.arange(60, dtype="f4").reshape(6, 10)
    save_file(dict(a=one, b=one.astype("f2"), c=one + (one == 59), d=one.T.copy()),
              tmp_path / "x.safetensors")  # fmt: skip
    found = read_tensors(tmp_path / "x.safetensors")
    assert equal(found["a"], found["b"]) and equal(found["a"], one)
    assert not equal(found["a"], found["c"]) and not equal(found["a"], found["d"])
