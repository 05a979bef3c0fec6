# SPDX-License-Identifier: Apache-2.0
"""What a published preprocessor_config.json says is what is done, or it is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from vlm_jax.__main__ import main
from vlm_jax.data.images import Preparation
from vlm_jax.weights import folder, preprocessor, sections

FROZEN = Path(__file__).parent / "published_weights"
S = 24
CLIP, SIGLIP = (dict(image_size=S, class_token=clip) for clip in (True, False))
# Tall, wide, odd, tiny, as the tower has it, larger.
SHAPES = ((1, 1), (1, 60), (71, 30), (S, S), (25, 23), (S, 90), (96, 200))


def written(path, fields, model="clip_vision_model", name=preprocessor.NAME):
    """A folder of a published model, without its weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model}))
    (path / name).write_text(json.dumps(fields))
    return path


def prepared(image):
    """The Preparation of `facts.image`, by the way of a model folder and a configuration."""
    image = json.loads(json.dumps(image))
    sections.check_image(image)
    made = preprocessor.configured(image)
    return Preparation(S, **{name.removeprefix("image_"): x for name, x in made.items()})


def drawn(height, width):
    draw = np.random.default_rng(1000 * height + width)
    return draw.integers(0, 256, (height, width, 3)).astype(np.uint8)


def same_pixels(ours, theirs, shapes=SHAPES):
    """Whether a Preparation and a processor of transformers make the same of images."""
    for shape in shapes:
        image = drawn(*shape)
        pixels = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        made = ours.normalized(ours.square(image))
        # In units of the numbers themselves, which are as large as 255 without rescaling.
        np.testing.assert_allclose(made, pixels.transpose(1, 2, 0), rtol=1e-6, atol=1e-6)


SQUARE = dict(height=S, width=S)
CROPPED = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": S}, crop_size=S)
STRETCHED = dict(image_processor_type="SiglipImageProcessor", size=SQUARE)
PADDED = CROPPED | dict(image_processor_type="LlavaImageProcessor", do_pad=True)
CASES = {
    "CLIP": CROPPED,
    "SigLIP": STRETCHED,
    "LLaVA pads": PADDED,
    "LLaVA does not pad": PADDED | dict(do_pad=False),
    "LLaVA pads and stretches": PADDED | dict(size=SQUARE, do_center_crop=False),
    "LLaVA pads and crops no more": PADDED | dict(do_center_crop=False),
    "LLaVA pads and does not resize": PADDED | dict(do_resize=False),
    "LLaVA pads to the longest edge": PADDED | dict(size=dict(shortest_edge=40, longest_edge=30)),
    "a number for size": CROPPED | dict(size=S),
    "a number for size, square": CROPPED | dict(size=S, default_to_square=True),
    "two numbers": CROPPED | dict(size=[30, 40], crop_size=[S, S]),
    "larger, then cropped": CROPPED | dict(size={"shortest_edge": 30}),
    "smaller, then cropped": CROPPED | dict(size={"shortest_edge": 7}),
    "shortest and longest": CROPPED | dict(size=dict(shortest_edge=30, longest_edge=50)),
    "stretched, then cropped": STRETCHED | dict(size=dict(height=40, width=31), do_center_crop=True,
                                                crop_size=SQUARE),
    "not resized": CROPPED | dict(do_resize=False),
    "not rescaled": CROPPED | dict(do_rescale=False),
    "rescaled otherwise": CROPPED | dict(rescale_factor=1 / 127.5, image_mean=[1, 1, 1]),
    "not normalized": CROPPED | dict(do_normalize=False),
    "neither, and padded": PADDED | dict(do_rescale=False, do_normalize=False),
    "one number for three": CROPPED | dict(image_mean=0.25, image_std=2),
    "null is off": CROPPED | dict(do_convert_rgb=None, do_normalize=None, do_resize=None),
    "pads of its own size": STRETCHED | dict(do_pad=True, pad_size=SQUARE),
    "an older name": {k: v for k, v in CROPPED.items() if k != "image_processor_type"}
    | dict(feature_extractor_type="CLIPFeatureExtractor"),
    "a fast class": CROPPED | dict(image_processor_type="CLIPImageProcessorFast"),
    "ViT": dict(size=SQUARE, feature_extractor_type="ViTFeatureExtractor"),
    "names of no matter": CROPPED | dict(processor_class="LlavaProcessor", device="cpu",
                                         _valid_processor_keys=["images"], do_flip=False),
} | {f"filter {n}": PADDED | dict(resample=n) for n in range(6)}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_transformers_by_every_field_and_back_again(name, tmp_path):
    fields = CASES[name]
    for tower in (CLIP, SIGLIP):  # the tower has no say where the file does
        image = preprocessor.facts(written(tmp_path / "a", fields), tower)
        same_pixels(prepared(image), transformers.AutoImageProcessor.from_pretrained(
            tmp_path / "a", backend="pil"))  # fmt: skip
        # What --to-hf writes is what is used, for transformers and for us.
        files = preprocessor.files(image, S)
        again = written(tmp_path / "b", json.loads(json.dumps(files)))
        assert preprocessor.facts(again, tower) == image
        same_pixels(prepared(image), transformers.AutoImageProcessor.from_pretrained(
            again, backend="pil"))  # fmt: skip


