# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes of shapes, each with one certain answer and in many wordings.

A form is a function that draws one question of its kind about a scene, or None where the scene does
not allow it. The constants set how many steps a question takes; naming.py has those of its wording.
The questions say "colour": their words are data, and another spelling would be other data.
"""

from typing import NamedTuple

from vlm_jax.data.benchmark.naming import ANY, EXTREMES, RELATIONS, Phrase, View
from vlm_jax.data.benchmark.scenes import COLOR_NAMES, KINDS, SIZES, Scene

MOST = 4  # the largest count asked for
CHAIN_DEPTH = (2, 2, 3)  # steps of a chain of relations, drawn from these


class Question(NamedTuple):
    """One question; answers are balanced over `label` within each `form` and `key`.

    `label` is the answer, or "first"/"second" where the answer repeats a word of the question.
    `key` is what is asked, whatever the wording.
    """

    task: str
    form: str
    key: tuple
    label: str
    answer: str
    text: str


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _question(task, form, key, answer, text, label=None) -> Question:
    return Question(task, form, (form, key), label or answer, answer, text)


def _one(mask: int) -> int | None:
    """The index of the only bit of `mask`."""
    return mask.bit_length() - 1 if mask and not mask & (mask - 1) else None


def caption(scene: Scene) -> Question:
    """Every shape in reading order: dense supervision for training, as captions are for LLaVA."""
    words = " ".join(
        f"{SIZES[s.size]} {COLOR_NAMES[s.color]} {KINDS[s.kind]}" for s in scene.shapes
    )
    return Question("caption", "caption", ("caption",), words, words, "describe the picture.")


# existence
def exists(v: View):
    parts = v.rng.choice(("c", "c", "k", "k", "ck"))
    p = v.any_phrase(parts)
    text = v.ask(
        f"is there {v.a(p)}?", f"can you see {v.a(p)}?", f"does the picture show {v.a(p)}?"
    )
    return _question("existence", "exists:" + parts, p, _yes(v.mask(p) > 0), text)


# count
def count(v: View):
    parts = v.rng.choice(("c", "k", "c", "k", "s"))
    p = v.any_phrase(parts)
    number = v.mask(p).bit_count()
    if number > (MOST if len(parts) == 1 else 2):
        return None
    s = v.say(p, plural=True)
    text = v.ask(
        f"how many {s} are there?",
        f"how many {s} can you see?",
        f"count the {s}.",
        f"what is the number of {s}?",
    )
    return _question("count", "count:" + parts, p, str(number), text)


# compare
def _two(v: View) -> tuple[Phrase, Phrase] | None:
    p, q = (v.any_phrase(v.rng.choice("cck" if i else "ckk")) for i in range(2))
    return None if p == q or not (v.mask(p) | v.mask(q)) else (p, q)


def more(v: View):
    if (pair := _two(v)) is None:
        return None
    p, q = pair
    a, b = v.mask(p).bit_count(), v.mask(q).bit_count()
    s, t = v.say(p, True), v.say(q, True)
    if v.rng.random() < 0.5:
        return _question(
            "compare",
            "more",
            pair,
            _yes(a > b),
            v.ask(f"are there more {s} than {t}?", f"do {s} outnumber {t}?"),
        )
    return _question(
        "compare",
        "fewer",
        pair,
        _yes(a < b),
        v.ask(f"are there fewer {s} than {t}?", f"are {s} rarer than {t}?"),
    )


def equal(v: View):
    if (pair := _two(v)) is None:
        return None
    p, q = pair
    s, t = v.say(p, True), v.say(q, True)
    same = v.mask(p).bit_count() == v.mask(q).bit_count()
    return _question(
        "compare",
        "equal",
        pair,
        _yes(same),
        v.ask(
            f"are there as many {s} as {t}?", f"is the number of {s} equal to the number of {t}?"
        ),
    )


def which_more(v: View):
    masks, names = (v.colors, COLOR_NAMES) if v.rng.random() < 0.5 else (v.kinds, KINDS)
    i, j = v.rng.sample(range(len(names)), 2)
    a, b = masks[i].bit_count(), masks[j].bit_count()
    if a == b:
        return None
    what = "colour" if names is COLOR_NAMES else "kind"
    text = v.ask(
        f"which {what} is more common, {names[i]} or {names[j]}?",
        f"what do you see more often, {names[i]} or {names[j]}?",
    )
    return _question(
        "compare",
        "which_more",
        (what, i, j),
        names[i if a > b else j],
        text,
        "first" if a > b else "second",
    )


# relation
def is_beside(v: View):
    a, b = v.named(), v.named()
    if a is None or b is None or a[0] == b[0]:
        return None
    name = v.rng.choice(tuple(RELATIONS))
    s, t = v.shapes[a[0]], v.shapes[b[0]]
    if (s.column == t.column) if name in ("left", "right") else (s.row == t.row):
        return None
    truth = bool(v.side[name][b[0]] >> a[0] & 1)
    text = v.ask(f"is the {v.say(a[1])} {v.relation(name)} the {v.say(b[1])}?")
    return _question("relation", "is_beside", (name, a[1], b[1]), _yes(truth), text)


def _step(v: View, anchor: int, without: str) -> tuple[int, str, Phrase, str] | None:
    """A shape identified by a relation to `anchor`: its index, words, phrase and relation."""
    name = v.rng.choice(tuple(RELATIONS))
    near = v.side[name][anchor]
    if not near:
        return None
    p = (
        ANY
        if v.rng.random() < 0.4
        else v.any_phrase(v.rng.choice([x for x in "csk" if x != without]))
    )
    index = _one(near & v.mask(p))
    return None if index is None else (index, f"{v.say(p)} {v.relation(name)} the", p, name)


def _about(v: View, index: int, attribute: str) -> tuple[str, str]:
    """The attribute of a shape ("c" or "k") as an answer, and the words that ask for it."""
    s = v.shapes[index]
    return (COLOR_NAMES[s.color], "colour") if attribute == "c" else (KINDS[s.kind], "kind")


def beside(v: View):
    attribute = v.rng.choice("ck")
    anchor = v.named()
    step = anchor and _step(v, anchor[0], attribute)
    if not step:
        return None
    index, words, p, name = step
    answer, what = _about(v, index, attribute)
    s = f"{words} {v.say(anchor[1])}"
    text = v.ask(f"what {what} is the {s}?", f"name the {what} of the {s}.")
    return _question("relation", "beside:" + attribute, (p, name, anchor[1]), answer, text)


def extreme(v: View):
    attribute, name = v.rng.choice("ck"), v.rng.choice(tuple(RELATIONS))
    p = ANY if v.rng.random() < 0.6 else v.any_phrase("k" if attribute == "c" else "c")
    among = v.mask(p)
    if among.bit_count() < 2:
        return None
    ends = 0
    for i in range(len(v.shapes)):
        if among >> i & 1 and not v.side[name][i] & among:
            ends |= 1 << i
    if (index := _one(ends)) is None:
        return None
    answer, what = _about(v, index, attribute)
    s = f"{EXTREMES[name]} {v.say(p)}"
    text = v.ask(f"what {what} is the {s}?", f"name the {what} of the {s}.")
    return _question("relation", "extreme:" + attribute, (name, p), answer, text)


# attribute
def attribute(v: View):
    part = v.rng.choice("csk")
    if (shape := v.named(without=part)) is None:
        return None
    index, p = shape
    s = v.say(p)
    if part == "s":
        first = v.rng.randrange(2)
        text = v.ask(f"is the {s} {SIZES[first]} or {SIZES[1 - first]}?")
        size = v.shapes[index].size
        return _question("attribute", "attribute:s", (p, first), SIZES[size], text)
    answer, what = _about(v, index, part)
    text = v.ask(
        f"what {what} is the {s}?",
        f"what is the {what} of the {s}?",
        f"name the {what} of the {s}.",
    )
    return _question("attribute", "attribute:" + part, p, answer, text)


def is_color(v: View):
    if (shape := v.named(without="c")) is None:
        return None
    index, p = shape
    true_color = v.shapes[index].color
    color = true_color if v.rng.random() < 0.5 else v.rng.randrange(len(COLOR_NAMES))
    text = v.ask(
        f"is the {v.say(p)} {COLOR_NAMES[color]}?",
        f"does the {v.say(p)} look {COLOR_NAMES[color]}?",
    )
    return _question("attribute", "is_color", (p, color), _yes(color == true_color), text)


# composition
def chain(v: View):
    depth, attribute = v.rng.choice(CHAIN_DEPTH), v.rng.choice("ck")
    if (anchor := v.named()) is None:
        return None
    index, key, words, visited = anchor[0], [anchor[1]], v.say(anchor[1]), 1 << anchor[0]
    for k in range(depth):
        step = _step(v, index, attribute if k == depth - 1 else "")
        if step is None or visited >> step[0] & 1:
            return None
        index, more_words, p, name = step
        visited |= 1 << index
        key += [p, name]
        words = f"{more_words} {words}"
    answer, what = _about(v, index, attribute)
    text = v.ask(f"what {what} is the {words}?", f"name the {what} of the {words}.")
    return _question("composition", f"chain:{attribute}", tuple(key), answer, text)


def logic(v: View):
    p, q = v.any_phrase(v.rng.choice(("ck", "k", "c"))), v.any_phrase(v.rng.choice(("ck", "sk")))
    if p == q:
        return None
    a, b = v.mask(p) > 0, v.mask(q) > 0
    kind = v.rng.choice(("and", "or", "neither", "but_no"))
    s, t = v.a(p), v.a(q)
    truth, text = {
        "and": (a and b, f"is there {s} and also {t}?"),
        "or": (a or b, f"is there {s} or {t}?"),
        "neither": (not a and not b, f"is it true that there is neither {s} nor {t}?"),
        "but_no": (a and not b, f"is there {s} but no {v.say(q)}?"),
    }[kind]
    return _question("composition", "logic:" + kind, (p, q), _yes(truth), v.ask(text))


def not_a(v: View):
    one, other = v.rng.choice(("ck", "kc", "sk", "sc"))
    p, q = v.any_phrase(one), v.any_phrase(other)
    mask = v.mask(p) & ~v.mask(q)
    if v.rng.random() < 0.5:
        word = COLOR_NAMES[q.color] if other == "c" else v.a(q)
        text = v.ask(
            f"is there {v.a(p)} that is not {word}?", f"can you see {v.a(p)} which is not {word}?"
        )
        return _question("composition", "not", (p, q), _yes(mask > 0), text)
    if mask.bit_count() > 2:
        return None
    word = COLOR_NAMES[q.color] if other == "c" else v.say(q, True)
    text = v.ask(f"how many {v.say(p, True)} are not {word}?")
    return _question("composition", "count_not", (p, q), str(mask.bit_count()), text)


def either(v: View):
    p, q = v.any_phrase("c"), v.any_phrase("k")
    number = (v.mask(p) | v.mask(q)).bit_count()
    if number > MOST:
        return None
    text = v.ask(f"how many {v.say(ANY, True)} are {COLOR_NAMES[p.color]} or {v.say(q, True)}?")
    return _question("composition", "either", (p, q), str(number), text)


def count_beside(v: View):
    if (anchor := v.named()) is None:
        return None
    name = v.rng.choice(tuple(RELATIONS))
    p = ANY if v.rng.random() < 0.5 else v.any_phrase(v.rng.choice("ck"))
    number = (v.side[name][anchor[0]] & v.mask(p)).bit_count()
    if number > 3:
        return None
    text = v.ask(f"how many {v.say(p, True)} are {v.relation(name)} the {v.say(anchor[1])}?")
    return _question("composition", "count_beside", (p, name, anchor[1]), str(number), text)


def same(v: View):
    part = v.rng.choice("ck")
    if (anchor := v.named(without=part)) is None:
        return None
    index, p = anchor
    others = v.mask(v.phrase(index, part)) & ~(1 << index)
    what = "colour" if part == "c" else "kind"
    if v.rng.random() < 0.5:
        text = v.ask(f"is there another {v.say(ANY)} of the same {what} as the {v.say(p)}?")
        return _question("composition", "same", (part, p), _yes(others > 0), text)
    if others.bit_count() > 2:
        return None
    text = v.ask(f"how many other {v.say(ANY, True)} have the same {what} as the {v.say(p)}?")
    return _question("composition", "count_same", (part, p), str(others.bit_count()), text)


def alike(v: View):
    part = v.rng.choice("cks")
    a, b = v.named(without=part), v.named(without=part)
    if a is None or b is None or a[0] == b[0]:
        return None
    truth = v.phrase(a[0], part) == v.phrase(b[0], part)
    what = {"c": "colour", "k": "kind", "s": "size"}[part]
    text = v.ask(
        f"do the {v.say(a[1])} and the {v.say(b[1])} have the same {what}?",
        f"is the {v.say(a[1])} of the same {what} as the {v.say(b[1])}?",
    )
    return _question("composition", "alike:" + part, (a[1], b[1]), _yes(truth), text)


# How often each form is tried, by task; a task's share of the questions follows its sum.
FORMS = (
    (exists, 3),
    (count, 3),
    (more, 1),
    (equal, 0.2),
    (which_more, 0.5),
    (is_beside, 0.5),
    (beside, 0.3),
    (extreme, 1),
    (attribute, 2),
    (is_color, 0.5),
    (chain, 0.3),
    (logic, 0.3),
    (not_a, 0.2),
    (either, 0.2),
    (count_beside, 0.3),
    (same, 0.7),
    (alike, 0.3),
)
