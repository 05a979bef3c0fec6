# SPDX-License-Identifier: Apache-2.0
"""The embedded benchmark: questions about drawn images, made from a seed without any download.

Two families: *reasoning* (scenes of shapes: scenes.py, naming.py, questions.py) and *text* (pages
to be read, reading.py). On request a third, *pictures* (things that people know: things.py,
picture_scenes.py, picture_questions.py), whose packages are fetched, and a fourth, *video* (short
clips, videos.py), of which each frame is an image. An image serves one family.
Answers are balanced form by form, so that a model that does not see the image stays near chance;
`majority` measures that. A scene belongs to one split by the hash of its content, so no scene is
shared. Everything is a pure function of (seed, split, number of images).
"""

import collections
import hashlib
import random

import numpy as np

from vlm_jax.data import clips
from vlm_jax.data.benchmark import (
    naming,
    picture_questions,
    picture_scenes,
    questions,
    reading,
    scenes,
    videos,
)
from vlm_jax.data.benchmark.balance import SLACK as SLACK
from vlm_jax.data.benchmark.balance import SPLITS as SPLITS
from vlm_jax.data.benchmark.balance import Balance, ask
from vlm_jax.data.benchmark.balance import split_of as split_of
from vlm_jax.data.benchmark.things import STYLES, Things
from vlm_jax.data.example import Example, Images
from vlm_jax.data.skips import Skips

TEXT_SHARE = 0.6  # images of the text family
QUESTIONS = (3, 5)  # fewest and most questions about a scene; a page has one per line
FORMAT = 5  # part of the data hash: raise it when the same constants would make other data

SIDE = scenes.SIDE
PATCH_CLASSES = reading.PATCH_CLASSES


