# SPDX-License-Identifier: Apache-2.0
"""Fields of other servers that would change an answer: refused unless they change nothing.

Everything else that is not listed in `schema.py` (user, metadata, store, service_tier ...) has no
effect on an answer anywhere, and is ignored.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_jax.server.refusals import Refusal


class Unsupported(NamedTuple):
    """Values with which a field changes nothing, and what a user can do instead of others."""

    neutral: tuple[Any, ...]
    way_out: str


PENALTY = "repetition is not penalized here: leave it out"
BIAS = "tokens are neither preferred nor forbidden: leave it out"
SAMPLING = "draws are by temperature and top_p: leave it out"
TOOLS = "tools are not called: describe them in the text, and parse the answer"
FORM = "the form of an answer is not constrained: ask for it in the text, and parse the answer"
TEMPLATE = "a model has the chat template that it was trained with: leave it out"
AUDIO = "answers are text: leave it out"
UNSUPPORTED = {
    "n": Unsupported((1,), "one answer per request: send the request several times with seeds"),
    "best_of": Unsupported((1,), "one answer per request: leave it out"),
    "use_beam_search": Unsupported((False,), SAMPLING),
    "frequency_penalty": Unsupported((0,), PENALTY),
    "presence_penalty": Unsupported((0,), PENALTY),
    "repetition_penalty": Unsupported((1,), PENALTY),
    "no_repeat_ngram_size": Unsupported((0,), PENALTY),
    "logit_bias": Unsupported(({},), BIAS),
    "bad_words": Unsupported(([],), BIAS),
    "allowed_token_ids": Unsupported((), BIAS),
    "top_k": Unsupported((-1, 0), SAMPLING),
    "min_p": Unsupported((0,), SAMPLING),
    "typical_p": Unsupported((1,), SAMPLING),
    "top_a": Unsupported((0,), SAMPLING),
    "min_tokens": Unsupported((0,), "an answer ends where the model ends it: leave it out"),
    "ignore_eos": Unsupported((False,), "an answer ends where the model ends it: leave it out"),
    "stop_token_ids": Unsupported(([],), "give texts in stop"),
    "include_stop_str_in_output": Unsupported((False,), "add the stop text yourself"),
    "skip_special_tokens": Unsupported((True,), "special tokens are not part of a text"),
    "truncate_prompt_tokens": Unsupported((), "shorten the conversation yourself"),
    "echo": Unsupported((False,), "join the prompt and the answer yourself"),
    "prompt_logprobs": Unsupported((0,), "only tokens of the answer have probabilities"),
    "tools": Unsupported(([],), TOOLS),
    "functions": Unsupported(([],), TOOLS),
    "tool_choice": Unsupported(("none", "auto"), TOOLS),
    "function_call": Unsupported(("none", "auto"), TOOLS),
    "web_search_options": Unsupported((), "nothing is searched: leave it out"),
    "response_format": Unsupported(({"type": "text"},), FORM),
    "structured_outputs": Unsupported((), FORM),
    "guided_json": Unsupported((), FORM),
    "guided_regex": Unsupported((), FORM),
    "guided_choice": Unsupported((), FORM),
    "guided_grammar": Unsupported((), FORM),
    "grammar": Unsupported((), FORM),
    "json_schema": Unsupported((), FORM),
    "reasoning_effort": Unsupported(("none",), "there is no reasoning to lengthen: leave it out"),
    "verbosity": Unsupported(("medium",), "ask for a short or a long answer in the text"),
    "modalities": Unsupported((["text"],), AUDIO),
    "audio": Unsupported((), AUDIO),
    "chat_template": Unsupported((), TEMPLATE),
    "chat_template_kwargs": Unsupported(({},), TEMPLATE),
    "documents": Unsupported(([],), "put them into the text of a message"),
    "add_generation_prompt": Unsupported((True,), "end with a message of the user"),
    "continue_final_message": Unsupported((False,), "end with a message of the user"),
    "lora_request": Unsupported((), "adapters are merged before serving: vlm-jax convert"),
}
OF_MESSAGE = {
    "name": Unsupported((), "the chat template has no names: write them into the text"),
    "tool_calls": Unsupported(([],), TOOLS),
    "function_call": Unsupported((), TOOLS),
    "audio": Unsupported((), AUDIO),
    "prefix": Unsupported((False,), "end with a message of the user"),
}


def check(extra: Mapping[str, Any], table: Mapping[str, Unsupported], where: str = "") -> None:
    """Raises Refusal for the first field with a value that would change the answer.

    None, as clients send it for a field that is not set, changes nothing.
    """
    for name, unsupported in table.items():
        value = extra.get(name)
        if value is None or any(_same(value, neutral) for neutral in unsupported.neutral):
            continue
        allowed = " or ".join(repr(neutral) for neutral in unsupported.neutral)
        raise Refusal(
            f"{where}{name}={value!r:.80} is not supported"
            f"{f' (only {allowed})' if allowed else ''}: {unsupported.way_out}",
            param=f"{where}{name}",
            code="unsupported_parameter",
        )


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not a truth value that equals a number."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
