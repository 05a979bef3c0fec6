# SPDX-License-Identifier: Apache-2.0
"""What each field of a configuration may be, and what changing it means for a run that was begun.

`FIELDS` has every field of configs/base.py. A value out of its range is refused at the door, by
name (`check`). A folder serves one run; whether a changed field makes another run of it depends on
what the field is for (`Change`), and the reason stands beside it here and nowhere else.
"""

import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.method import Method
from vlm_jax.data.benchmark.things import STYLES
from vlm_jax.models.pruning import NONE

STAGES = ("encoder", "align", "finetune")  # in the order in which they run
PICTURES = ("data.pictures", "data.held_out_style")  # read where there is a share of them
SYNTHETIC = ("data.train_images", "data.val_images", "data.test_images", "data.picture_share",
             "data.questions_per_row", "data.video_share", *PICTURES)  # fmt: skip

# Fields that came after results were published and folders were begun, with the value at which all
# is as it was without them.
LATER = {
    "data.images_per_row": 1,
    "data.frames": 0,
    "grid.frames": (),
    "data.image_resize": (),
    "data.image_rescale": 1 / 255,
    "data.image_normalize": True,
    "data.image_exif": "ignore",
    "data.mixture": (),
    "eval_every": 0,
    "validation.split": "val",
    "validation.hold_out": 0,
    "validation.examples": 512,
    "validation.answers": 64,
    "compressor.elastic": (),
    "compressor.queries": 0,
    "compressor.prefusion": 4,
    "compressor.important_ratio": 0.5,
    "compressor.selection_seed": 0,
    "compressor.ps_version": "v2",
    "compressor.clip_width": 768,
    "compressor.text_width": 768,
    "compressor.text_depth": 12,
    "compressor.text_heads": 12,
    "compressor.text_vocab": 49408,
    "compressor.text_length": 77,
    "loss_chunk": -1,
    "frozen_dtype": "float32",
    **{f"{stage}.moments": "float32" for stage in STAGES},
    "data.row_length": 0,
    "data.row_images": 8,
    "data.buckets": (),
    "data.questions_per_row": 1,
    "data.picture_share": 0.0,
    "data.video_share": 0.0,
    "data.pictures": "",
    "data.held_out_style": "facebook",
    "contrast.weight": 0.0,
    "contrast.width": 64,
    **{f"{stage}.max_nonfinite": 3 for stage in ("encoder", "align", "finetune")},
    **{f"pruning.{name}": value for name, value in NONE.items()},
}
# Sections that came later as a whole.
LATER_SECTIONS = ("validation", "contrast", "pruning")

Flat = Mapping[str, Any]  # dotted name of a field -> its value, as JSON gives it back


