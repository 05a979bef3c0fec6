# SPDX-License-Identifier: Apache-2.0
"""Short answers as the VQA evaluators normalize them, and the soft score against ten people.

Three published forms of one rule, kept apart because their values differ: `evalai` (EvalAI, Pythia;
LLaVA's m4c_evaluator.py and lmms-eval's vqa_eval_metric.py), `vqa_eval` (GT-Vision-Lab/VQA
vqaEval.py) and `vizwiz` (VizWiz API).
"""

import re
from collections.abc import Sequence
from functools import lru_cache

NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
MARKS = frozenset(""";/[]"{}()=+\\_-><@`,?!""")
# The sources write (?!<=\d) for a look-behind, which holds at every period.
PERIOD = re.compile(r"\.(?!\d)")
# The sources pass re.UNICODE, which is 32, where re.sub takes the number of replacements.
PERIODS = int(re.UNICODE)
THOUSANDS = re.compile(r"\d,\d")
THOUSANDS_EVALAI = re.compile(r"(?<=\d),+(?=\d)")
CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd
itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd
thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll
whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
""".split()
)
# VizWiz has another apostrophe in the table, except here.
PLAIN_VALUES = {"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"}
PLAIN_KEYS = {"couldn'tve", "hadn'tve"}
VIZWIZ = {
    apostrophe: {
        key if key in PLAIN_KEYS else key.replace("'", apostrophe): value
        if key in PLAIN_VALUES
        else value.replace("'", apostrophe)
        for key, value in CONTRACTIONS.items()
    }
    for apostrophe in ("\u2019", "`")
}
CACHED = 1 << 18  # answers; the ten of each of VQAv2's 214,354 questions are mostly repeated


def one_line(text: str) -> str:
    """The text with blanks for line breaks and tabs, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str, thousands: re.Pattern[str] = THOUSANDS) -> str:
    """The text with each mark removed or made a blank, and without periods before no digit.

    A mark goes if a blank is before or after it anywhere, or `thousands` is found; only the first
    32 periods go.
    """
    if marks := MARKS.intersection(text):
        joined = thousands.search(text) is not None
        text = text.translate(
            {ord(m): None if joined or f"{m} " in text or f" {m}" in text else " " for m in marks}
        )
    return PERIOD.sub("", text, count=PERIODS)


def words(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """Lower-case words, number words as digits, without articles, contractions written out."""
    numbers = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in numbers if word not in ARTICLES)


@lru_cache(CACHED)
def evalai(text: str) -> str:
    """As EvalAIAnswerProcessor does: splits 's off, drops commas and question marks first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(without_punctuation(one_line(text), THOUSANDS_EVALAI))


@lru_cache(CACHED)
def evalai_parts(text: str) -> str:
    """As lmms-eval's vqav2 does with the processor's parts: without its first step."""
    return words(without_punctuation(one_line(text), THOUSANDS_EVALAI))


@lru_cache(CACHED)
def vqa_eval(text: str) -> str:
    """As VQAEval does: processPunctuation, then processDigitArticle."""
    return words(without_punctuation(one_line(text)))


@lru_cache(CACHED)
def vizwiz(text: str, apostrophe: str = "\u2019") -> str:
    """As the VizWiz API does with predictions; its contractions have another apostrophe."""
    return words(without_punctuation(one_line(text)), VIZWIZ[apostrophe])


def soft_score(answer: str, golds: Sequence[str]) -> float:
    """The mean over people of min(1, matches among the other people / 3); from 0 to 1."""
    same = golds.count(answer)
    if not same:
        return 0.0
    others = len(golds) - same
    return (same * min(1, (same - 1) / 3) + others * min(1, same / 3)) / len(golds)
