# SPDX-License-Identifier: Apache-2.0
"""A picture of any format is right or refused in one sentence, whatever is done to its file."""

import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from vlm_jax.data.example import BadExample
from vlm_jax.data.pictures import MOST_ELONGATED, TURNS, read_image
from vlm_jax.serving.requests import picture

# PIL warns of much that it reads all the same.
pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(height=13, width=17, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (height, width, 3)).astype(np.uint8)


def read(path, **how):
    return read_image(str(path), "row 7", "replace it", **how)


# --- Numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled_and_not_cut(suffix, tmp_path):
    """White is white, and the 16-bit form of an 8-bit picture is that picture."""
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    assert (read(tmp_path / f"a.{suffix}") == gray[..., None]).all()
    between = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    Image.fromarray(between).save(tmp_path / f"b.{suffix}")
    assert read(tmp_path / f"b.{suffix}")[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_every_order_and_width_of_wide_numbers_is_read(tmp_path):
    gray = drawn()[..., 0]
    wide = gray.astype(np.uint16) * 257
    for kind in ("<u2", ">u2"):
        image = Image.fromarray(wide.astype(kind))
        image.save(tmp_path / "a.tif")
        assert (picture(image) == gray[..., None]).all() and image.mode.startswith("I;16")
        assert (read(tmp_path / "a.tif") == gray[..., None]).all()
    # The PNG of 16-bit colors: PIL keeps the upper eight bits.
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in drawn().astype(np.uint16) * 257)
    head = struct.pack(">IIBBBBB", 17, 13, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png((b"IHDR", head), (b"IDAT", zlib.compress(rows))))
    assert (read(tmp_path / "a.png") == drawn()).all()
    # Twelve bits, and 16 with white at 0, which PIL hands on as they are in the file.
    for bits, photometric, made in ((16, 0, 255 - gray), (16, 1, gray)):
        image = Image.fromarray(wide)
        image.save(tmp_path / "b.tif", tiffinfo={262: photometric, 258: bits})
        assert (read(tmp_path / "b.tif") == made[..., None]).all()
    (tmp_path / "c.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">HHH", 0, 512, 1023))
    assert read(tmp_path / "c.pgm")[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_32_bits_have_no_white(kind, tmp_path):
    image = Image.fromarray(np.full((4, 5), 300, kind))
    image.save(tmp_path / "a.tif")
    with pytest.raises(BadExample, match="a.tif has numbers of 32 bits.*8 or 16 bits; replace it"):
        read(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="the PIL image has numbers of 32 bits"):
        picture(image)


def test_transparency_is_dropped_and_colors_stay(tmp_path):
    """As the published code drops it: what is transparent is shown."""
    colors = drawn()
    image = Image.fromarray(colors)
    image.putalpha(Image.fromarray(drawn(seed=1)[..., 0]))
    image.save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == colors).all() and (picture(image) == colors).all()
    few = Image.fromarray(colors // 128 * 200).quantize(8)
    for transparency in (0, bytes(range(0, 80, 10))):
        few.save(tmp_path / "b.png", transparency=transparency)
        assert (read(tmp_path / "b.png") == np.asarray(few.convert("RGB"))).all()
        few.info["transparency"] = transparency
        assert (picture(few) == np.asarray(few.convert("RGB"))).all()
        assert few.info.pop("transparency") == transparency  # the caller's image is untouched
    for mode in ("LA", "PA", "La", "RGBa", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "P"):
        assert picture(Image.new(mode, (3, 2))).shape == (2, 3, 3)
    half = Image.new("RGBA", (1, 1), (200, 100, 50, 128)).convert("RGBa")
    assert np.abs(picture(half).astype(int) - (200, 100, 50)).max() <= 1  # opacity divided out


# --- Orientation ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_an_orientation_is_applied_or_ignored_as_one_says(suffix, turn, tmp_path):
    upright = Image.fromarray(np.kron(drawn(2, 3), np.ones((16, 16, 1), np.uint8)))
    back = {6: 8, 8: 6}.get(turn, turn)  # of all others twice is nothing
    lying = upright.transpose(TURNS[back]) if turn > 1 else upright
    exif = lying.getexif()
    exif[0x0112] = turn
    lossless = dict(quality=95, subsampling=0) if suffix == "jpg" else {}
    lossless = dict(lossless=True) if suffix == "webp" else lossless
    path = tmp_path / f"a.{suffix}"
    lying.save(path, exif=exif, **lossless)
    near = 12 if suffix == "jpg" else 0

    def like(made, expected):
        assert made.shape == np.asarray(expected).shape
        assert np.abs(made.astype(int) - np.asarray(expected).astype(int)).max() <= near

    like(read(path, exif="apply"), upright)
    like(picture(path), upright)
    with Image.open(path) as image:
        like(picture(image), upright)
    # PIL turns a TIFF itself: nobody who reads with it sees how that one lies.
    like(read(path), upright if suffix == "tif" else lying)
    like(picture(path, exif="ignore"), upright if suffix == "tif" else lying)


def test_an_orientation_that_is_none_changes_nothing(tmp_path):
    image = Image.fromarray(drawn())
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
        b"Exif\0\0junk",
    ):
        image.save(tmp_path / "a.png", exif=exif)
        assert (read(tmp_path / "a.png", exif="apply") == drawn()).all()


# --- What is no picture -----------------------------------------------------------------------


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "page").write_text("<html>404</html>")
    (tmp_path / "link").symlink_to("link")
    os.mkfifo(tmp_path / "pipe")
    for name, words in dict(
        empty="is empty: 0 bytes", folder="is a folder", pipe="is a pipe or a device",
        page="it is damaged, or no picture", gone="is not there", link="cannot be read: Too many",
    ).items():  # fmt: skip
        with pytest.raises(BadExample, match=f"^row 7: image .*{name} .*{words}.*; replace it$"):
            read(tmp_path / name)
    with pytest.raises(BadExample, match="null"):
        read("a\0b")
    with pytest.raises(BadExample, match="is a pipe or a device"):
        read("/dev/zero")


