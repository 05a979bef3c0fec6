# SPDX-License-Identifier: Apache-2.0
"""Packages of pictures as the registry has them, small and made here: discs with marks."""

import json

from PIL import Image, ImageDraw

from vlm_jax.data.benchmark import things

CATEGORIES = ("Food & Drink", "Objects", "Symbols")
NOUNS = ("apple", "hammer", "star")
KINDS = tuple("round flat tall thin wide old new soft hard warm cold dry wet".split())
DISCS = {"red": (214, 40, 40), "green": (38, 150, 62), "blue": (45, 85, 215)}
COUNT = len(NOUNS) * len(KINDS) * 2


def entry(number, name, category, **more):
    """What emoji.json says about a thing."""
    about = dict(
        name=name.upper(), short_names=[name.replace(" ", "_"), f"thing_{category.split()[0]}"],
        category=category, subcategory=f"{category.split()[0].lower()}-{number % 2}",
        image=f"{number:x}.png", sort_order=number, obsoleted_by=None,
    )  # fmt: skip
    return about | {f"has_img_{style}": True for style in things.STYLES} | more


def drawn(style, color, marks):
    """A disc with up to eight black marks, on nothing; a style has a rim of its own."""
    image = Image.new("RGBA", (things.PIXELS, things.PIXELS))
    canvas = ImageDraw.Draw(image)
    rim = (255, 255, 255, 255) if style == "twitter" else (*DISCS[color], 255)
    inset = 2 if style == "facebook" else 0
    canvas.ellipse((inset, inset, 63 - inset, 63 - inset), fill=(*DISCS[color], 255), outline=rim)
    for bit in range(8):
        if marks >> bit & 1:
            x, y = 10 + 11 * (bit % 4), 20 + 12 * (bit // 4)
            canvas.rectangle((x, y, x + 8, y + 8), fill=(0, 0, 0, 255))
    return image


def write(folder, *, version=things.VERSION, extra=()):
    """The packages in `folder`, with COUNT things; `extra` are further (entry, color, marks)."""
    entries = []
    for number in range(COUNT):
        category, rest = number % len(NOUNS), number // len(NOUNS)
        name = f"{KINDS[rest % len(KINDS)]} {NOUNS[category]}" + " set" * (rest >= len(KINDS))
        color = tuple(DISCS)[(category + rest) % len(DISCS)]
        entries.append((entry(number, name, CATEGORIES[category]), color, number + 1))
    for style in things.STYLES:
        home = folder / f"npm-{things.package(style)}-{version}"
        pictures = home / "img" / style / str(things.PIXELS)
        pictures.mkdir(parents=True)
        about = dict(name=things.package(style), version=version)
        (home / "package.json").write_text(json.dumps(about))
        (home / "emoji.json").write_text(json.dumps([e for e, _, _ in (*entries, *extra)]))
        for about, color, marks in (*entries, *extra):
            if about[f"has_img_{style}"]:
                drawn(style, color, marks).save(pictures / about["image"])
    return folder