def test_pixels_are_those_of_transformers_for_any_description():
    draw = np.random.default_rng(0)
    sides = (7, 23, S, 25, 48, 90)
    for _ in range(150):
        fit = str(draw.choice(["pad", "crop", "stretch"]))
        count = int(draw.integers(0, 2 if fit == "pad" else 3))
        resize = [0] if draw.random() < 0.2 else [int(x) for x in draw.choice(sides, count)]
        if len(resize) == 2:
            resize[1] += 12  # of a longest edge of 1 transformers makes images without pixels
        image = dict(
            fit=fit,
            resize=resize,
            resample=str(draw.choice(list(preprocessor.FILTERS))),
            mean=[float(x) for x in draw.random(3)],
            std=[float(x) for x in draw.random(3) + 0.1],
            rescale=float(draw.choice([1 / 255, 1 / 127.5, 1.0])),
            normalize=bool(draw.integers(2)),
        )
        files = preprocessor.files(image, S)
        theirs = getattr(transformers, files.pop("image_processor_type") + "Pil")(**files)
        height, width = (int(x) for x in draw.choice(sides, 2))
        same_pixels(prepared(image), theirs, [(height, width)])


def test_what_is_absent_has_the_default_of_the_class_that_is_named(tmp_path):
    tower = dict(image_size=224, class_token=True)
    for kind, fit, mean in (
        ("CLIPImageProcessor", "crop", 0.48145466),
        ("SiglipImageProcessor", "stretch", 0.5),
        ("LlavaImageProcessor", "crop", 0.48145466),
        ("ViTImageProcessor", "stretch", 0.5),
    ):
        fields = dict(image_processor_type=kind)
        image = preprocessor.facts(written(tmp_path / "a", fields), tower)
        assert (image["fit"], image["resize"], image["mean"][0]) == (fit, [], mean)
    assert image["resample"] == "bilinear"
    # Without a class it is that of the model, as in transformers.
    image = preprocessor.facts(written(tmp_path / "a", dict(do_pad=True), "llava"), tower)
    assert image["fit"] == "pad"
    image = preprocessor.facts(written(tmp_path / "a", dict(do_pad=True)), tower)
    assert image["fit"] == "crop"


