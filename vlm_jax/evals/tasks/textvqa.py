# SPDX-License-Identifier: Apache-2.0
"""TextVQA: ten people's answers to questions about text in images (Singh et al. 2019).

Two tasks: with the words that an OCR system read in the prompt (`textvqa_ocr`, as LLaVA reports)
and without (`textvqa`). In files of predictions `question_id` is the image, which repeats: the
question is the first line of `prompt`, as in LLaVA's eval_textvqa.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_jax.evals import question_files
from vlm_jax.evals.answers import evalai
from vlm_jax.evals.readers import row_of, texts_of
from vlm_jax.evals.task import (
    SHORT,
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    average,
    found,
    image_folder,
    numbered,
    read_json,
)
from vlm_jax.evals.tasks.vqav2 import PERIODS, soft

NAMES = tuple(f"TextVQA_0.5.1_{split}.json" for split in ("val", "test", "train"))
OCR = "\nReference OCR token: "
# With words of OCR or not -> LLaVA's file of questions; it has none without.
LLAVA_FILES = {
    False: "llava_textvqa_val_v051.jsonl",
    True: "llava_textvqa_val_v051_ocr.jsonl",
}
ROSETTA = "TextVQA_Rosetta_OCR_v0.2_{}.json"
OLD_PROMPT = re.compile("Question: (.*?) Short answer:", re.DOTALL)


def join(image: str, question: str) -> str:
    """The key of a question of an image."""
    return f"{image} {question.lower()}"


def key_of(row: Mapping[str, Any]) -> str:
    """The key of a prediction, from its image and the question within its prompt.

    Besides LLaVA's prompts, with and without a line of OCR words, before or after the question,
    its first form `OCR tokens: ... Question: ... Short answer:`.
    """
    prompt = row["prompt"]
    lines = prompt.split("\n")
    question = lines[0]
    if prompt.startswith("OCR tokens: ") and (found := OLD_PROMPT.search(prompt)):
        question = found.group(1)
    elif prompt.startswith(OCR.strip()) and len(lines) > 1:
        question = lines[1]
    return join(row["question_id"], question)


def read(path: Path, *, ocr: bool) -> Annotations:
    """The questions; with `ocr` the words of LLaVA's question file or the Rosetta file too."""
    path = found(path, NAMES, "textvqa")
    content = read_json(path, dict)
    split = path.stem.rsplit("_", 1)[-1]
    folder = "test_images" if split == "test" else "train_images"
    home = image_folder(path, (folder, f"images/{folder}"))
    files, notes = [path], []
    prompts: dict[str, str] = {}
    if (asked := path.parent / LLAVA_FILES[ocr]).is_file():
        for row in question_files.rows(asked):
            row["prompt"] = row["text"]
            prompts[key_of(row)] = row["text"]
        files.append(asked)
    tokens: dict[str, Sequence[str]] = {}
    if ocr and (rosetta := path.parent / ROSETTA.format(split)).is_file():
        for number, row in enumerate(read_json(rosetta, dict)["data"]):
            with row_of(rosetta, number):
                tokens[row["image_id"]] = texts_of(row["ocr_tokens"])
        files.append(rosetta)
    if ocr and not prompts and not tokens:
        notes.append(f"no words of OCR: neither {LLAVA_FILES[True]} nor {rosetta.name} is here")
    questions = []
    for number, row in enumerate(content["data"]):
        with row_of(path, number):
            image, key = row["image_id"], join(row["image_id"], row["question"].split("\n")[0])
            facts = {"prompt": prompts.get(key), "tokens": tokens.get(image)}
            questions.append(
                Question(
                    id=image,
                    text=row["question"],
                    images=(home / f"{image}.jpg",),
                    answers=tuple(row.get("answers", ())),
                    key=key,
                    cluster=image,
                    facts={name: value for name, value in facts.items() if value is not None},
                )
            )
    if not questions:
        raise ValueError(f"{path} holds no questions")
    own, again = _repeated(questions)
    if again:
        notes.append(f"{again} questions repeat one about the same image; answers in their order")
    version = f"{split} {content.get('dataset_version', '')}".strip()
    return Annotations(own, tuple(files), version, tuple(notes))


def _repeated(questions: Sequence[Question]) -> tuple[tuple[Question, ...], int]:
    """The questions with keys of their own and the answers of the last one, and how many repeat."""
    own, last = numbered(questions), {q.key: q.answers for q in questions}
    repeating = {q.key for q, o in zip(questions, own, strict=True) if q.key != o.key}
    told = tuple(
        replace(o, facts={**o.facts, "last": last[q.key]}) if q.key in repeating else o
        for q, o in zip(questions, own, strict=True)
    )
    return told, sum(q.key != o.key for q, o in zip(questions, own, strict=True))