def test_a_program_that_draws_a_picture_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadExample, match="PostScript"):
        read(tmp_path / "a.png")


def png(*chunks):
    """A PNG of chunks with their names, in order."""
    made = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        made += struct.pack(">I", len(body)) + name + body
        made += struct.pack(">I", zlib.crc32(name + body))
    return made


def with_chunk(chunk, *, late):
    """The picture as a PNG with a chunk before its pixels, or behind them."""
    kept = io.BytesIO()
    Image.fromarray(drawn()).save(kept, "PNG")
    body = kept.getvalue()
    at = body.index(b"IEND" if late else b"IDAT") - 4
    return body[:at] + png(chunk)[8:-12] + body[at:]


@pytest.mark.parametrize("late", [False, True])
def test_a_sound_picture_with_a_large_text_is_used(late, tmp_path):
    large = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    many = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK // 2))
    bounds = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    for chunk in (
        (b"zTXt", b"Comment\0\0" + large),
        (b"iTXt", b"Comment\0\1\0\0\0" + large),
        (b"iCCP", b"profile\0\0" + large),
        (b"tEXt", b"Comment\0" + b"a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)),
    ):
        (tmp_path / "a.png").write_bytes(with_chunk(chunk, late=late))
        assert (read(tmp_path / "a.png") == drawn()).all(), chunk[0]
    body, one = with_chunk((b"tEXt", b"a\0b"), late=late), png((b"zTXt", b"C\0\0" + many))[8:-12]
    at = body.index(b"tEXt") - 4
    (tmp_path / "b.png").write_bytes(body[:at] + 200 * one + body[at:])
    assert (read(tmp_path / "b.png") == drawn()).all()
    # The bounds, which are the process's, are as they were; a damaged one is still damaged.
    assert bounds == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    (tmp_path / "c.png").write_bytes(with_chunk((b"zTXt", b"C\0\0" + large), late=False)[:-300])
    with pytest.raises(BadExample, match="c.png cannot be decoded"):
        read(tmp_path / "c.png")


def test_sizes_that_a_small_file_claims_are_refused_before_they_are_allocated(tmp_path):
    then, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (20_000, 1 << 30):
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(png((b"IHDR", head), (b"IDAT", zlib.compress(b"\0"))))
        (tmp_path / "a.gif").write_bytes(
            b"GIF89a" + struct.pack("<HHBBB", min(side, 65535), 65535, 0, 0, 0) + b"\x3b"
        )
        (tmp_path / "a.ppm").write_bytes(b"P6 %d %d 255\n" % (side, side))
        for name in ("a.png", "a.gif", "a.ppm"):
            with pytest.raises(BadExample, match=f"{name} .*decode"):
                read(tmp_path / name)
    assert time.perf_counter() - then < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    Image.new("L", (MOST_ELONGATED + 1, 1)).save(tmp_path / "b.png")
    with pytest.raises(BadExample, match="101 x 1 pixels, more than 100 times as long as wide"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("error", [
    ValueError, RuntimeError, OverflowError, MemoryError, SyntaxError, struct.error, zlib.error,
    RecursionError, Image.DecompressionBombError, Image.DecompressionBombWarning, EOFError,
    AssertionError, KeyError, TypeError,
])  # fmt: skip
def test_whatever_a_decoder_raises_is_a_fault_of_the_picture(error, tmp_path, monkeypatch):
    Image.fromarray(drawn()).save(tmp_path / "a.bmp")

    def load(self):
        raise error("two\nlines")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(BadExample, match="row 7: image .*a.bmp cannot be decoded: .*; replace it"):
        read(tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as image:
        with pytest.raises(ValueError, match="PIL image cannot be decoded") as said:
            picture(image)
    assert "\n" not in str(said.value)


# --- Damage -----------------------------------------------------------------------------------

FORMATS = {
    "png": {}, "jpg": {}, "gif": {}, "bmp": {}, "webp": dict(lossless=True), "tif": {}, "ppm": {},
    "dds": {}, "sgi": {}, "ico": {}, "avif": {}, "jp2": {}, "tga": {}, "pcx": {}, 
    "im": {}, "msp": {}, "qoi": {}, "jpeg2": {}, "tif2": {}, "gif2": {}, "pfm": {},
}  # fmt: skip


def sound(kind):
    """The bytes of a small picture in a format."""
    image, kept = Image.fromarray(drawn(33, 34)), io.BytesIO()
    if kind == "jpeg2":
        image.save(kept, "JPEG", progressive=True)
    elif kind == "tif2":
        image.save(kept, "TIFF", compression="tiff_lzw")
    elif kind == "gif2":
        image.save(kept, "GIF", save_all=True, append_images=[Image.fromarray(drawn(33, 34, 1))])
    elif kind == "msp":
        image.convert("1").save(kept, "MSP")
    elif kind == "pfm":
        image.convert("F").save(kept, "PPM")
    else:
        image.save(kept, Image.registered_extensions()[f".{kind}"], **FORMATS[kind])
    return kept.getvalue()


def damaged(body, draw):
    """One of many ways in which a file is not what it was."""
    made, way = bytearray(body), draw.integers(5)
    if way == 0:
        return bytes(made[: draw.integers(1, len(made))])
    if way == 1:  # a header's numbers, at their limits
        at = int(draw.integers(min(len(made), 64)))
        made[at : at + 4] = draw.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
    elif way == 2:
        for _ in range(draw.integers(1, 20)):
            made[draw.integers(len(made))] = draw.integers(256)
    elif way == 3:
        at = int(draw.integers(len(made)))
        del made[at : at + int(draw.integers(1, 40))]
    else:
        at = int(draw.integers(len(made)))
        made[at:at] = draw.bytes(int(draw.integers(1, 40)))
    return bytes(made)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_read_or_a_bad_example_and_nothing_else(kind, tmp_path):
    body, draw, path = sound(kind), np.random.default_rng(0), tmp_path / "a"
    for _ in range(30):
        path.write_bytes(damaged(body, draw))
        try:
            made = read(path, exif="apply")
        except BadExample as error:
            assert str(error).startswith("row 7: image ") and "\n" not in str(error)
        else:
            assert made.dtype == np.uint8 and made.ndim == 3 and made.shape[2] == 3


@pytest.mark.parametrize("kind", [k for k in FORMATS if k not in ("pfm", "msp")])
def test_a_picture_that_is_cut_short_is_bad_and_never_half_gray(kind, tmp_path):
    body, path = sound(kind), tmp_path / "a"
    path.write_bytes(body)
    whole = read(path)
    for share in (0.3, 0.5, 0.7, 0.9):
        path.write_bytes(body[: int(share * len(body))])
        try:
            assert (read(path) == whole).all(), share
        except BadExample:
            pass
