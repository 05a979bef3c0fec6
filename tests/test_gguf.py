# SPDX-License-Identifier: Apache-2.0
"""What is read of a GGUF file is what the format's own package reads; a damaged file is refused."""

import struct

import gguf as library
import made_ggufs
import numpy as np
import pytest

from vlm_jax.weights import adapters, gguf
from vlm_jax.weights.gguf import Rows

TYPES = [kind.name for kind in library.GGMLQuantizationType]
READ = [kind for kind in TYPES if kind in gguf.PLAIN or gguf.can_dequantize(kind)]
SHAPE = (6, 512)


def bytes_of(kind, draw):
    """Random bytes of a matrix; as the scale of a block they are small numbers."""
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return draw.integers(0, 0x38, (SHAPE[0], SHAPE[1] // block * size)).astype(np.uint8)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A file with a matrix of each type."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("gguf") / "every.gguf"
    about = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.a": 0.1, "llama.b": True,
        "llama.c": "ä\n", "llama.d": ["x", "", "日"], "llama.e": [1, -2], "llama.f": [0.5, 2.0],
    }  # fmt: skip
    return made_ggufs.write(
        path, about, {kind: bytes_of(kind, draw) for kind in READ}, {kind: kind for kind in READ}
    )


def test_metadata_and_numbers_of_every_type_are_those_of_the_package(every):
    metadata, tensors = gguf.read(every)
    fields = library.GGUFReader(every).fields
    assert metadata == {n: f.contents() for n, f in fields.items() if not n.startswith("GGUF.")}
    expected = made_ggufs.dequantized(every)
    assert tensors.keys() == expected.keys() and len(tensors) > 20
    for name, tensor in tensors.items():
        assert tensor.shape == SHAPE and tensor.dtype == gguf.PLAIN.get(name, np.float32)
        np.testing.assert_array_equal(tensor.read().astype("f4"), expected[name], err_msg=name)


@pytest.mark.parametrize("heads", [0, 3])
def test_any_part_is_that_part_of_the_whole(heads, every):
    draw = np.random.default_rng(1)
    for name in ("Q4_K", "Q8_0", "F16"):
        x = gguf.read(every)[1][name]
        tensor = Rows(x.path, x.offset, x.dtype, x.shape, x.kind, heads)
        whole = tensor.read().reshape(-1)
        # llama.cpp's order of rows: halves of a head interleaved.
        if heads:
            pairs = whole.reshape(heads, 2, -1, SHAPE[1]).swapaxes(1, 2)
            np.testing.assert_array_equal(pairs.reshape(SHAPE), x.read())
        for start, stop in np.sort(draw.integers(0, whole.size + 1, (30, 2))).tolist():
            np.testing.assert_array_equal(tensor.part(start, stop), whole[start:stop])


def test_an_adapter_is_added_to_numbers_that_are_dequantized(every):
    base = gguf.read(every)[1]["Q4_K"]
    a, b = np.ones((1, SHAPE[1]), "f4"), np.arange(SHAPE[0], dtype="f4")[:, None]
    np.testing.assert_array_equal(adapters.add_update(base, a, b, 2.0).read(), base.read() + 2 * b)


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(READ)))
def test_a_type_that_cannot_be_dequantized_is_refused_by_name(kind, tmp_path):
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    raw = np.zeros((2, 512 // block * size), np.uint8)
    if kind[0] in "IF":
        raw = raw.view({"I": "i", "F": "f"}[kind[0]] + str(size))
    path = made_ggufs.write(tmp_path / "a", {"general.architecture": "llama"}, {"a.weight": raw},
                            {"a.weight": kind})  # fmt: skip
    with pytest.raises(ValueError, match=f"'a.weight' is of type {kind}, which the package gguf"):
        gguf.read(path)


def test_a_file_that_is_cut_off_anywhere_is_refused(every, tmp_path):
    data, path = every.read_bytes(), tmp_path / "cut.gguf"
    header = library.GGUFReader(every).data_offset
    for length in [*range(0, header, 7), header, (header + len(data)) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut off|no GGUF file|damaged"):
            gguf.read(path)


def text(value):
    """A text as the format has it."""
    return struct.pack("<Q", len(value)) + value


def of(*values, version=3, tensors=0, count=None):
    """The beginning of a file with these values."""
    count = len(values) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(values)


HUGE = 2**60
SPLIT = [
    text(b"split.count") + struct.pack("<IH", 2, 3),
    text(b"split.no") + struct.pack("<IH", 2, 1),
]


@pytest.mark.parametrize("data, words", [
    (b"", "no GGUF file"), (b"PK\3\4" * 20, "no GGUF file"),
    (of(version=1), "GGUF version 1; supported are versions 2, 3"),
    (of(version=3 << 24), "in big-endian order"),
    (of(count=HUGE), "cut off"), (of(tensors=HUGE), "cut off"),
    (of(struct.pack("<Q", HUGE)), "cut off"),
    (of(text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)), "cut off"),
    (of(text(b"a") + struct.pack("<IIQ", 9, 0, HUGE)), "cut off"),
    (of(text(b"a") + struct.pack("<IIQ", 9, 9, HUGE)), "unknown kind 9"),
    (of(text(b"a") + struct.pack("<I", 77)), "unknown kind 77"),
    (of(text(b"\xff\xff")), "not UTF-8"),
    (of(*[text(b"a") + struct.pack("<II", 4, 1)] * 2), "'a' twice"),
    (of(*SPLIT), "is part 2 of 3: make one file of them"),
    (of(text(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment=0"),
    (of(text(b"a") + struct.pack("<IQIQ", 1, 64, 99, 0), tensors=1, count=0), "is of type 99"),
    (of(text(b"a") + struct.pack("<I", 9), tensors=1, count=0), "has 9 axes"),
    (of(text(b"a") + struct.pack("<IQIQ", 1, 33, 2, 0), tensors=1, count=0), "have 32 numbers"),
    (of(text(b"a") + struct.pack("<I4QIQ", 4, *[2**40] * 4, 0, 0), tensors=1, count=0), "damaged"),
    (of(text(b"a") + struct.pack("<IQIQ", 1, 32, 0, HUGE), tensors=1, count=0), "is cut off"),
], ids=range(20))  # fmt: skip
def test_a_file_that_is_damaged_is_one_line(data, words, tmp_path):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=words) as raised:
        gguf.read(tmp_path / "a.gguf")
    assert str(tmp_path / "a.gguf") in str(raised.value) and "\n" not in str(raised.value)