def soft_of_last(question: Question, text: str) -> Grade:
    """The soft score; of equal questions about an image the last one's answers are all theirs."""
    answers = question.facts.get("last", question.answers)
    return soft(replace(question, answers=answers), text, plain=evalai)


def prompt(question: Question) -> str:
    """The question, its first letter a capital as in LLaVA's file, and the suffix."""
    given = question.facts.get("prompt")
    return given or question.text[:1].upper() + question.text[1:] + SHORT


def prompt_ocr(question: Question) -> str:
    """The same with the words of OCR between; raises ValueError where there are none."""
    given = question.facts.get("prompt")
    return given or question.text[:1].upper() + question.text[1:] + _words(question) + SHORT


def prompt_lmms_eval(question: Question) -> str:
    """The question capitalized, the rest of it in lower case, and the suffix."""
    return question.text.capitalize() + SHORT


def prompt_lmms_eval_ocr(question: Question) -> str:
    """The same with the words of OCR between; raises ValueError where there are none."""
    return question.text.capitalize() + _words(question) + SHORT


def _words(question: Question) -> str:
    if "tokens" not in question.facts:
        raise ValueError(
            f"textvqa_ocr: no words of OCR for image {question.id}: put {ROSETTA.format('val')} "
            f"(or, for LLaVA's prompts, {LLAVA_FILES[True]}) beside the annotations"
        )
    return OCR + ", ".join(question.facts["tokens"])


FAULTS = (PERIODS, '\'s is split off: "the man\'s hat" becomes "man \'s hat"')
SOURCE = "haotian-liu/LLaVA@c121f04 llava/eval/eval_textvqa.py, m4c_evaluator.py"
LLAVA = Protocol(
    metric="vqa_accuracy",
    source=SOURCE,
    prompt=prompt,
    max_new_tokens=128,
    grade=soft_of_last,
    aggregate=average,
    faults=(
        *FAULTS,
        "equal questions about one image (without case) are all scored by the last one's answers",
    ),
)
OFFICIAL = replace(
    LLAVA,
    source="TextVQA's evaluator (facebookresearch/mmf@c46b3b3 pythia/tasks/processors.py "
    "EvalAIAnswerProcessor), which LLaVA copied; it gives no prompt, which is LLaVA's",
    grade=partial(soft, plain=evalai),
    faults=FAULTS,
)
LMMS_EVAL = replace(
    OFFICIAL,
    metric="exact_match",
    source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/textvqa/utils.py textvqa_process_results; "
    "max_new_tokens is the default of its models/simple/llava.py",
    prompt=prompt_lmms_eval,
    max_new_tokens=1024,
)
TASK = Task(
    name="textvqa",
    title="TextVQA 0.5.1, val, 5,000 questions, without OCR words in the prompt",
    where="https://textvqa.org/dataset; CC BY 4.0",
    layout="TextVQA_0.5.1_val.json, train_images/IMAGEID.jpg",
    read=partial(read, ocr=False),
    key_of=key_of,
    protocols={"official": OFFICIAL, "llava": LLAVA, "lmms-eval": LMMS_EVAL},
)
TASK_OCR = replace(
    TASK,
    name="textvqa_ocr",
    title="TextVQA 0.5.1, val, 5,000 questions, with OCR words in the prompt",
    layout="TextVQA_0.5.1_val.json, llava_textvqa_val_v051_ocr.jsonl or "
    "TextVQA_Rosetta_OCR_v0.2_val.json, train_images/IMAGEID.jpg",
    read=partial(read, ocr=True),
    protocols={
        "official": replace(OFFICIAL, prompt=prompt_ocr),
        "llava": replace(LLAVA, prompt=prompt_ocr),
        "lmms-eval": replace(
            LMMS_EVAL,
            source=f"{LMMS_EVAL.source}, with its option ocr: true",
            prompt=prompt_lmms_eval_ocr,
        ),
        "paper": replace(
            LLAVA,
            source="locuslab/llava-token-compression@bdedebd scripts/v1_5/eval/textvqa.sh, "
            "llava/eval/eval_textvqa.py, m4c_evaluator.py, which are LLaVA's",
            prompt=prompt_ocr,
        ),
    },
)
