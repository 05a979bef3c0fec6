# SPDX-License-Identifier: Apache-2.0
"""The embedded benchmark: questions about drawn images, made from a seed without any download.

Two families: *reasoning* (scenes of shapes: scenes.py, naming.py, questions.py) and *text* (pages
to be read, reading.py). An image serves one family. Answers are balanced form by form, so that a
model that does not see the image stays near chance; `majority` measures that. A scene belongs to
one split by the hash of its content, so no scene is shared. Everything is a pure function of (seed,
split, number of images).
"""

import collections
import hashlib
import random
import zlib

import numpy as np

from vlm_jax.data.benchmark import naming, questions, reading, scenes
from vlm_jax.data.example import Example, Images
from vlm_jax.data.skips import Skips

SPLITS = ("train", "val", "test")
TEXT_SHARE = 0.6  # images of the text family
QUESTIONS = (3, 5)  # fewest and most questions about a scene; a page has one per line
DRAWS = 8  # tries of one form on one scene
SLACK = 2  # by how much one answer of a form may lead its rarest answer
FORMAT = 5  # part of the data hash: raise it when the same constants would make other data

SIDE = scenes.SIDE
PATCH_CLASSES = reading.PATCH_CLASSES


def split_of(content: tuple) -> str:
    """The only split that may hold this content: 70 % of all train, 10 % val, 20 % test."""
    bucket = zlib.crc32(repr(content).encode()) % 10
    return "train" if bucket < 7 else "val" if bucket < 8 else "test"


class _Balance:
    """Chooses among candidate questions so that every answer of a form is about as frequent."""

    def __init__(self):
        self.forms = collections.defaultdict(collections.Counter)
        self.keys = collections.defaultdict(collections.Counter)

    def choose(self, candidates: list[questions.Question]) -> questions.Question | None:
        """The question with the rarest answer in its form and key; None if none keeps balance."""

        def lead(q):
            form, key = self.forms[q.form], self.keys[q.key]
            return (form[q.label] - min(form.values(), default=0), key[q.label] - key.total() / 2)

        best = min(candidates, key=lead, default=None)
        if best is None or lead(best)[0] > SLACK:
            return None
        self.forms[best.form][best.label] += 1
        self.keys[best.key][best.label] += 1
        return best


def _about_scene(
    scene: scenes.Scene, rng: random.Random, balance: _Balance
) -> list[questions.Question]:
    """Two to four questions about one scene, no form twice; fewer if it allows no more."""
    view = naming.View(scene, rng)
    forms = sorted(questions.FORMS, key=lambda f: rng.random() ** (1 / f[1]), reverse=True)
    number, chosen = rng.randint(*QUESTIONS), []
    for form, _ in forms:
        drawn = [q for q in (form(view) for _ in range(DRAWS)) if q is not None]
        if (q := balance.choose(drawn)) is not None:
            chosen.append(q)
        if len(chosen) == number:
            break
    return chosen


class Synthetic:
    """A split of the embedded benchmark; images are drawn on demand (about 0.5 ms each).

    Args:
      split: train, val or test.
      images: the number of images, TEXT_SHARE of them pages to be read.
      seed: of all random choices.
    Raises:
      ValueError: for an unknown split or a negative number of images.
    """

    name = "synthetic"
    protocol = "embedded"
    patch_classes = PATCH_CLASSES

    def __init__(self, split: str, *, images: int, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: the embedded benchmark has {', '.join(SPLITS)}")
        if images < 0:
            raise ValueError(f"{images} images: give data.{split}_images a number from 0 upwards")
        self.split, self.seed = split, seed
        self.left_out = Skips()  # nothing is read, and nothing can be bad
        self.specs: list[scenes.Scene | reading.Page] = []
        self.questions: list[questions.Question] = []
        self._examples: list[Example] = []
        self._make(images)
        self.images = Images(self._draw, len(self.specs))
        self.data_hash = self._hash()

    def _make(self, images: int) -> None:
        rng = random.Random(f"{self.seed}/{self.split}")
        balance, contents = _Balance(), set()
        while len(self.specs) < images:
            index = len(self.specs)
            is_text = int((index + 1) * TEXT_SHARE) > int(index * TEXT_SHARE)
            spec = reading.draw_page(rng, self.split) if is_text else scenes.draw_scene(rng)
            content = (reading if is_text else scenes).content(spec)
            if split_of(content) != self.split or content in contents:
                continue
            if is_text:
                of_image = []
                for k, line in enumerate(spec.lines):
                    text, form = reading.ask(spec, k, rng)
                    of_image.append(
                        questions.Question(line.task, form, (form,), line.text, line.text, text)
                    )
            else:
                of_image = _about_scene(spec, rng, balance)
                if len(of_image) < QUESTIONS[0]:
                    continue
                if self.split == "train":
                    of_image.append(questions.caption(spec))
            contents.add(content)
            self.specs.append(spec)
            for k, q in enumerate(of_image):
                self.questions.append(q)
                self._examples.append(
                    Example(
                        f"{self.split}-{index:06d}-{k}",
                        index,
                        ((q.text, q.answer),),
                        q.task if q.task == "caption" else "text" if is_text else "reasoning",
                        q.task,
                    )
                )

    def _draw(self, index: int) -> np.ndarray:
        spec = self.specs[index]
        return (reading if isinstance(spec, reading.Page) else scenes).render(spec)

    def _hash(self) -> str:
        """Over every scene and question, and the first images, which show the renderer."""
        described = repr((FORMAT, SIDE, self.split, self.specs, self._examples))
        # The fields of a scene were once spelled so: the hash of the same data stays the same.
        digest = hashlib.sha256(described.replace("color", "colour").encode())
        for index in range(min(16, len(self.specs))):
            digest.update(self._draw(index).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def patch_labels(self, index: int, side: int) -> np.ndarray:
        """What each patch of image `index` shows, int32 [side * side] in raster order."""
        spec = self.specs[index]
        return (reading if isinstance(spec, reading.Page) else scenes).patch_labels(spec, side)

    def notes(self) -> list[str]:
        """An empty list: generated data has no faults."""
        return []

    def describe(self) -> dict:
        """Numbers of images and of examples per task, for the log."""
        tasks = collections.Counter(f"{e.family}/{e.task}" for e in self._examples)
        return {
            "source": self.name,
            "split": self.split,
            "images": len(self.specs),
            "examples": len(self),
            "tasks": dict(sorted(tasks.items())),
            "data_hash": self.data_hash,
        }


def majority(train: Synthetic, test: Synthetic) -> dict[str, float]:
    """Per task the accuracy on `test` of the most frequent answer in `train` for each form.

    This is what the wording alone tells without training: the baseline next to a
    trained blind model. Where the answer repeats a word of the question, "the first one named" is
    an answer too.
    """
    frequent = collections.defaultdict(collections.Counter)
    for q in train.questions:
        frequent[q.form][q.label] += 1
    right, total = collections.Counter(), collections.Counter()
    for q in test.questions:
        total[q.task] += 1
        guess = frequent[q.form].most_common(1)
        right[q.task] += bool(guess) and guess[0][0] == q.label
    return {task: right[task] / total[task] for task in sorted(total)}