class Range(NamedTuple):
    """Numbers that a field may have: whole ones or any, from `low` to `high`."""

    whole: bool
    low: int | float
    high: int | float = math.inf
    open: bool = False  # neither end belongs to it
    many: bool = False  # the field is a sequence of such numbers

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number, or a sequence of them."""
        if self.many:
            alone = self._replace(many=False)
            return isinstance(value, (list, tuple)) and all(alone.holds(v) for v in value)
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if not math.isfinite(value):
            return False
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        kind = f"{kind}s, each" if self.many else f"a {kind}"
        bounded = math.isfinite(self.high)
        if self.open:
            return f"{kind} above {self.low}" + f" and below {self.high}" * bounded
        return f"{kind} from {self.low} " + (f"to {self.high}" if bounded else "upwards")


class Choice(NamedTuple):
    """Words, of which a field may have one."""

    words: tuple[str, ...]
    many: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return isinstance(value, str) and value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


class Change(Enum):
    """What another value of a field means for a folder that a run has been begun in."""

    RUN = "part of what is trained: another run"
    # What the model is shown: another run for training; an evaluation may choose its own.
    SHOWN = "another run; an evaluation of its own"
    # Where something lies. The same run where it holds the same, which hashes tell.
    PLACE = "the same run where the content is the same; an evaluation of its own"
    # Read by evaluation alone: training does not know it, the rows of a grid depend on it.
    ANSWERS = "nothing for training; another grid; an evaluation of its own"
    # Of an evaluation too, but its answers are equal up to rounding: a grid may change it.
    BATCH = "nothing for training and grids; an evaluation of its own"
    # How it is computed. The numbers are equal up to the rounding of sums in another order.
    ROUNDING = "the same run up to rounding"
    NOTHING = "the same run"
    # Read by a grid alone, which may be given more cells.
    CELLS = "nothing but for a grid"


class Field(NamedTuple):
    """One field: what a change of it means, and the numbers or words that it may be, if it is of
    those."""

    change: Change
    range: Range | Choice | None = None


COUNT = Range(True, 1)
COUNTS = Range(True, 1, many=True)
SOME = Range(True, 0)  # and 0 for none
SEED = Range(True, 0, 2**32 - 1)  # what a random generator of JAX takes
POSITIVE = Range(False, 0, open=True)
NOT_NEGATIVE = Range(False, 0)
SHARE = Range(False, 0, 1)
DECAY = Range(False, 0, 0.9999999)  # of AdamW's means: at 1 they would never move
LAYOUT = Range(True, -1)  # of devices; vlm_jax/mesh.py says what fits

RUN, SHOWN, PLACE, ANSWERS, BATCH, ROUNDING, NOTHING, CELLS = Change


def _section(name: str, change: Change, **ranges: Range | Choice | None) -> dict[str, Field]:
    return {f"{name}.{field}": Field(change, of) for field, of in ranges.items()}


def _stage(name: str) -> dict[str, Field]:
    return _section(
        name,
        RUN,
        steps=SOME,
        batch=COUNT,
        learning_rate=NOT_NEGATIVE,
        compressor_rate=NOT_NEGATIVE,
        warmup=SHARE,
        weight_decay=NOT_NEGATIVE,
        beta1=DECAY,
        beta2=DECAY,
        epsilon=POSITIVE,
        moments=Choice(("float32", "bfloat16", "factored")),
        clip_norm=NOT_NEGATIVE,
        z_loss=NOT_NEGATIVE,
    ) | {
        f"{name}.accumulate": Field(ROUNDING, COUNT),  # sums, not means: the whole batch's step
        f"{name}.max_nonfinite": Field(NOTHING, COUNT),  # when to give up, not what is computed
    }


FIELDS: dict[str, Field] = {
    # Parameters, order of the rows and draws come from it.
    "seed": Field(RUN, SEED),
    # -1 takes what is there, so a run goes on on other machines anyway.
    **_section("mesh", ROUNDING, data=LAYOUT, fsdp=LAYOUT, tensor=LAYOUT),
    **_section(
        "vit",
        RUN,
        image_size=COUNT,
        patch_size=COUNT,
        depth=COUNT,
        width=COUNT,
        mlp=COUNT,
        heads=COUNT,
        norm_eps=POSITIVE,
        levels=COUNTS,
        activation=None,
        class_token=None,
        keep_class=None,
        patch_bias=None,
        pre_norm=None,
        final_norm=None,
        cut_border=None,
    ),
    **_section(
        "llm",
        RUN,
        vocab=COUNT,
        depth=COUNT,
        width=COUNT,
        mlp=COUNT,
        heads=COUNT,
        kv_heads=COUNT,
        head_size=COUNT,
        rope_theta=POSITIVE,
        norm_eps=POSITIVE,
        qkv_bias=None,
        tied_embeddings=None,
        qk_norm=None,
        rope_kind=None,
        rope_factor=POSITIVE,
        rope_low_frequency=POSITIVE,
        rope_high_frequency=POSITIVE,
        rope_original_length=COUNT,
    ),
    # Of a model that serves several V, `tokens` is of requests alone: `change_of` knows.
    **_section(
        "compressor", RUN, kind=None, tokens=SOME, heads=COUNT, query=None, downsample=None,
        elastic=COUNTS, scales=COUNTS, queries=SOME, prefusion=SOME, important_ratio=SHARE,
        selection_seed=SEED, ps_version=Choice(("v2", "v1")), clip_width=COUNT, text_width=COUNT,
        text_depth=COUNT, text_heads=COUNT, text_vocab=COUNT, text_length=COUNT,
    ),
    # Of a model that training has made; it reads all tokens.
    **_section("pruning", ANSWERS, kind=None, layers=COUNTS, tokens=COUNTS, weight=SHARE,
               dropped=SHARE),
    **_section("lora", RUN, rank=SOME, alpha=POSITIVE, targets=None),
    "start_from": Field(RUN),
    # float32 and bfloat16 part ways after a few steps; what is trained can be asked in either.
    # In 16 bits of another kind gradients vanish, and whole numbers have none.
    "compute_dtype": Field(SHOWN, Choice(("float32", "bfloat16"))),
    "remat": Field(ROUNDING),  # the same numbers, computed once or twice
    # Checkpoints hold the weights as a step has them.
    "frozen_dtype": Field(RUN, Choice(("float32", "bfloat16"))),
    "loss_chunk": Field(ROUNDING, Range(True, -1)),  # one sum, in parts or at once
    "kernels": Field(ROUNDING),  # two forms of one formula
    "data.source": Field(SHOWN),
    **_section("data", PLACE, path=None, images=None),
    # Weights are part of the hash of a mixture.
    "data.mixture": Field(PLACE),
    # Its ids are the rows of the model's embedding.
    "data.tokenizer": Field(PLACE),
    **_section("data", SHOWN, template=None, image_fit=None),
    # What the encoder was made for.
    **_section("data", RUN, image_mean=Range(False, -10, 10, many=True),
               image_std=Range(False, 0, 10, open=True, many=True), image_resample=None,
               image_resize=SOME._replace(many=True), image_rescale=POSITIVE, image_normalize=None),
    # Photographs of another camera may be turned otherwise.
    "data.image_exif": Field(SHOWN),
    **_section("data", SHOWN, text_length=COUNT, question_length=COUNT, images_per_row=COUNT,
               frames=SOME),
    # Which examples meet in a step.
    **_section("data", RUN, row_length=SOME, row_images=COUNT, buckets=COUNTS),
    # A run that met no bad row is the one that would have skipped it.
    "data.on_bad_example": Field(NOTHING),
    **_section("data", SHOWN, text_only=None, blind=None),
    "data.workers": Field(NOTHING, SOME),  # batch k is the same whoever reads it
    "data.train_images": Field(SHOWN, SOME),
    **_section("data", ANSWERS, val_images=SOME, test_images=SOME),
    "data.questions_per_row": Field(RUN, SOME),  # of training rows alone
    **_section("data", SHOWN, picture_share=SHARE, video_share=SHARE),
    # Of one version, which is part of the hash.
    "data.pictures": Field(PLACE),
    "data.held_out_style": Field(SHOWN, Choice(STYLES)),
    **_stage("encoder"),
    **_stage("align"),
    **_stage("finetune"),
    **_section("contrast", RUN, weight=NOT_NEGATIVE, width=COUNT),
    # When something is kept and said, not what is computed.
    **_section("checkpoint", NOTHING, every=COUNT, keep=COUNT),
    **_section("log", NOTHING, every=COUNT, tensorboard=None),
    "eval_every": Field(NOTHING, SOME),
    **_section("validation", NOTHING, split=None, examples=COUNT, answers=SOME),
    "validation.hold_out": Field(RUN, SOME),  # of what is trained on
    "evaluate.batch": Field(BATCH, COUNT),
    "evaluate.split": Field(ANSWERS),
    "evaluate.max_new_tokens": Field(ANSWERS, COUNT),
    **_section("grid", CELLS, llms=None, tokens=SOME._replace(many=True), frames=COUNTS,
               seeds=SEED._replace(many=True), baselines=None),
}  # fmt: skip


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names, as JSON would give them back."""
    if isinstance(tree, dict) and (tree or not prefix):
        return {
            k: v
            for key, sub in tree.items()
            for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.loads(json.dumps(tree))}