class Synthetic:
    """A split of the embedded benchmark; images are drawn on demand (about 0.5 ms each).

    Args:
      split: train, val or test.
      images: the number of images, or clips. Those that show no pictures are the same as without
        pictures, TEXT_SHARE of them pages to be read; the pictures come after them, then clips.
      seed: of all random choices.
      questions_per_row: most questions about one image that are the turns of one example, in an
        order drawn for each image, a caption last; 0: all. What is scored task by task has 1.
      things: what pictures show; needed if `picture_share` is above 0.
      picture_share: share of the images that are scenes of pictures.
      held_out_style: one of STYLES, which training does not show.
      video_share: share of the images that are clips, `frames` images each.
      frames: T, taken of the videos.FRAMES of a clip.
    Raises:
      ValueError: for an unknown split or style, a negative number of images, too few things, or
        frames that clips do not have.
    """

    name = "synthetic"
    protocol = "embedded"

    def __init__(
        self,
        split: str,
        *,
        images: int,
        seed: int = 0,
        questions_per_row: int = 1,
        things: Things | None = None,
        picture_share: float = 0.0,
        held_out_style: str = STYLES[-1],
        video_share: float = 0.0,
        frames: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: the embedded benchmark has {', '.join(SPLITS)}")
        if images < 0:
            raise ValueError(f"{images} images: give data.{split}_images a number from 0 upwards")
        if held_out_style not in STYLES:
            raise ValueError(
                f"data.held_out_style={held_out_style!r}: choose one of {', '.join(STYLES)}"
            )
        if questions_per_row < 0:
            raise ValueError(
                f"data.questions_per_row={questions_per_row}: 1 or more, or 0 for all of an image"
            )
        self.split, self.seed, self.things = split, seed, things
        self._together = questions_per_row
        self.left_out = Skips()  # nothing is read, and nothing can be bad
        self.specs: list[scenes.Scene | reading.Page | picture_scenes.Scene] = []
        self.questions: list[questions.Question] = []
        self._examples: list[Example] = []
        self.patch_classes = PATCH_CLASSES + (len(things.subcategories) if things else 0)
        of_pictures = round(picture_share * images)
        of_videos = round(video_share * images)
        if of_pictures + of_videos > images:
            raise ValueError(
                f"data.picture_share={picture_share} and data.video_share={video_share} are more "
                "than all images: lower one of them"
            )
        if video_share and not 1 <= frames <= videos.FRAMES:
            raise ValueError(
                f"data.video_share={video_share}, and data.frames={frames}: clips have "
                f"{videos.FRAMES} frames, take 1 to {videos.FRAMES} of them"
            )
        self._make(images - of_pictures - of_videos)
        self._first_picture = len(self.specs)
        if of_pictures:
            if things is None:
                raise ValueError(f"picture_share={picture_share} of the images need `things`")
            for made in picture_questions.scenes_of(
                things, split, of_pictures, seed=seed, held_out=held_out_style
            ):
                self._add(*made)
        self._first_video = len(self.specs)
        for clip, asked in videos.clips_of(split, of_videos, seed=seed):
            self._add_clip(clip, asked, frames)
        self.names, self._name_of = self._named()
        self.images = Images(self._draw, len(self.specs))
        self.data_hash = self._hash()

    def _make(self, images: int) -> None:
        rng = random.Random(f"{self.seed}/{self.split}")
        balance, contents = Balance(), set()
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
                view = naming.View(spec, rng)
                of_image = ask(view, questions.FORMS, QUESTIONS, balance, rng)
                if len(of_image) < QUESTIONS[0]:
                    continue
                if self.split == "train":
                    of_image.append(questions.caption(spec))
            contents.add(content)
            self._add(spec, "text" if is_text else "reasoning", of_image)

    def _add(
        self,
        spec: scenes.Scene | reading.Page | picture_scenes.Scene,
        family: str,
        of_image: list[questions.Question],
    ) -> None:
        """Takes an image and the questions about it."""
        index = len(self.specs)
        self.specs.append(spec)
        self._ask(index, family, of_image)

    def _add_clip(self, clip: videos.Clip, asked: list[questions.Question], frames: int) -> None:
        """Takes T frames of a clip, each an image, and the questions about all of them."""
        first = len(self.specs)
        taken = clips.sampled(videos.FRAMES, frames)
        self.specs += [videos.scene(clip, frame) for frame in taken]
        shown = tuple(range(first, len(self.specs)))
        self._ask(shown if frames > 1 else first, "video", asked, frames)

    def _ask(
        self,
        image: int | tuple[int, ...],
        family: str,
        asked: list[questions.Question],
        frames: int = 1,
    ) -> None:
        """Takes the questions about an image or a clip."""
        index = image if isinstance(image, int) else image[0]
        self.questions += asked
        asked, each = list(asked), self._together or len(asked)
        if each > 1:
            random.Random(f"{self.seed}/{self.split}/{index}").shuffle(asked)
            # Behind a caption the other answers could be read from it, not from the image.
            asked.sort(key=lambda q: q.task == "caption")
        for k, start in enumerate(range(0, len(asked), each)):
            turns = asked[start : start + each]
            task = turns[0].task if each == 1 else "conversation"
            self._examples.append(
                Example(
                    f"{self.split}-{index:06d}-{k}",
                    image,
                    tuple((q.text, q.answer) for q in turns),
                    task if task == "caption" else family,
                    task,
                    frames=frames,
                )
            )

    def _named(self) -> tuple[tuple[tuple[str, ...], ...], dict[int, int]]:
        """The words of all things that are shown, and the number of each from 1."""
        drawn = self.specs[self._first_picture : self._first_video]
        shown = sorted({p.thing for spec in drawn for p in spec.pictures})
        named = [self.things.things[k] for k in shown]
        words = tuple((*thing.name.split(), *thing.words) for thing in named)
        return words, {k: number for number, k in enumerate(shown, 1)}

    def _draw(self, index: int) -> np.ndarray:
        spec = self.specs[index]
        if self._is_picture(index):
            return picture_scenes.render(spec, self.things)
        return (reading if isinstance(spec, reading.Page) else scenes).render(spec)

    def _hash(self) -> str:
        """Over every scene and question, and the first images, which show the renderer."""
        described = repr((FORMAT, SIDE, self.split, self.specs, self._examples))
        # The fields of a scene were once spelled so: the hash of the same data stays the same.
        digest = hashlib.sha256(described.replace("color", "colour").encode())
        for index in range(min(16, len(self.specs))):
            digest.update(self._draw(index).tobytes())
        if drawn := self.specs[self._first_picture : self._first_video]:
            digest.update(self.things.version_hash.encode())
            for index in range(self._first_picture, self._first_picture + min(16, len(drawn))):
                digest.update(self._draw(index).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def patch_labels(self, index: int, side: int) -> np.ndarray:
        """What each patch of image `index` shows, int32 [side * side] in raster order."""
        spec = self.specs[index]
        if self._is_picture(index):
            kinds = self.things.subcategories
            of_picture = [
                PATCH_CLASSES + kinds.index(self.things.things[p.thing].subcategory)
                for p in spec.pictures
            ]
            return self._by_owner(spec, of_picture, side)
        return (reading if isinstance(spec, reading.Page) else scenes).patch_labels(spec, side)

    def patch_names(self, index: int, side: int) -> np.ndarray:
        """Which of `names`, from 1, each patch of image `index` belongs to, int32 [side * side].

        0 is a patch without a name: ground, and all of the other families.
        """
        if not self._is_picture(index):
            return np.zeros(side * side, np.int32)
        spec = self.specs[index]
        return self._by_owner(spec, [self._name_of[p.thing] for p in spec.pictures], side)

    def _is_picture(self, index: int) -> bool:
        """Whether an image is of the third family."""
        return self._first_picture <= index < self._first_video

    def _by_owner(self, spec: picture_scenes.Scene, values: list[int], side: int) -> np.ndarray:
        """Per patch the value of the picture that covers most of it, 0 on the ground."""
        return np.array([0, *values], np.int32)[picture_scenes.owners(spec, self.things, side)]

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