REFUSED = {
    "another class": (dict(image_processor_type="LlavaNextImageProcessor"), "LlavaNext.*supported"),
    "a class that is no name": (dict(image_processor_type=["a"]), "image_processor_type=.*name"),
    "code beside the weights": (dict(auto_map={"AutoImageProcessor": "a.B"}), "auto_map=.*not run"),
    "a field of another class": (dict(do_flip_channel_order=True), "do_flip_channel_order=True"),
    "an offset": (dict(rescale_offset=True), "rescale_offset=True is not supported"),
    "nothing to crop to": (dict(crop_size=None), "crop_size=None: expected one with"),
    "no mean": (dict(image_mean=None), "image_mean=None: expected one with do_normalize"),
    "a flag of text": (dict(do_resize="yes"), "do_resize='yes': expected true or false"),
    "a flag of a number": (dict(do_normalize=1), "do_normalize=1: expected true or false"),
    "size 0": (dict(size=0), "size=0: expected whole numbers above 0"),
    "size below 0": (dict(size={"shortest_edge": -24}), "size=.*above 0"),
    "size of text": (dict(size="24"), "size='24': expected whole numbers"),
    "size of fractions": (dict(size=24.5), "size=24.5: expected whole numbers"),
    "a size that is not resized to": (dict(size=1500), "size=.*at most 1344 for a tower of 24"),
    "a huge size": (dict(size=10**9), "size=1000000000: expected whole"),
    "three sizes": (dict(size=[1, 2, 3]), "size=.1, 2, 3.: expected two numbers"),
    "most of a size": (dict(size=dict(max_height=S, max_width=S)), "size=.*not supported: a whole"),
    "the longest edge alone": (dict(size=dict(longest_edge=S)), "size=.*not supported"),
    "half a size": (dict(size=dict(height=S)), "size must have|size="),
    "a crop of one edge": (dict(crop_size=dict(shortest_edge=S)), "crop_size=.*height and width"),
    "an empty size": (dict(size={}), "size={}: expected"),
    "another crop": (dict(crop_size=20), "crop_size={'height': 20, 'width': 20}.*takes 24 x 24"),
    "no crop": (dict(do_center_crop=False), "no do_center_crop: images keep their shape"),
    "another size": (STRETCHED | dict(size=dict(height=S, width=30)), "size=.*takes 24 x 24"),
    "a border": (dict(do_pad=True, pad_size=30), "pad_size=.*no room for more"),
    "an oblong square": (PADDED | dict(size=dict(height=30, width=40)), "do_pad makes squares"),
    "a mean of two": (dict(image_mean=[0.5, 0.5]), "image_mean=.*expected three numbers"),
    "a mean of text": (dict(image_mean="half"), "image_mean='half': expected three numbers"),
    "a mean beyond white": (PADDED | dict(image_mean=[1.5] * 3), "image_mean=.*pads with this"),
    "a deviation of 0": (dict(image_std=[0.5, 0, 0.5]), "image_std=.*above 0"),
    "not a number": (dict(image_std=[float("nan")] * 3), "image_std=.*expected three numbers"),
    "an endless factor": (dict(rescale_factor=float("inf")), "rescale_factor=inf: expected"),
    "a factor of 0": (dict(rescale_factor=0), "rescale_factor=0: expected a number above 0"),
    "a filter beyond PIL's": (dict(resample=17), "resample=17: expected 0 .nearest., 1 .lanczos."),
    "a filter by name": (dict(resample="bicubic"), "resample='bicubic': expected 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honored_is_refused_with_file_and_field(name, tmp_path):
    fields, words = REFUSED[name]
    path = written(tmp_path / "a", CROPPED | fields)
    with pytest.raises(ValueError, match=f"a/preprocessor_config.json: .*{words}") as error:
        preprocessor.facts(path, CLIP)
    assert "\n" not in str(error.value)


def test_what_a_processor_config_holds_comes_first_as_in_transformers(tmp_path):
    path = written(tmp_path / "a", dict(image_processor=STRETCHED), name=preprocessor.WHOLE)
    image = preprocessor.facts(path, CLIP)
    assert image["fit"] == "stretch" and not preprocessor.notes(path, image)
    written(path, CROPPED)
    assert preprocessor.facts(path, CLIP) == image
    assert "says something else" in preprocessor.notes(path, image)["images"]
    # One without an image processor, as older LLaVAs have it, says nothing of images.
    written(path, dict(processor_class="LlavaProcessor"), name=preprocessor.WHOLE)
    assert preprocessor.facts(path, CLIP)["fit"] == "crop"
    written(path, dict(image_processor=[1]), name=preprocessor.WHOLE)
    with pytest.raises(ValueError, match="processor_config.json: image_processor=.1."):
        preprocessor.facts(path, CLIP)


def test_a_first_layout_pads_before_its_tower_prepares(tmp_path):
    for fields, resize in ((CROPPED | dict(size={"shortest_edge": 30}), [30]), (STRETCHED, []),
                           (CROPPED | dict(size=dict(shortest_edge=40, longest_edge=30)), [30]),
                           (CROPPED | dict(do_resize=False), [0])):  # fmt: skip
        path = written(tmp_path / "a", fields)
        image = preprocessor.facts(path, CLIP, pad=True)
        assert (image["fit"], image["resize"]) == ("pad", resize)
        theirs = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
        ours = prepared(image)
        for shape in SHAPES:
            pixels, side = drawn(*shape), max(shape)
            color = tuple(int(255 * x) for x in theirs.image_mean)
            square = Image.new("RGB", (side, side), color)
            square.paste(Image.fromarray(pixels), tuple((side - n) // 2 for n in shape[::-1]))
            np.testing.assert_allclose(
                ours.normalized(ours.square(pixels)).transpose(2, 0, 1),
                theirs(square, return_tensors="np")["pixel_values"][0],
                atol=1e-6,
            )
    path = written(tmp_path / "a", CASES["stretched, then cropped"])
    with pytest.raises(ValueError, match="image_aspect_ratio='pad'.*set a square size"):
        preprocessor.facts(path, CLIP, pad=True)


def test_a_model_folder_and_its_export_keep_every_field(tmp_path, capsys):
    copy = Path(shutil.copytree(FROZEN / "siglip_llama3", tmp_path / "copy"))
    side = json.loads((copy / "config.json").read_text())["vision_config"]["image_size"]
    fields = CROPPED | dict(size=40, crop_size=side, resample=1, rescale_factor=0.5,
                            do_normalize=False)  # fmt: skip
    (copy / preprocessor.NAME).write_text(json.dumps(fields))

    def made(*flags):
        assert main(["convert", *map(str, flags)]) == 0, capsys.readouterr().err
        return Path(flags[-1])

    a = made("--from", copy, "--to", tmp_path / "a")
    b = made("--from", a, "--to-hf", "--to", tmp_path / "b")
    c = made("--from", b, "--to", tmp_path / "c")
    image = folder.read(a).facts["image"]
    assert image == folder.read(c).facts["image"]
    assert (image["fit"], image["resize"], image["rescale"]) == ("crop", [40], 0.5)
    assert (image["resample"], image["normalize"]) == ("lanczos", False)
    assert "images" not in folder.read(a).notes
    # Without a file the tower's kind decides, and this is said and noted.
    (copy / preprocessor.NAME).unlink()
    capsys.readouterr()
    d = made("--from", copy, "--to", tmp_path / "d")
    assert "no preprocessor_config.json" in capsys.readouterr().err
    assert "'stretch'" in folder.read(d).notes["images"]
    (copy / preprocessor.NAME).write_text(json.dumps(fields | dict(crop_size=side + 1)))
    assert main(["convert", "--from", str(copy), "--to", str(tmp_path / "e")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "preprocessor_config.json: crop_size=" in said


@pytest.mark.parametrize("image, words", [
    ([], "an object with"), ({}, "an object with"), (dict(fit="crop"), "an object with"),
    (dict(tint=1), "an object with"), (dict(mean=0.5), "facts.image.mean=0.5: expected list"),
    (dict(fit=["crop"]), "facts.image.fit"), (dict(resize="24"), "facts.image.resize"),
])  # fmt: skip
def test_a_model_folder_of_wrong_fields_is_named(image, words):
    if isinstance(image, dict) and image and image != dict(fit="crop"):
        image = preprocessor.CLIP | image
    with pytest.raises(ValueError, match=words):
        preprocessor.configured(image)


def test_a_folder_from_before_a_field_was_born_is_read_as_it_was():
    older = dict(mean=[0.5] * 3, std=[0.25] * 3, fit="crop", resample="bilinear")
    assert prepared(older) == Preparation(S, "crop", (0.5,) * 3, (0.25,) * 3, "bilinear")
