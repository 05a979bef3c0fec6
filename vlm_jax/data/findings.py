# SPDX-License-Identifier: Apache-2.0
"""What a check of a data set can find, the report of what it found, and its table.

What is found is a finding (training fails on it, leaves it out, cuts it or sees less than the file
holds) or a note (it is used as it is). Each kind has a count, and the first ones by name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_jax.data.image_facts import ImageFacts

# Rows that are left out in training, by what is wrong with them (llava.py, rows.py, tars.py).
ROW_FINDINGS = {
    "missing_image": "no such image, nor with another suffix",
    "json": "not JSON, cut short, or nested too deep",
    "row": "not an object, or a sample without a text",
    "conversations": "no turns of human and gpt in order that end with gpt",
    "image": "`image` is not a path or a list of paths",
    "image_mark": "marks and images differ in number, or a mark in an answer",
    "empty_answer": "an answer without text",
    "text": "half a surrogate pair, or bytes that are not UTF-8",
    "repeated_key": "an object with a key twice",
    "video": "`video` is not a path or a list of paths, or stands beside `image`",
    "missing_clip": "no such folder or video file",
    "empty_clip": "a clip's folder without a picture",
}
FINDINGS = ROW_FINDINGS | {
    "corrupt_image": "damaged, cut short or no image: cannot be read",
    "corrupt_clip": "a video file that is damaged, cut short or no video: cannot be read",
    "wrongly_named": "content of another format than the suffix says",
    "animated": "several frames, of which the first is used",
    "enormous_image": "more than 50 million pixels",
    "duplicate_row": "images and texts of an earlier row",
    "over_long": "more text tokens than a row keeps: it loses its end",
    "without_target": "of these: no token of an answer is kept",
    "untokenizable": "the tokenizer or the template refuses the text",
}
NOTES = {
    "gray": "gray or black and white; used as three equal channels",
    "cmyk": "CMYK; converted to RGB",
    "alpha": "transparency; dropped",
    "sixteen_bit": "more than 8 bits a channel; reduced to 8",
    "exif_rotated": "stored on its side; turned only with data.image_exif=apply",
    "renamed_image": "found with another suffix than in the row",
    "duplicate_image": "the bytes of an earlier image file",
    "short_clip": "fewer frames than are taken (--frames); some are shown more than once",
    "empty_question": "a question without text, besides the image",
    "leading_answer": "begins with gpt; that answer is left out",
    "repeated_id": "the id of an earlier row; both are used",
    "missing_id": "no id; called #ROW",
}
SHOWN = 3  # of each kind, by name
# Of the histogram of lengths; the last bin has all that is longer.
EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


@dataclass
class Report:
    """What was found.

    Attributes:
      counts: findings and notes by kind.
      found: (kind, name, sentence) of every one that has a name.
      lengths: of every usable text, int64, in `unit`. images: the facts of every image.
      about: further fields of `fields()`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, str, str]] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unit: str = "tokens"
    images: list[ImageFacts] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, name: str, sentence: str) -> None:
        """Counts one finding or note, with its name."""
        self.counts[kind] += 1
        self.found.append((kind, name, sentence))

    def failing(self, *, strict: bool = False, allow: Iterable[str] = ()) -> list[str]:
        """Kinds that make the data unclean: findings, and notes if `strict`, except `allow`."""
        kinds = [*FINDINGS, *(NOTES if strict else ())]
        return [kind for kind in kinds if self.counts[kind] and kind not in set(allow)]

    def histogram(self) -> list[int]:
        """The number of texts from each of EDGES up to the next one."""
        edges = [*EDGES, np.iinfo(np.int64).max]
        return np.histogram(self.lengths, edges)[0].tolist()

    def fields(self) -> dict[str, Any]:
        """The JSON object that docs/your_own_data.md describes; all keys are always there."""
        first: dict[str, list[str]] = {}
        for kind, _, sentence in self.found:
            if len(first.setdefault(kind, [])) < SHOWN:
                first[kind].append(sentence.encode(errors="backslashreplace").decode())
        sizes = np.array([(f.width, f.height) for f in self.images if f.width]).reshape(-1, 2)
        return self.about | {
            "findings": {kind: self.counts[kind] for kind in FINDINGS},
            "notes": {kind: self.counts[kind] for kind in NOTES},
            "first": first,
            "image_formats": _counted(f.format for f in self.images),
            "image_modes": _counted(f.mode for f in self.images),
            "width": _spread(sizes[:, 0]),
            "height": _spread(sizes[:, 1]),
            "text": _spread(self.lengths)
            | {
                "unit": self.unit,
                "edges": list(EDGES),
                "counts": self.histogram(),
            },
        }


def table(found: Mapping[str, Any]) -> str:
    """The fields of a report as lines of text: counts, and the first of each kind by name."""
    rows = f"{found['rows']:,} rows, {found['usable_rows']:,} usable"
    lines = [
        f"{rows}, {found['text_only_rows']:,} of text alone, {found['turns']:,} turns; "
        f"{found['image_files']:,} images, {found['image_bytes'] / 1e6:,.1f} MB"
        + f"; {found['clips']:,} clips"
        * bool(found["clips"])
        * bool(found["clips"])
    ]
    for name, kinds in (("findings", FINDINGS), ("notes", NOTES)):
        counts = {kind: n for kind, n in found[name].items() if n}
        lines.append(f"{name}: {sum(counts.values()):,}")
        for kind, count in counts.items():
            lines.append(f"  {kind:16} {count:9,}  {kinds[kind]}")
            lines += [f"    {sentence}" for sentence in found["first"].get(kind, [])]
    text = found["text"]
    if text["n"]:
        lines.append(
            f"{text['unit']} of text: median {text['median']:,}, 95 % up to {text['p95']:,}, "
            f"99 % up to {text['p99']:,}, most {text['max']:,}"
        )
        most = max(text["counts"])
        ends = [*(str(edge) for edge in text["edges"][1:]), ""]
        for low, high, count in zip(text["edges"], ends, text["counts"], strict=True):
            if count:
                lines.append(f"  {low:>6} - {high:<6} {count:9,}  {'#' * -(-40 * count // most)}")
    lines.append(f"set_hash {found['set_hash'] or 'unknown: images were not read to their end'}")
    return "\n".join(lines)


def _counted(names: Iterable[str]) -> dict[str, int]:
    return {name: n for name, n in Counter(names).most_common() if name}


def _spread(numbers: np.ndarray) -> dict[str, Any]:
    """Least, mean, quantiles and most of some numbers; None where there is none."""
    names = ("min", "median", "p95", "p99", "max")
    if not len(numbers):
        return {"n": 0, "mean": None} | dict.fromkeys(names)
    quantiles = np.quantile(numbers, (0, 0.5, 0.95, 0.99, 1), method="higher")
    spread = dict(zip(names, (int(x) for x in quantiles), strict=True))
    return {"n": len(numbers), "mean": round(float(numbers.mean()), 2)} | spread