def rule(name: str) -> Field:
    """The rule of a field. What the table does not know is part of the run."""
    if name.startswith("grid.llms."):
        # Names of LLMs have dots too: the last one or two parts are the field.
        *_, section, leaf = name.split(".")
        known = f"{section}.{leaf}" if f"{section}.{leaf}" in FIELDS else f"llm.{leaf}"
        return Field(CELLS, rule(leaf if leaf in FIELDS else known).range)
    return FIELDS.get(name, Field(RUN))


def check(values: Flat) -> None:
    """Raises ValueError for a value that its field cannot have, by the field's name."""
    for name, value in values.items():
        if (allowed := rule(name).range) is None or allowed.holds(value):
            continue
        if allowed.many and isinstance(value, (list, tuple)):
            allowed = allowed._replace(many=False)
            value = next(one for one in value if not allowed.holds(one))
        raise ValueError(f"{name}={value_text(value)}: give {allowed}")


def check_names(values: Flat) -> None:
    """Raises ValueError unless a configuration has every field, and no other: one that nothing
    reads would be ignored. The grid's may be away, as in the configuration of a cell."""
    found = {name for name in values if not name.startswith("grid.")}
    known = {name for name in FIELDS if not name.startswith("grid.")}
    for names, has in ((known - found, "lacks"), (found - known, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"the configuration {has} the field {min(names)}{more}: it has the fields of "
                "configs/base.py, no other, and begins with base.get_config()"
            )


def differing(then: Flat, now: Flat) -> Iterator[str]:
    """Names of the fields that differ, in order; a field that one side lacks differs."""
    absent = object()
    for name in sorted(then.keys() | now.keys()):
        if then.get(name, absent) != now.get(name, absent):
            yield name


def change_of(name: str, then: Flat, now: Flat) -> Change:
    """What it means that field `name` differs between two configurations."""
    if unread(name, then) and unread(name, now):
        return Change.NOTHING
    method = COMPRESSORS.get(then.get("compressor.kind"), Method)
    if name == "compressor.tokens" and (method.any_tokens or then.get("compressor.elastic")):
        return Change.BATCH
    # Each micro-batch is shown a number of tokens of its own.
    if name == "finetune.accumulate" and method.draws_tokens:
        return Change.RUN
    return rule(name).change


def unread(name: str, values: Flat) -> bool:
    """Whether nothing reads this field because of what another one says."""
    section = name.partition(".")[0]
    if section in STAGES and name != f"{section}.steps":
        return values.get(f"{section}.steps") == 0
    if section == "contrast":
        off = name != "contrast.weight" and not values.get("contrast.weight")
        return off or values.get("encoder.steps") == 0
    if name in ("lora.alpha", "lora.targets"):
        return values.get("lora.rank") == 0
    if name == "data.row_images":
        return values.get("data.row_length") == 0
    if name in PICTURES and not values.get("data.picture_share"):
        return values.get("data.source") != "mixture"
    if name in SYNTHETIC:
        return values.get("data.source") not in ("synthetic", "mixture")
    if name in ("data.path", "data.images"):
        return values.get("data.source") == "synthetic"
    return False


def value_text(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, (list, tuple)):
        return f"({', '.join(value_text(v) for v in value)})"
    return str(value)


def changes(names: list[str], then: Flat, now: Flat, *, most: int = 4) -> str:
    """How fields differ, for a message: `llm.depth was 2, is 3; ...`."""
    parts = []
    for name in names[:most]:
        was = value_text(then[name]) if name in then else "not there"
        now_is = f"is {value_text(now[name])}" if name in now else "is gone"
        parts.append(f"{name} was {was}, {now_is}")
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(parts) + more
