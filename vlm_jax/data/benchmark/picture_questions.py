# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes of pictures, each with one certain answer and in several wordings.

A form is a function that draws one question of its kind about a scene, or None where the scene does
not allow it.
"""

import random
from collections.abc import Iterator

from vlm_jax.data.benchmark import picture_scenes
from vlm_jax.data.benchmark.balance import Balance, ask
from vlm_jax.data.benchmark.questions import Question
from vlm_jax.data.benchmark.things import STYLES, Things

QUESTIONS = (2, 4)  # fewest and most about a scene
# Words in -s that are one thing; of the others a question asks "are there ...?".
SINGULAR = ("ss", "us", "is", "ens")


class View:
    """A scene, the things in it, and those that it could show."""

    def __init__(self, scene: picture_scenes.Scene, deck: picture_scenes.Deck, things: Things,
                 rng: random.Random):  # fmt: skip
        self.scene, self.deck, self.things, self.rng = scene, deck, things, rng
        self.shown = [things.things[p.thing] for p in scene.pictures]
        self.asked = [
            k
            for k, p in enumerate(scene.pictures)
            if not deck.held_out or p.style == deck.styles[0]
        ]

    def any(self) -> int:
        """One of the pictures, by its number; in the style that is held out, if one is."""
        return self.rng.choice(self.asked)

    def ask(self, number: int, alone: tuple[str, ...], among: tuple[str, ...]) -> str:
        """A wording; `among` says at {place} which of several pictures is meant."""
        if len(self.shown) == 1:
            return self.rng.choice(alone)
        place = picture_scenes.PLACES[self.scene.pictures[number].place]
        return self.rng.choice(among).format(place=place)


def name(v: View) -> Question:
    k = v.any()
    text = v.ask(k, ("what is it?", "what is this?", "what does the picture show?"),
                 ("what is in the {place}?",
                  "what does the picture in the {place} show?"))  # fmt: skip
    said = v.shown[k].name
    return Question("name", "name", ("name",), said, said, text)


def category(v: View) -> Question:
    k = v.any()
    text = v.ask(k, ("which category does it belong to?", "what category is it?"),
                 ("which category does the picture in the {place} belong to?",
                  "what category is the picture in the {place}?"))  # fmt: skip
    said = v.shown[k].category
    return Question("category", "category", ("category",), said, said, text)


def color(v: View) -> Question | None:
    k = v.any()
    picture = v.scene.pictures[k]
    if not (said := v.things.colors[STYLES[picture.style]][picture.thing]):
        return None
    text = v.ask(k, ("what color is it?", "what is its main color?"),
                 ("what color is the picture in the {place}?",
                  "what is the main color in the {place}?"))  # fmt: skip
    return Question("color", "color", ("color",), said, said, text)


def presence(v: View) -> Question | None:
    """Half of the things that are not there are of a kind with one that is."""
    truth = v.rng.random() < 0.5
    if truth:
        asked = v.shown[v.any()]
    else:
        first = v.scene.pictures[v.any()].thing
        near = v.deck.near[first] if v.rng.random() < 0.5 else ()
        other = v.rng.choice(near) if near else v.deck.thing(v.rng, v.scene.pictures[0].style)
        asked = v.things.things[other]
        # "Dog" for a dog's face would be neither right nor wrong.
        words = set(asked.name.split())
        for thing in v.shown:
            theirs = set(thing.name.split())
            if words <= theirs or theirs <= words:
                return None
    said = asked.name
    several = said.endswith("s") and not said.endswith(SINGULAR)
    a = "an" if said[0] in "aeiou" else "a"
    text = v.rng.choice(
        (f"are there {said}?", f"can you see {said}?")
        if several
        else (f"is there {a} {said}?", f"can you see {a} {said}?")
    )
    label = "yes" if truth else "no"
    return Question("presence", "presence", ("presence", said), label, label, text)


def same(v: View) -> Question | None:
    if len(v.shown) != 2:
        return None
    label = "yes" if v.shown[0] == v.shown[1] else "no"
    text = v.rng.choice(("do both pictures show the same thing?", "is the same thing shown twice?"))
    return Question("same", "same", ("same",), label, label, text)


# How often each form is tried.
FORMS = ((name, 1), (category, 1), (color, 2), (presence, 1.5), (same, 3))


def caption(v: View) -> Question:
    """Every picture in reading order: dense supervision for training."""
    words = ", ".join(thing.name for thing in v.shown)
    return Question("caption", "caption", ("caption",), words, words, "describe the picture.")


def scenes_of(
    things: Things, split: str, count: int, *, seed: int, held_out: str
) -> Iterator[tuple[picture_scenes.Scene, str, list[Question]]]:
    """`count` scenes of a split, the family of each, and its questions; no scene comes twice.

    The family is "pictures": things of this split in the styles that are trained on. Of the test
    split every other scene is of the family "style": things that training shows, in the style that
    it does not; its tasks are called style_name, style_category ...
    """
    rng = random.Random(f"pictures/{seed}/{split}")
    decks = {"pictures": picture_scenes.Deck(things, split, held_out=held_out, in_held_out=False)}
    if split == "test":
        decks["style"] = picture_scenes.Deck(things, "train", held_out=held_out, in_held_out=True)
    balances = {family: Balance() for family in decks}
    made: set[picture_scenes.Scene] = set()
    while len(made) < count:
        family = tuple(decks)[len(made) % len(decks)]
        scene = picture_scenes.draw_scene(rng, decks[family])
        view = View(scene, decks[family], things, rng)
        # Names are as frequent as things are drawn: balanced, none would be asked for twice.
        asked = ask(view, FORMS, QUESTIONS, balances[family], rng, unbalanced=(name,))
        if scene in made or not asked:
            continue
        if split == "train":
            asked.append(caption(view))
        if family != "pictures":
            asked = [q._replace(task=f"{family}_{q.task}") for q in asked]
        made.add(scene)
        yield scene, family, asked
